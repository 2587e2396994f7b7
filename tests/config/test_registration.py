"""Registration with PEFT, and the opt-in that makes `import peft` do it."""

from __future__ import annotations

import copy
import enum
import json
import os
import pickle
import runpy
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import peft
import peft.mapping
import peft.peft_model
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import spiel_peft
from spiel_peft import autoload, registration
from spiel_peft.config import SpIELConfig
from spiel_peft.model import SpIELModel

MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


@pytest.fixture
def mappings() -> Iterator[None]:
    """Undo a test's changes of PEFT's tables."""
    before = [dict(mapping) for mapping in MAPPINGS]
    yield
    for mapping, entries in zip(MAPPINGS, before, strict=True):
        mapping.clear()
        mapping.update(entries)


def run_python(code: str, *, only: tuple[str, ...] | None = None) -> str:
    """Output of `code` in a new interpreter, which imports from this checkout, or `only` from these folders."""
    root = Path(spiel_peft.__file__).parents[1]
    checkout = (str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", ""))
    folders = checkout if only is None else only
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
        cwd=os.sep,  # with -c, Python looks for packages in the working directory first
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the enum ---


def test_the_type_is_a_real_member() -> None:
    member = registration.spiel_type()
    assert isinstance(member, PeftType)
    assert member is PeftType.SPIEL is PeftType("SPIEL") is PeftType["SPIEL"]
    assert member in list(PeftType) and "SPIEL" in list(PeftType)
    assert [m.name for m in PeftType].count("SPIEL") == 1
    assert (member.name, member.value, repr(member)) == ("SPIEL", "SPIEL", "<PeftType.SPIEL: 'SPIEL'>")
    assert member == "SPIEL" and hash(member) == hash("SPIEL")
    assert json.dumps(member) == '"SPIEL"'
    assert str(PeftType.LORA).replace("LORA", "SPIEL") == str(member)


def test_the_member_is_as_protected_as_others() -> None:
    with pytest.raises(AttributeError):
        PeftType.SPIEL = "else"  # type: ignore[misc]
    with pytest.raises(ValueError, match="'SPIELX' is not a valid PeftType"):
        PeftType("SPIELX")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_member_survives_copies_and_pickles(protocol: int) -> None:
    member = registration.spiel_type()
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member, protocol)) is member


def test_a_pickle_opens_in_a_process_that_knows_only_peft() -> None:
    pickled = pickle.dumps([registration.spiel_type(), SpIELConfig(r=3)])
    out = run_python(
        f"""
        import pickle, sys
        import peft
        assert "SPIEL" not in peft.PeftType.__members__
        member, config = pickle.loads({pickled!r})
        assert member is peft.PeftType.SPIEL is config.peft_type
        print(config.r)
        """
    )
    assert out.split() == ["3"]


def test_other_members_are_untouched() -> None:
    assert PeftType.LORA is PeftType("LORA")
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is peft.LoraConfig


def test_adding_a_member_to_any_str_enum() -> None:
    class Colour(str, enum.Enum):
        RED = "RED"

    member = registration._add_member(Colour, "BLUE")
    assert [*Colour] == [Colour.RED, member] and len(Colour) == 2
    assert Colour.BLUE is Colour("BLUE") is Colour["BLUE"] is member
    assert member in Colour and Colour.RED in Colour


# --- register() ---


def test_importing_the_package_registers_it() -> None:
    for key in ("SPIEL", PeftType.SPIEL):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is SpIELConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is SpIELModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "spiel_" == SpIELModel.prefix
        assert key not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_every_table_of_peft_is_the_same_object() -> None:
    for module in (peft, peft.peft_model, peft.mapping_func):
        for name in (
            "PEFT_TYPE_TO_CONFIG_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
            "PEFT_TYPE_TO_PREFIX_MAPPING",
        ):
            if hasattr(module, name):
                assert getattr(module, name) is getattr(peft.mapping, name)


def test_registering_again_changes_nothing() -> None:
    before = [dict(mapping) for mapping in MAPPINGS], list(PeftType)
    spiel_peft.register()
    spiel_peft.register()
    assert ([dict(mapping) for mapping in MAPPINGS], list(PeftType)) == before


