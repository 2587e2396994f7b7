"""Registration with PEFT, and the opt-in that makes `import peft` do it."""

from __future__ import annotations

import copy
import enum
import json
import os
import pickle
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
    """Take back what a test does to PEFT's tables."""
    before = [dict(mapping) for mapping in MAPPINGS]
    yield
    for mapping, entries in zip(MAPPINGS, before, strict=True):
        mapping.clear()
        mapping.update(entries)


def run_python(code: str, *, paths: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> str:
    """The output of `code` in a fresh interpreter that sees this checkout and `paths`."""
    root = Path(spiel_peft.__file__).parents[1]
    search = [*paths, str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        env=env,
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
    registration.register()
    registration.register()
    assert ([dict(mapping) for mapping in MAPPINGS], list(PeftType)) == before


def test_threads_register_once(mappings: None) -> None:
    for mapping in MAPPINGS:
        del mapping["SPIEL"]
    barrier, errors = threading.Barrier(16), []

    def work() -> None:
        barrier.wait()
        try:
            registration.register()
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
        importlib.reload(spiel_peft.registration).register()
        importlib.reload(spiel_peft)
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
        registration.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPIEL"] is peft.LoraConfig


def test_another_spiel_model_is_not_overwritten(mappings: None) -> None:
    del PEFT_TYPE_TO_CONFIG_MAPPING["SPIEL"]
    PEFT_TYPE_TO_TUNER_MAPPING["SPIEL"] = peft.LoraModel
    with pytest.raises(RuntimeError, match="'SPIEL'.*LoraModel"):
        registration.register()
    assert "SPIEL" not in PEFT_TYPE_TO_CONFIG_MAPPING


def test_another_owner_of_the_prefix_is_named(mappings: None) -> None:
    for mapping in MAPPINGS:
        del mapping["SPIEL"]
    PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] = "spiel_"
    with pytest.raises(RuntimeError, match="prefix 'spiel_'.*'LORA'"):
        registration.register()
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

PROBE = """
    import site, sys
    site.addsitedir({target!r})
    before = "spiel_peft" in sys.modules or "peft" in sys.modules
    import peft
    print(before, "SPIEL" in peft.PeftType.__members__, "spiel_peft" in sys.modules)
"""


def probe(target: Path, *, paths: tuple[str, ...] = ()) -> list[str]:
    """Whether peft or the package was imported at startup; whether SPIEL is known, the package imported later."""
    return run_python(PROBE.format(target=str(target)), paths=paths).split()


def broken_package(folder: Path, source: str) -> tuple[str, ...]:
    """A search path on which `spiel_peft` is a package with `source` in it."""
    (folder / "spiel_peft").mkdir(parents=True)
    (folder / "spiel_peft" / "__init__.py").write_text(source)
    return (str(folder),)


def test_without_autoload_peft_does_not_import_the_package(tmp_path: Path) -> None:
    assert probe(tmp_path) == ["False", "False", "False"]


def test_autoload_imports_the_package_right_after_peft(tmp_path: Path) -> None:
    autoload.enable(tmp_path)
    assert probe(tmp_path) == ["False", "True", "True"]
    autoload.disable(tmp_path)
    assert list(tmp_path.glob("*.p*")) == []


def test_autoload_loads_an_adapter_in_a_program_that_knows_only_peft(
    tmp_path: Path, tiny: tuple[str, str, torch.Tensor]
) -> None:
    autoload.enable(tmp_path)
    out = run_python(
        f"""
        import site
        site.addsitedir({str(tmp_path)!r})
        import torch
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained({tiny[1]!r}).eval()
        print(type(model.peft_config["default"]).__name__)
        """
    )
    assert out.split() == ["SpIELConfig"]


def test_autoload_leaves_every_way_of_importing_alone(tmp_path: Path) -> None:
    autoload.enable(tmp_path)
    out = run_python(
        f"""
        import importlib, importlib.metadata, importlib.resources, importlib.util, site, sys
        site.addsitedir({str(tmp_path)!r})
        site.addsitedir({str(tmp_path)!r})
        assert [getattr(f, "__name__", "") for f in sys.meta_path].count("AfterPeft") == 1
        assert importlib.util.find_spec("no_such_package") is None
        assert importlib.util.find_spec("peft").origin.endswith("__init__.py")
        assert "peft" not in sys.modules
        importlib.invalidate_caches()
        import spiel_peft  # imports peft, which must not import spiel_peft halfway through
        import peft
        assert spiel_peft.SpIELConfig().peft_type is peft.PeftType.SPIEL
        assert importlib.resources.files("peft").joinpath("py.typed").is_file()
        assert importlib.metadata.version("peft") == peft.__version__
        importlib.reload(peft)
        print("done")
        """
    )
    assert out.split() == ["done"]


def test_autoload_is_silent_when_the_package_is_gone(tmp_path: Path) -> None:
    autoload.enable(tmp_path)
    code = f"""
        import site, sys
        site.addsitedir({str(tmp_path)!r})
        class Hide:
            def find_spec(name, path=None, target=None):
                if name == "spiel_peft":
                    raise ModuleNotFoundError("No module named 'spiel_peft'", name=name)
        sys.meta_path.insert(0, Hide)
        import peft
        print("SPIEL" in peft.PeftType.__members__)
    """
    assert run_python(code, flags=("-W", "error:spiel_peft")).split() == ["False"]


def test_autoload_warns_but_lets_peft_load_when_the_package_is_broken(tmp_path: Path) -> None:
    autoload.enable(tmp_path)
    paths = broken_package(tmp_path / "broken", "import a_missing_dependency")
    out = run_python(
        f"""
        import site, warnings
        site.addsitedir({str(tmp_path)!r})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import peft
        found = [str(w.message) for w in caught if "spiel_peft" in str(w.message)]
        assert len(found) == 1 and "a_missing_dependency" in found[0] and {str(tmp_path)!r} in found[0], found
        print(peft.LoraConfig.__name__)
        """,
        paths=paths,
    )
    assert out.split() == ["LoraConfig"]


def test_autoload_survives_losing_one_of_its_files(tmp_path: Path) -> None:
    hook, _ = autoload.enable(tmp_path)
    hook.unlink()
    code = f"import site; site.addsitedir({str(tmp_path)!r}); print('up')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["up"], "")


def test_autoload_files_import_nothing_heavy_at_startup(tmp_path: Path) -> None:
    autoload.enable(tmp_path)
    code = f"""
        import site, sys
        before = set(sys.modules)
        site.addsitedir({str(tmp_path)!r})
        print(*set(sys.modules) - before)
    """
    code = textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["_spiel_peft_autoload"]


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


def test_autoload_command_refuses_a_missing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        autoload.main(["enable", "--target", str(tmp_path / "missing")])
    assert "--target must be an existing folder" in capsys.readouterr().err


def test_autoload_works_on_this_environment_by_default() -> None:
    assert autoload.site_packages().is_dir()
    assert str(autoload.site_packages()) in sys.path
    assert autoload.is_enabled() is False, "this environment has autoload on; tests must not leave it so"


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    code = f"""
        import runpy, sys
        sys.argv = ["autoload", "enable", "--target", {str(tmp_path)!r}]
        try:
            runpy.run_module("spiel_peft.autoload", run_name="__main__")
        except SystemExit as exit:
            assert exit.code == 0
    """
    assert run_python(code).count("wrote") == 2
    assert autoload.is_enabled(tmp_path)
