"""An adapter is loaded whole or not at all, whatever goes wrong, and overwrites only what its config names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.utils.save_and_load
import pytest
import torch
import transformers.modeling_utils
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from support.adapters import (
    FILE,
    PREFIX,
    adapted,
    assert_unchanged,
    deltas_of,
    edit_adapter,
    layers_of,
    read_adapter,
    snapshot,
    spiel_config,
)
from support.models import logits, tiny_llama
from support.tensors import same_bits
from torch import Tensor, nn

from spiel_peft import validate_adapter
from spiel_peft.delta import SparseDelta

from .conftest import Saved


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a failed load must not change, apart from the tensors."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "grads": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "adapters": sorted(getattr(model, "peft_config", {})),
        "active": [layer.active_adapters for layer in layers_of(model)],
    }


@contextmanager
def refused_and_unchanged(model: nn.Module, error: type[BaseException], message: str = "") -> Iterator[None]:
    """The block raises this error, and leaves the model as it was."""
    before, state = snapshot(model), state_of(model)
    with pytest.raises(error, match=message):
        yield
    assert_unchanged(model, before)
    assert state_of(model) == state


def by_from_pretrained(model: nn.Module, folder: Path, **kwargs: Any) -> object:
    return PeftModel.from_pretrained(model, folder, **kwargs)


def by_load_adapter(model: nn.Module, folder: Path, **kwargs: Any) -> object:
    return model.load_adapter(folder, adapter_name="second", **kwargs)


LOADERS: dict[str, tuple[Callable[[Saved], nn.Module], Callable[..., object]]] = {
    "from_pretrained": (lambda saved: saved.load_base().train(), by_from_pretrained),
    "load_adapter": (lambda saved: adapted(saved.load_base(), target_modules=["q_proj"]).train(), by_load_adapter),
    "transformers": (lambda saved: saved.load_base().train(), by_load_adapter),
}
loaders = pytest.mark.parametrize(("make", "load"), LOADERS.values(), ids=LOADERS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
@loaders
def test_errors_while_the_file_is_read(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, make, load, error: type[BaseException]
) -> None:
    model = make(saved)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("in the middle of reading")

    with monkeypatch.context() as patch:
        patch.setattr(peft.utils.save_and_load, "safe_load_file", fail)
        patch.setattr(transformers.modeling_utils, "convert_and_load_state_dict_in_model", fail)
        with refused_and_unchanged(model, error, "in the middle of reading"):
            load(model, saved.adapter)
    result = load(model, saved.adapter)  # the name is free again
    model = result if isinstance(result, nn.Module) else model
    if len(model.peft_config) > 1:
        model.set_adapter("second")
    assert same_bits(logits(model), saved.logits)


@loaders
def test_interrupts_while_tensors_are_copied(saved: Saved, monkeypatch: pytest.MonkeyPatch, make, load) -> None:
    """Ctrl-C at the third tensor: the first two are taken back."""
    model = make(saved)
    calls = [0]

    def interrupted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == 3:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("_load_from_state_dict", "_check_assigned"):
            patch.setattr(SparseDelta, name, interrupted(getattr(SparseDelta, name)))
        with refused_and_unchanged(model, KeyboardInterrupt):
            load(model, saved.adapter)
    assert calls == [3]


def test_an_adapter_that_is_loaded_again_keeps_its_deltas(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(saved.load_base(), seed=9)
    states = {name: delta.state for name, delta in deltas_of(model).items()}
    original, last = SparseDelta._load_from_state_dict, list(deltas_of(model).values())[-1]

    def interrupted(delta: SparseDelta, *args: Any) -> None:
        original(delta, *args)
        if delta is last:
            raise KeyboardInterrupt

    monkeypatch.setattr(SparseDelta, "_load_from_state_dict", interrupted)
    for load in (
        lambda: model.load_adapter(saved.adapter, "default"),
        lambda: set_peft_model_state_dict(model, read_adapter(saved.adapter)),
        lambda: set_peft_model_state_dict(model, read_adapter(saved.adapter), low_cpu_mem_usage=True),
    ):
        with refused_and_unchanged(model, KeyboardInterrupt):
            load()
        assert all(delta.state is states[name] for name, delta in deltas_of(model).items())


@loaders
def test_files_that_are_cut_off(saved: Saved, tmp_path: Path, make, load) -> None:
    folder = Path(shutil.copytree(saved.adapter, tmp_path / "cut"))
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) * 2 // 3])
    model = make(saved)
    with refused_and_unchanged(model, ValueError, f"{FILE} cannot be read, it is damaged or incomplete"):
        load(model, folder)


# --- what a file may hold ---

UNANNOUNCED = {
    "an embedding": "model.embed_tokens.weight",
    "a weight": "model.layers.0.self_attn.k_proj.weight",
    "the weight of an adapted layer": "model.layers.0.self_attn.q_proj.base_layer.weight",
    "a norm": "model.norm.weight",
    "a delta's unknown tensor": "model.layers.0.self_attn.q_proj.spiel_delta.spiel_extra",
    "another adapter's head": "lm_head.modules_to_save.default.weight",
    "the head's original": "lm_head.original_module.weight",
    "trained tokens": "model.embed_tokens.token_adapter.trainable_tokens_delta",
}


@pytest.mark.parametrize("key", UNANNOUNCED.values(), ids=UNANNOUNCED)
@loaders
def test_tensors_that_the_config_does_not_announce(saved: Saved, damaged, make, load, key: str) -> None:
    folder = damaged(lambda tensors: tensors.update({f"{PREFIX}{key}": torch.zeros(40, 16)}))
    model = make(saved)
    with refused_and_unchanged(model, ValueError, f"does not announce 1 of its tensors.*'{key}'"):
        load(model, folder)
    assert key in [finding.tensor for finding in validate_adapter(folder, saved.base)]


def test_a_head_is_not_written_by_another_adapters_file(saved: Saved, tmp_path: Path) -> None:
    """Announced are the modules of `modules_to_save`, not PEFT's wrappers of them."""
    adapted(saved.load_base(), modules_to_save=["lm_head"]).save_pretrained(tmp_path / "good")
    for key in ("lm_head.original_module.weight", "lm_head.modules_to_save.default.weight"):
        folder = shutil.copytree(tmp_path / "good", tmp_path / key)
        edit_adapter(folder, lambda tensors, key=key: tensors.update({PREFIX + key: torch.zeros(40, 16)}))
        model = adapted(saved.load_base(), modules_to_save=["lm_head"])
        with refused_and_unchanged(model, ValueError, f"'{key}'"):
            model.load_adapter(folder, "second")
        assert [finding.tensor for finding in validate_adapter(folder)] == [key]
    model.load_adapter(tmp_path / "good", "second")