def test_threads_register_once(mappings: None) -> None:
    for mapping in MAPPINGS:
        del mapping["SPIEL"]
    barrier, errors = threading.Barrier(16), []

    def work() -> None:
        barrier.wait()
        try:
            spiel_peft.register()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPIEL"] is SpIELConfig


def test_first_registration_from_many_threads_and_after_a_reload() -> None:
    out = run_python(
        """
        import importlib, sys, threading
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

        members, errors, barrier = [], [], threading.Barrier(8)
        def work():
            barrier.wait()
            try:
                import spiel_peft
                members.append(spiel_peft.SpIELConfig().peft_type)
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=work) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not errors, errors
        assert len(members) == 8 and len(set(map(id, members))) == 1
        assert [m.name for m in PeftType].count("SPIEL") == 1

        import spiel_peft.registration
        importlib.reload(spiel_peft.registration)
        importlib.reload(spiel_peft).register()
        assert CONFIGS["SPIEL"] is spiel_peft.SpIELConfig

        old = spiel_peft.SpIELConfig
        for name in [n for n in sys.modules if n.partition(".")[0] == "spiel_peft"]:
            del sys.modules[name]
        import spiel_peft
        assert spiel_peft.SpIELConfig is not old
        assert CONFIGS["SPIEL"] is spiel_peft.SpIELConfig
        assert spiel_peft.SpIELConfig().peft_type is members[0]
        print("done")
        """
    )
    assert out.split() == ["done"]


def test_another_spiel_is_not_overwritten(mappings: None) -> None:
    PEFT_TYPE_TO_CONFIG_MAPPING["SPIEL"] = peft.LoraConfig
    with pytest.raises(RuntimeError, match=r"'SPIEL'.*peft\.tuners\.lora\.config\.LoraConfig.*Uninstall"):
        spiel_peft.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPIEL"] is peft.LoraConfig


def test_another_spiel_model_is_not_overwritten(mappings: None) -> None:
    del PEFT_TYPE_TO_CONFIG_MAPPING["SPIEL"]
    PEFT_TYPE_TO_TUNER_MAPPING["SPIEL"] = peft.LoraModel
    with pytest.raises(RuntimeError, match="'SPIEL'.*LoraModel"):
        spiel_peft.register()
    assert "SPIEL" not in PEFT_TYPE_TO_CONFIG_MAPPING


def test_another_owner_of_the_prefix_is_named(mappings: None) -> None:
    for mapping in MAPPINGS:
        del mapping["SPIEL"]
    PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] = "spiel_"
    with pytest.raises(RuntimeError, match="prefix 'spiel_'.*'LORA'"):
        spiel_peft.register()
    assert "SPIEL" not in PEFT_TYPE_TO_CONFIG_MAPPING


def test_only_registration_touches_peft_types() -> None:
    package = Path(spiel_peft.__file__).parent
    users = [
        path.name
        for path in package.rglob("*.py")
        if "_value2member_map_" in path.read_text() or "register_peft_method(" in path.read_text()
    ]
    assert users == ["registration.py"]


# --- PEFT and transformers find it ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, torch.Tensor]:
    """Folders of a tiny model and of an adapter for it, and the adapted model's logits."""
    torch.manual_seed(0)
    base, adapter = (str(tmp_path_factory.mktemp(name)) for name in ("base", "adapter"))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape)).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = SpIELConfig(r=2, init_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    assert type(model.base_model) is SpIELModel
    model.save_pretrained(adapter)
    with torch.no_grad():
        return base, adapter, model(torch.arange(4)[None]).logits


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(4)[None]).logits


def test_loaders_of_peft_and_transformers_find_the_adapter(tiny: tuple[str, str, torch.Tensor]) -> None:
    base, adapter, expected = tiny
    fresh = AutoModelForCausalLM.from_pretrained
    assert not torch.equal(logits(fresh(base)), expected)
    by_transformers = fresh(base)
    by_transformers.load_adapter(adapter)
    for model in (
        PeftModel.from_pretrained(fresh(base), adapter),
        AutoPeftModelForCausalLM.from_pretrained(adapter),
        fresh(adapter),
        by_transformers,
    ):
        assert torch.equal(logits(model), expected), type(model)


