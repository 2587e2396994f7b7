"""A damaged or hostile adapter file is refused as a whole, by tensor name, on every way of loading it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from support.adapters import PREFIX, adapted, assert_unchanged, deltas_of, key_of, layers_of, read_adapter, snapshot
from support.models import logits
from support.tensors import same_bits, texts
from torch import Tensor

from .conftest import Saved

BAD = "model.layers.1.mlp.down_proj"  # the file's other modules stay intact
NUMEL = 16 * 24
Tensors = dict[str, Tensor]


def indices_edit(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key_of(BAD, "indices"): change(tensors[key_of(BAD, "indices")].clone())})


def values_edit(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key_of(BAD, "values"): change(tensors[key_of(BAD, "values")].clone())})


def with_entry(slot: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill_(0, torch.tensor(slot % tensor.numel()), value)


DAMAGE = {
    "out of range": (indices_edit(with_entry(-1, NUMEL)), "indices' has a position out of range"),
    "far out of range": (indices_edit(with_entry(-1, 2**31 - 1)), "indices' has a position out of range"),
    "negative": (indices_edit(with_entry(0, -1)), "indices' has a negative position"),
    "unsorted": (indices_edit(lambda t: t.flip(0)), "indices' is not sorted"),
    "duplicated": (indices_edit(lambda t: torch.cat([t[:1], t[:-1]])), "indices' holds a position more than once"),
    "float": (indices_edit(Tensor.float), "indices' must have dtype torch.int32, got torch.float32"),
    "int64": (indices_edit(Tensor.long), "indices' must have dtype torch.int32, got torch.int64"),
    "two-dimensional": (indices_edit(lambda t: t[None]), "indices' must be one-dimensional"),
    "one index short": (indices_edit(lambda t: t[:-1]), "values' must have shape"),
    "no indices": (lambda ts: ts.pop(key_of(BAD, "indices")), "indices' is missing, while its values are there"),
    "one value short": (values_edit(lambda t: t[:-1]), "values' must have shape"),
    "nan": (values_edit(with_entry(3, float("nan"))), "values' has values that are not finite"),
    "inf": (values_edit(with_entry(-1, float("-inf"))), "values' has values that are not finite"),
    "integer values": (values_edit(Tensor.int), "values' must have a floating dtype, got torch.int32"),
    "another adapter's key": (
        lambda ts: ts.update({f"{PREFIX}{BAD}.spiel_delta.default.values": torch.ones(80)}),
        "values' names an adapter",
    ),
}
damages = pytest.mark.parametrize(("edit", "message"), DAMAGE.values(), ids=DAMAGE)
low_memory = pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "low_memory"])


def refused(message: str) -> pytest.RaisesExc:
    module = "" if "names an adapter" in message else rf"{BAD}\.spiel_delta\."
    return pytest.raises(ValueError, match=rf"refused, nothing was loaded: tensor '.*{module}.*{message}")


@damages
@low_memory
def test_from_pretrained_refuses_it(damaged, saved: Saved, edit, message: str, low_cpu_mem_usage: bool) -> None:
    base = saved.load_base()
    before = snapshot(base)
    with refused(message):
        PeftModel.from_pretrained(base, damaged(edit), low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(base, before)
    assert not layers_of(base)


@damages
@low_memory
def test_an_existing_adapter_stays_as_it_was(
    damaged, saved: Saved, edit, message: str, low_cpu_mem_usage: bool
) -> None:
    model = adapted(saved.load_base(), seed=9)
    before = snapshot(model)
    with refused(message):
        model.load_adapter(damaged(edit), "default", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


@damages
@low_memory
def test_a_half_added_adapter_does_not_remain(
    damaged, saved: Saved, edit, message: str, low_cpu_mem_usage: bool
) -> None:
    """The file also has modules that the existing adapter lacks: their new layers are removed again."""
    model = adapted(saved.load_base(), seed=9, target_modules=["q_proj", "v_proj"])
    before, grads = snapshot(model), {n: p.requires_grad for n, p in model.named_parameters()}
    with refused(message):
        model.load_adapter(damaged(edit), "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(model, before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert list(model.peft_config) == ["default"] == list(model.active_adapters)
    model.load_adapter(saved.adapter, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert same_bits(logits(model), saved.logits)


@damages
def test_set_peft_model_state_dict_refuses_it(damaged, saved: Saved, edit, message: str) -> None:
    model = adapted(saved.load_base(), seed=9)
    before = snapshot(model)
    with refused(message):
        set_peft_model_state_dict(model, read_adapter(damaged(edit)))
    assert_unchanged(model, before)


# transformers' loader converts dtypes before it assigns tensors, and reports shapes itself.
BY_TRANSFORMERS = [name for name in DAMAGE if name != "int64"]


@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_load_adapter_of_transformers_refuses_it(damaged, saved: Saved, name: str) -> None:
    edit, message = DAMAGE[name]
    by_shape = name == "one value short"
    if name in ("two-dimensional", "one index short"):
        message = "indices' is missing, or of another length"
    if name == "float":
        message = "indices' must have an integer dtype, got torch.float32"
    if name == "integer values":
        message = "values' must have a floating dtype, got torch.int32"
    if name == "another adapter's key":
        message = f"config does not announce 1 of its tensors.*{BAD}.spiel_delta.default.values"
    model = saved.load_base()
    model.load_adapter(saved.adapter, adapter_name="default")
    before = snapshot(model)
    with pytest.raises(RuntimeError if by_shape else ValueError, match="mismatch" if by_shape else message):
        model.load_adapter(damaged(edit), adapter_name="bad")
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"] == list(model.active_adapters())
    assert same_bits(logits(model), saved.logits)
    model.load_adapter(saved.adapter, adapter_name="bad")
    model.set_adapter("bad")
    assert same_bits(logits(model), saved.logits)


@damages
def test_plain_load_state_dict_leaves_the_bad_module_alone(damaged, saved: Saved, edit, message: str) -> None:
    model = adapted(saved.load_base(), seed=9)
    tensors = {
        key.replace(".spiel_delta.", ".spiel_delta.default."): tensor
        for key, tensor in read_adapter(damaged(edit)).items()
        if not key.endswith("default.values")
    }
    if "names an adapter" in message:
        tensors[f"{PREFIX}{BAD}.spiel_delta.default.values"] = torch.full((80,), float("nan"))
    before = snapshot(deltas_of(model)[BAD])
    with pytest.raises(RuntimeError, match=rf"{BAD}\.spiel_delta\.default\.(indices|values)"):
        model.load_state_dict(tensors, strict=False)
    assert_unchanged(deltas_of(model)[BAD], before)


# --- another budget ---


def longer(tensors: Tensors) -> None:
    """A sound pair of tensors, with more deltas than the config says."""
    tensors[key_of(BAD, "indices")] = torch.arange(NUMEL, dtype=torch.int32)
    tensors[key_of(BAD, "values")] = torch.ones(NUMEL)


@low_memory
def test_another_budget_is_a_size_mismatch(damaged, saved: Saved, low_cpu_mem_usage: bool) -> None:
    folder = damaged(longer)
    with pytest.raises(RuntimeError, match=f"size mismatch for .*{BAD}"):
        PeftModel.from_pretrained(saved.load_base(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    model = adapted(saved.load_base(), seed=9, target_modules=["q_proj"])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=f"size mismatch for .*{BAD}"):
        model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    own = adapted(saved.load_base(), seed=9)
    before = snapshot(own)
    with pytest.raises(RuntimeError, match="size mismatch"):
        own.load_adapter(folder, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(own, read_adapter(folder))
    state = deltas_of(own)[BAD].state
    live = {k.replace(".spiel_delta.", ".spiel_delta.default."): t for k, t in read_adapter(folder).items() if BAD in k}
    with pytest.raises(RuntimeError, match="size mismatch"):
        own.load_state_dict(live, strict=False)
    assert deltas_of(own)[BAD].state is state
    assert_unchanged(own, before)
    own.load_state_dict(before)  # the check has left nothing behind


def test_a_size_mismatch_of_another_module_changes_nothing_either(damaged, saved: Saved) -> None:
    model = adapted(saved.load_base(), seed=9, modules_to_save=["lm_head"])
    before = snapshot(model)
    folder = damaged(lambda tensors: tensors.update({f"{PREFIX}lm_head.weight": torch.zeros(3, 16)}))
    with pytest.raises(RuntimeError, match="size mismatch for .*lm_head"):
        model.load_adapter(folder, "default")
    assert_unchanged(model, before)


def test_ignore_mismatched_sizes_loads_the_rest(damaged, saved: Saved) -> None:
    model = adapted(saved.load_base(), seed=9)
    before = snapshot(deltas_of(model)[BAD])
    with pytest.warns(UserWarning) as record:
        model.load_adapter(damaged(longer), "default", ignore_mismatched_sizes=True)
    assert f"{BAD}.spiel_delta.default.values" in texts(record)
    assert_unchanged(deltas_of(model)[BAD], before)
    good = read_adapter(saved.adapter)
    for module, delta in deltas_of(model).items():
        assert same_bits(delta.values.detach(), good[key_of(module, "values")]) == (module != BAD)


def test_ignore_mismatched_sizes_does_not_let_damage_through(damaged, saved: Saved) -> None:
    model = adapted(saved.load_base(), seed=9)
    before = snapshot(model)
    with refused(DAMAGE["negative"][1]):
        model.load_adapter(damaged(DAMAGE["negative"][0]), "default", ignore_mismatched_sizes=True)
    assert_unchanged(model, before)


def drop_module(tensors: Tensors) -> None:
    for key in [key for key in tensors if BAD in key]:
        del tensors[key]


def drop_values(tensors: Tensors) -> None:
    del tensors[key_of(BAD, "values")]


@pytest.mark.parametrize("edit", [drop_module, drop_values])
def test_missing_values_are_reported_as_peft_does(damaged, saved: Saved, edit: Callable[[Tensors], None]) -> None:
    """A module without values in the file stays as it is: new indices do not belong to its old values."""
    folder = damaged(edit)
    with pytest.warns(UserWarning, match="Found missing adapter keys") as record:
        PeftModel.from_pretrained(saved.load_base(), folder)
    assert all(f"{BAD}.spiel_delta.default.{name}" in texts(record) for name in ("values", "indices"))
    model = adapted(saved.load_base(), seed=9)
    before = snapshot(deltas_of(model)[BAD])
    missing = model.load_adapter(folder, "default").missing_keys
    assert {key.rpartition(".")[2] for key in missing if BAD in key} == {"values", "indices"}
    assert_unchanged(deltas_of(model)[BAD], before)


def test_plain_load_state_dict_takes_no_indices_without_values(saved: Saved) -> None:
    model = adapted(saved.load_base(), seed=9)
    before = snapshot(model)
    key = f"{PREFIX}{BAD}.spiel_delta.default.indices"
    with pytest.raises(RuntimeError, match=f"{BAD}.spiel_delta.default.values is missing, while its indices"):
        model.load_state_dict({key: torch.arange(80, dtype=torch.int32)}, strict=False)
    assert_unchanged(model, before)