ANNOUNCED: dict[str, dict[str, Any]] = {
    "all biases": {"bias": "all"},
    "biases of adapted modules": {"bias": "spiel_only"},
    "a head": {"modules_to_save": ["lm_head"]},
    "trained tokens": {"trainable_token_indices": [1, 2]},
    "an adapted embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "an adapted head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("embeddings", ["auto", True])
@pytest.mark.parametrize("fields", ANNOUNCED.values(), ids=ANNOUNCED)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_saves_is_announced(tmp_path: Path, fields: dict[str, Any], embeddings: Any, tied: bool) -> None:
    base = tiny_llama(attention_bias=True, tied=tied)
    model = adapted(base, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    again = PeftModel.from_pretrained(tiny_llama(attention_bias=True, tied=tied), tmp_path)
    assert same_bits(logits(again), logits(model))
    assert validate_adapter(tmp_path) == []


# --- values in the dtype that they get ---


def too_large(tensors: dict[str, Tensor], ends: str, dtype: torch.dtype, value: float) -> None:
    for key in [key for key in tensors if key.endswith(ends)]:
        tensors[key] = torch.full_like(tensors[key], value, dtype=dtype)


OVERFLOWS = {
    "float64 into float32": (torch.float32, {}, {}, torch.float64, 1e300),
    "float32 into bfloat16": (torch.bfloat16, {"delta_dtype": "bfloat16"}, {}, torch.float32, 3.4e38),
    "float32 into float16": (torch.float16, {"delta_dtype": "float16"}, {}, torch.float32, 1e5),
    "the base's float16": (torch.float16, {}, {"autocast_adapter_dtype": False}, torch.float32, 1e5),
}


@pytest.mark.parametrize("low_memory", [False, True], ids=["plain", "low_memory"])
@pytest.mark.parametrize(("base", "fields", "kwargs", "stored", "value"), OVERFLOWS.values(), ids=OVERFLOWS)
def test_deltas_that_overflow(tmp_path: Path, base, fields, kwargs, stored, value: float, low_memory: bool) -> None:
    adapted(tiny_llama(dtype=base), **fields).save_pretrained(tmp_path)
    edit_adapter(tmp_path, lambda tensors: too_large(tensors, "values", stored, value))
    message = "spiel_delta.values' (has values that are too large for|is not finite in)"
    model = tiny_llama(dtype=base)
    with refused_and_unchanged(model, ValueError, message):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_memory, **kwargs)
    model = adapted(tiny_llama(dtype=base), **fields)
    with refused_and_unchanged(model, ValueError, message):
        model.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_memory, **kwargs)