def test_injection_without_a_peft_model_finds_it(tiny: tuple[str, str, torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny[0])
    inject_adapter_in_model(SpIELConfig(target_modules=["q_proj"]), model)
    assert any("spiel_" in name for name, _ in model.named_parameters())
    model = AutoModelForCausalLM.from_pretrained(tiny[0])
    model.add_adapter(SpIELConfig(target_modules=["q_proj"]))
    assert any("spiel_" in name for name, _ in model.named_parameters())


def test_saved_adapters_name_the_type(tiny: tuple[str, str, torch.Tensor]) -> None:
    saved = json.loads((Path(tiny[1]) / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SPIEL"
    assert type(PeftConfig.from_pretrained(tiny[1])) is SpIELConfig


# --- autoload ---


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder with stand-ins for peft and spiel_peft: the hook knows only names, and these are quick."""
    for name, source in (("peft", "state = 'ready'"), ("spiel_peft", "import peft\nseen = peft.state")):
        (tmp_path / "fakes" / name).mkdir(parents=True)
        (tmp_path / "fakes" / name / "__init__.py").write_text(source)
    (tmp_path / "fakes" / "peft" / "data.txt").write_text("data")
    return tmp_path / "fakes"


def run_with_hook(target: Path, fakes: Path, code: str) -> list[str]:
    """The words `code` prints where `target` is a site-packages folder and `fakes` holds the packages."""
    start = f"import site, sys\nsite.addsitedir({str(target)!r})\nsys.path.insert(0, {str(fakes)!r})\n"
    return run_python(start + textwrap.dedent(code), only=()).split()


PROBE = """
    early = "spiel_peft" in sys.modules or "peft" in sys.modules
    import peft
    print(early, "spiel_peft" in sys.modules)
"""


def test_without_autoload_peft_does_not_import_the_package(tmp_path: Path, fakes: Path) -> None:
    assert run_with_hook(tmp_path, fakes, PROBE) == ["False", "False"]


def test_autoload_imports_the_package_right_after_peft(tmp_path: Path, fakes: Path) -> None:
    autoload.enable(tmp_path)
    assert run_with_hook(tmp_path, fakes, PROBE) == ["False", "True"]
    assert run_with_hook(tmp_path, fakes, "import peft; print(sys.modules['spiel_peft'].seen)") == ["ready"]
    autoload.disable(tmp_path)
    assert run_with_hook(tmp_path, fakes, PROBE) == ["False", "False"]


def test_autoload_serves_a_program_that_knows_only_peft(tmp_path: Path, tiny: tuple[str, str, torch.Tensor]) -> None:
    autoload.enable(tmp_path)
    out = run_python(
        f"""
        import site, sys
        site.addsitedir({str(tmp_path)!r})
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained({tiny[1]!r})
        print(type(model.peft_config["default"]).__name__)
        """
    )
    assert out.split() == ["SpIELConfig"]


def test_autoload_leaves_other_imports_alone(tmp_path: Path, fakes: Path) -> None:
    autoload.enable(tmp_path)
    code = f"""
        import importlib, importlib.metadata, importlib.resources, importlib.util
        site.addsitedir({str(tmp_path)!r})
        assert [getattr(f, "__name__", "") for f in sys.meta_path].count("AfterPeft") == 1
        assert importlib.util.find_spec("no_such_package") is None
        assert importlib.util.find_spec("peft").origin.endswith("__init__.py")
        assert "peft" not in sys.modules
        importlib.invalidate_caches()
        import spiel_peft  # imports peft, which must not import spiel_peft halfway through
        assert spiel_peft.seen == "ready"
        import peft
        assert importlib.resources.files("peft").joinpath("data.txt").read_text() == "data"
        assert importlib.metadata.version("pytest")
        importlib.reload(peft)
        print("done")
    """
    assert run_with_hook(tmp_path, fakes, code) == ["done"]


def test_autoload_works_after_a_first_import_that_failed(tmp_path: Path, fakes: Path) -> None:
    autoload.enable(tmp_path)
    (fakes / "peft" / "__init__.py").write_text("import sys\nstate = sys.gate")
    code = """
        try:
            import peft
        except AttributeError:
            assert "spiel_peft" not in sys.modules
        sys.gate = "open"
        import peft
        print(sys.modules["spiel_peft"].seen)
    """
    assert run_with_hook(tmp_path, fakes, code) == ["open"]


def test_autoload_is_silent_when_a_package_is_gone(tmp_path: Path, fakes: Path) -> None:
    autoload.enable(tmp_path)
    (fakes / "spiel_peft" / "__init__.py").unlink()
    (fakes / "spiel_peft").rmdir()
    # The tests' own environment may have the real package installed.
    hide = """
        class Hide:
            def find_spec(name, path=None, target=None):
                if name == HIDDEN:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(1, Hide)
        import warnings
        warnings.simplefilter("error")
    """
    code = textwrap.dedent(hide) + "import peft; print('spiel_peft' in sys.modules)"
    assert run_with_hook(tmp_path, fakes, code.replace("HIDDEN", "'spiel_peft'")) == ["False"]
    code = textwrap.dedent(hide) + "try:\n    import peft\nexcept ModuleNotFoundError as e:\n    print(e.name)"
    assert run_with_hook(tmp_path, fakes, code.replace("HIDDEN", "'peft'")) == ["peft"]


def test_autoload_warns_but_lets_peft_load_when_the_package_is_broken(tmp_path: Path, fakes: Path) -> None:
    autoload.enable(tmp_path)
    (fakes / "spiel_peft" / "__init__.py").write_text("import a_missing_dependency")
    code = f"""
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import peft
        (message,) = [str(w.message) for w in caught]
        assert "a_missing_dependency" in message and {str(tmp_path)!r} in message, message
        print(peft.state)
    """
    assert run_with_hook(tmp_path, fakes, code) == ["ready"]


def test_autoload_survives_losing_one_of_its_files(tmp_path: Path) -> None:
    hook, _ = autoload.enable(tmp_path)
    hook.unlink()
    code = f"import site, sys; sys.stderr = sys.stdout; site.addsitedir({str(tmp_path)!r}); print('up')"
    assert run_python(code).split() == ["up"]


def test_autoload_imports_nothing_else_at_startup(tmp_path: Path) -> None:
    autoload.enable(tmp_path)
    code = f"""
        import site, sys
        before = set(sys.modules)
        site.addsitedir({str(tmp_path)!r})
        print(*set(sys.modules) - before)
    """
    assert run_python(code).split() == ["_spiel_peft_autoload"]


def test_autoload_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ["--target", str(tmp_path)]
    assert autoload.main(["status", *target]) == 1
    assert "not enabled" in capsys.readouterr().out
    assert autoload.main(["enable", *target]) == 0
    assert autoload.main(["enable", *target]) == 0
    files = {tmp_path / "_spiel_peft_autoload.py", tmp_path / "_spiel_peft_autoload.pth"}
    assert set(tmp_path.iterdir()) == files
    out = capsys.readouterr().out
    assert all(out.count(f"wrote {path}\n") == 2 for path in files)
    assert autoload.main(["status", *target]) == 0
    assert "is enabled" in capsys.readouterr().out
    assert autoload.main(["disable", *target]) == 0
    assert "removed" in capsys.readouterr().out
    assert autoload.main(["disable", *target]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_autoload_command_refuses_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        autoload.main(["enable", "--target", str(tmp_path / "missing")])
    assert "--target must be an existing folder" in capsys.readouterr().err


def test_autoload_works_on_this_environment_by_default() -> None:
    assert autoload.site_packages().is_dir()
    assert str(autoload.site_packages()) in sys.path
    assert autoload.is_enabled() is False, "this environment has autoload on; tests must not leave it so"


def test_the_module_runs_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["autoload", "enable", "--target", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("spiel_peft.autoload", run_name="__main__")
    assert ended.value.code == 0
    assert autoload.is_enabled(tmp_path)
