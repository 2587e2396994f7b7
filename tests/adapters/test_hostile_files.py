"""Files that are made to hang or to fill the memory are refused within seconds, by a field, a tensor or a file."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from support.adapters import FILE, PREFIX, adapted, assert_unchanged, key_of, layers_of, read_adapter, snapshot
from support.models import logits, tiny_llama
from support.tensors import same_bits
from torch import Tensor

from spiel_peft import SpIELConfig, validate_adapter
from spiel_peft.files.adapter_file import read_adapter as read_whole

from .conftest import Saved

CONFIG = "adapter_config.json"
READERS: dict[str, Callable[[Path], object]] = {
    "from_pretrained": lambda folder: PeftModel.from_pretrained(tiny_llama(), folder),
    "transformers": lambda folder: tiny_llama().load_adapter(folder),
    "read_adapter": read_whole,
}
readers = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved.adapter, tmp_path / "hostile"))


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


@contextmanager
def soon(seconds: float = 5.0) -> Iterator[None]:
    """Slow machines get more than the two seconds that this takes at most."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# --- configs ---

TEXTS = {
    "deep": ('{"a": ' + "[" * 200_000, "nested too deep"),
    "a list": ("[1, 2]", "not a JSON object"),
    "cut off": ('{"peft_type": "SPIEL"', "cannot be read"),
    "a number of 5000 digits": ('{"peft_type": "SPIEL", "r": ' + "9" * 5000 + "}", "cannot be read"),
    "large": ('{"a": "' + "x" * (5 << 20) + '"}', "bytes, more than"),
    "an argument of PEFT's methods": ('{"peft_type": "SPIEL", "self": 1}', "has the field 'self'"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
@readers
def test_configs_that_are_no_configs(folder: Path, read, text: str, message: str) -> None:
    (folder / CONFIG).write_text(text)
    with (
        soon(),
        pytest.raises(ValueError, match=rf"{CONFIG} .*{message}"),
    ):
        read(folder)
    assert message in str(validate_adapter(folder)[0])


FIELDS: dict[str, dict[str, Any]] = {
    "regrow_every": {"regrow_every": 2**63},
    "total_steps": {"total_steps": 2**70},
    "seed": {"seed": 2**64},
    "r": {"r": 2**63},
    "rank_pattern": {"rank_pattern": {"q_proj": 2**80}},
    "base_model_name_or_path": {"base_model_name_or_path": {"a": [1]}},
    "revision": {"revision": 3},
    "task_type": {"task_type": ["CAUSAL_LM"]},
    "inference_mode": {"inference_mode": "yes"},
    "auto_mapping": {"auto_mapping": 5},
    "modules_to_save": {"modules_to_save": ["lm_head("]},
    "target_modules": {"target_modules": "(" * 20_000 + ")" * 20_000},
    "layers_to_transform": {"layers_to_transform": [2**63]},
    "trainable_token_indices": {"trainable_token_indices": [2**63]},
    "density_pattern": {"density_pattern": {f"a{number}.*": 0.1 for number in range(2000)}},
    "exclude_modules": {"exclude_modules": [f"a{number}" for number in range(200_000)]},
}


@pytest.mark.parametrize(("field", "change"), FIELDS.items(), ids=FIELDS)
def test_fields_of_absurd_values(folder: Path, field: str, change: dict[str, Any]) -> None:
    edit_config(folder, **change)
    with soon(), pytest.raises(ValueError, match=f"`{field}"):
        PeftModel.from_pretrained(tiny_llama(), folder)
    with pytest.raises(ValueError, match=f"{CONFIG} cannot be read as an adapter's config: .*`{field}"):
        read_whole(folder)


@pytest.mark.parametrize("value", [2**63, 2**100])
def test_integers_that_cannot_be_saved(value: int) -> None:
    for field in ("r", "num_deltas", "regrow_every", "accumulation_steps", "total_steps", "seed"):
        with pytest.raises(ValueError, match=rf"`{field}` must be at most 2\*\*63 - 1"):
            SpIELConfig(**{field: value})
    assert SpIELConfig(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(ValueError, match="`seed` must be at most .*got int that is too large to show"):
        SpIELConfig(seed=10**6000)


# Expressions that backtrack for ever on a name that they do not match.
PATTERNS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": r"(([a-z_.0-9]+)+)+!"},
    "exclude_modules": {"exclude_modules": r"(.|.)*!"},
    "rank_pattern": {"rank_pattern": {r"(.*)*(.*)*(.*)*!": 4}},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": [r"((.|.)*)*!"]},
    "modules_to_save": {"modules_to_save": [r"(.|.)*!"]},
}


@pytest.mark.parametrize(("field", "change"), PATTERNS.items(), ids=PATTERNS)
def test_regexes_that_backtrack_for_ever(folder: Path, field: str, change: dict[str, Any]) -> None:
    edit_config(folder, **change)
    model = tiny_llama()
    for load in (lambda: PeftModel.from_pretrained(model, folder), lambda: model.load_adapter(folder)):
        with soon(), pytest.raises(ValueError, match=f"`{field}` must be a regular expression that can be matched"):
            load()
    assert not layers_of(model)
    with soon():
        assert f"`{field}` must be a regular expression" in str(validate_adapter(folder)[-1])


def test_common_regexes_from_files_are_matched(folder: Path) -> None:
    edit_config(folder, target_modules=r"(.*\.)?layers\.\d+\.((self_attn\.q_proj)|(mlp\.(down)_proj))$", seed=3)
    assert len(layers_of(PeftModel.from_pretrained(tiny_llama(), folder))) == 4


@pytest.mark.parametrize("change", [{"r": 2**60}, {"r": None, "density": 1.0}, {"r": None, "num_deltas": 2**60}])
def test_budgets_that_the_file_is_too_small_for(folder: Path, change: dict[str, Any]) -> None:
    """Nothing is made for them: on a large model, they would be larger than the model."""
    edit_config(folder, **change)
    wide = tiny_llama(hidden_size=512, intermediate_size=4096)
    before = snapshot(wide)
    field = next(name for name, value in change.items() if value is not None)
    for load in (lambda: PeftModel.from_pretrained(wide, folder), lambda: wide.load_adapter(folder)):
        tracemalloc.start()
        with soon(), pytest.raises(ValueError, match=rf"adapter_config.json asks for \d+ deltas in 4 .*`{field}`"):
            load()
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()
    assert_unchanged(wide, before)


@pytest.mark.parametrize("name", ["regrow_evry", "Density", "num_delta"])
def test_unknown_fields_suggest_a_name(folder: Path, name: str) -> None:
    known = {"regrow_evry": "regrow_every", "Density": "density", "num_delta": "num_deltas"}[name]
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'. Did you mean `{known}`"):
        SpIELConfig(**{name: 3})
    edit_config(folder, **{name: 3})
    with pytest.warns(UserWarning, match=f"unknown field `'{name}'`.*Did you mean `{known}`"):
        config = PeftConfig.from_pretrained(folder)
    assert config.r == 2
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzzzzz'\.$"):
        SpIELConfig(zzzzzz=1)


# --- .bin files ---

BAD = "model.layers.1.mlp.down_proj"


def as_bin(folder: Path, edit: Callable[[dict[str, Any]], object], zipped: bool = True) -> Path:
    tensors: dict[str, Any] = read_adapter(folder)
    edit(tensors)
    (folder / FILE).unlink()
    path = folder / "adapter_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return path


def expanded(dtype: torch.dtype, size: int = 2**40) -> Tensor:
    return torch.ones(1, dtype=dtype).expand(size)


BINS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "expanded values": (
        lambda ts: ts.update({key_of(BAD, "values"): expanded(torch.float32)}),
        rf"tensor '.*{BAD}.spiel_delta.values' has {2**40} entries",
    ),
    "expanded indices": (
        lambda ts: ts.update({key_of(BAD, "indices"): expanded(torch.int32)}),
        rf"tensor '.*{BAD}.spiel_delta.indices' has {2**40} entries",
    ),
    "an expanded head": (
        lambda ts: ts.update({f"{PREFIX}lm_head.weight": expanded(torch.float32)}),
        "lm_head.weight' has",
    ),
    "a sparse tensor": (
        lambda ts: ts.update({key_of(BAD, "values"): torch.sparse_coo_tensor([[3]], [1.0], (2**40,))}),
        "values' is not a plain dense tensor",
    ),
    "no tensor": (lambda ts: ts.update(r=3), "is not a dict of tensors"),
    "a number as a name": (lambda ts: ts.update({3: torch.ones(1)}), "is not a dict of tensors"),
}


@pytest.mark.parametrize(("edit", "message"), BINS.values(), ids=BINS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@readers
def test_bin_files_larger_than_themselves(folder: Path, read, edit, message: str, zipped: bool) -> None:
    as_bin(folder, edit, zipped)
    with soon(), pytest.raises(ValueError, match=f"adapter_model.bin.*{message}"):
        read(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_sound_bin_files_are_read(saved: Saved, folder: Path, zipped: bool) -> None:
    as_bin(folder, lambda tensors: None, zipped)
    assert validate_adapter(folder) == []
    assert read_whole(folder).deltas.keys() == read_whole(saved.adapter).deltas.keys()
    assert same_bits(logits(PeftModel.from_pretrained(saved.load_base(), folder)), saved.logits)
    model = saved.load_base()
    model.load_adapter(folder, use_safetensors=False)
    assert same_bits(logits(model), saved.logits)


def test_bin_files_that_were_packed(folder: Path) -> None:
    """A packed zip file of zeros is much smaller than what it holds."""
    path = as_bin(folder, lambda ts: ts.update({key_of(BAD, "values"): torch.zeros(10_000_000)}))
    with zipfile.ZipFile(path) as source:
        content = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in content.items():
            packed.writestr(name, data)
    for read in READERS.values():
        with soon(), pytest.raises(ValueError, match="adapter_model.bin"):
            read(folder)


def test_bin_files_that_make_other_objects(folder: Path) -> None:
    path = as_bin(folder, lambda ts: None)
    with zipfile.ZipFile(path) as source:
        content = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w") as made:
        for name, data in content.items():
            huge = b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."  # 2 GiB of zeros
            made.writestr(name, huge if name.endswith("data.pkl") else data)
    for read in READERS.values():
        with soon(), pytest.raises(ValueError, match="adapter_model.bin.*other objects than tensors"):
            read(folder)


def test_bin_files_whose_tensors_share_memory(folder: Path) -> None:
    """Each of them fits into the file, but not all of them together."""
    values, indices = torch.zeros(1 << 16), torch.arange(1 << 16, dtype=torch.int32)
    names = [f"model.layers.{number}.mlp.down_proj" for number in range(200)]
    shared = {key_of(name, "values"): values for name in names} | {key_of(name, "indices"): indices for name in names}
    as_bin(folder, lambda ts: ts.update(shared))
    for read in READERS.values():
        with soon(), pytest.raises(ValueError, match="adapter_model.bin.*share memory"):
            read(folder)


def test_expanded_tensors_in_memory(saved: Saved) -> None:
    model = adapted(saved.load_base(), seed=9)
    before = snapshot(model)
    for name, dtype in (("values", torch.float32), ("indices", torch.int32)):
        tensors = {**read_adapter(saved.adapter), key_of(BAD, name): expanded(dtype)}
        with soon(), pytest.raises((ValueError, RuntimeError), match=f"{BAD}.spiel_delta.*{name}"):
            set_peft_model_state_dict(model, tensors)
        assert_unchanged(model, before)