@pytest.mark.parametrize(("stored", "value"), [(torch.float64, 1e300), (torch.float32, float("nan"))])
def test_heads_that_are_not_finite(tmp_path: Path, stored: torch.dtype, value: float) -> None:
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    edit_adapter(tmp_path, lambda tensors: too_large(tensors, "lm_head.weight", stored, value))
    model = tiny_llama()
    with refused_and_unchanged(model, ValueError, "lm_head"):
        PeftModel.from_pretrained(model, tmp_path)
    before = snapshot(model)
    try:
        model.load_adapter(tmp_path)
    except ValueError as error:
        assert "lm_head" in str(error)
        assert_unchanged(model, before)
    else:  # transformers 5.0 leaves out the heads in an adapter file
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        model = tiny_llama()
    live = get_peft_model(model, spiel_config(modules_to_save=["lm_head"]))
    key = f"{PREFIX}lm_head.modules_to_save.default.weight"
    bad = {**snapshot(live), key: torch.full((40, 16), value, dtype=stored)}
    with refused_and_unchanged(live, RuntimeError, f"{key} has values that are"):
        live.load_state_dict(bad)


def test_deltas_of_modules_that_the_adapter_lacks(saved: Saved) -> None:
    """Part of an adapter must not be left out without a word."""
    model = adapted(saved.load_base(), target_modules=["q_proj"])
    with pytest.raises(ValueError, match="modules which this adapter lacks .*down_proj"):
        set_peft_model_state_dict(model, read_adapter(saved.adapter))


def test_indices_without_values(damaged, saved: Saved) -> None:
    """PEFT leaves such a module out and says so; transformers would give it these positions without a word."""
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.spiel_delta.values"
    model = saved.load_base()
    with refused_and_unchanged(model, ValueError, "values' is missing, while its indices are there"):
        model.load_adapter(damaged(lambda tensors: tensors.pop(key)))


@loaders
def test_names_of_the_file_that_are_no_file(saved: Saved, tmp_path: Path, make, load) -> None:
    """A pipe would be read for ever."""
    for number, make_it in enumerate((Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"))):
        folder = Path(shutil.copytree(saved.adapter, tmp_path / str(number)))
        (folder / FILE).unlink()
        make_it(folder / FILE)
        model = make(saved)
        with refused_and_unchanged(model, ValueError, f"{FILE} is not a file"):
            load(model, folder)
        assert "is not a file" in str(validate_adapter(folder)[0])


def test_trained_tokens_that_the_file_lacks(saved: Saved, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved.adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": [1]}))
    model = saved.load_base()
    with refused_and_unchanged(model, ValueError, "trainable_tokens_delta' is missing"):
        PeftModel.from_pretrained(model, folder)
