"""Deltas are in a base weight for the length of one operation: nothing that runs before or after it sees them."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.layers import HALF_AND_FULL, Single, spiel_layer, transposed, values_of
from support.models import tiny_llama
from support.tensors import assert_same_bits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spiel_kernels import apply_deltas
from spiel_peft import SpIELConfig
from spiel_peft.weights import folding
from spiel_peft.weights.folding import WeightFold

X = torch.linspace(-1, 1, 27).view(3, 9)


def stepping(
    layer: nn.Module | None = None, adapters: tuple[str, ...] = ("default",), x: Tensor = X, **config: Any
) -> tuple[PeftModel, torch.optim.Optimizer]:
    """A model in the middle of a run: one step done, more to come."""
    layer = nn.Linear(9, 7) if layer is None else layer
    settings = {"num_deltas": 20, "init_weights": False, "growth": "none", "target_modules": ["layer"], **config}
    model = get_peft_model(Single(layer), SpIELConfig(**settings), adapter_name=adapters[0]).train()
    for number, name in enumerate(adapters[1:], start=1):
        model.add_adapter(name, SpIELConfig(**{**settings, "seed": number}))
    model.base_model.set_adapter(list(adapters))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, optimizer, x)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X) -> None:
    dtype = next(model.parameters()).dtype
    model(x.to(dtype) if x.is_floating_point() else x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def stored(model: nn.Module) -> Tensor:
    """The base weight as it is in memory; reading it does not undo interrupted operations."""
    return spiel_layer(model).base_layer.weight.detach()


def adapted(original: Tensor, model: nn.Module) -> Tensor:
    deltas = spiel_layer(model).spiel_delta
    return apply_deltas(original, [(d.indices, d.values.detach()) for d in deltas.values()])


class Watch(TorchDispatchMode):
    """Records the operations that run while deltas are in a weight, and those that write to its memory."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.original = weight, weight.clone()
        self.during: list[str] = []
        self.writes: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        changed = not torch.equal(self.weight, self.original)
        if changed:
            self.during.append(name)
        out = func(*args, **(kwargs or {}))
        if torch.equal(self.weight, self.original) == changed:
            self.writes.append(name)
        return out


# The length of one operation

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(9, 7), X),
    "no-bias": (lambda: nn.Linear(9, 7, bias=False), X),
    "transposed": (lambda: transposed(9, 7), X),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), X.view(3, 3, 3)),
    "conv2d": (lambda: nn.Conv2d(1, 5, (2, 3)).to(memory_format=torch.channels_last), X.view(1, 1, 3, 9)),
    "strided": (lambda: strided(nn.Linear(9, 7)), X),
    "embedding": (lambda: nn.Embedding(8, 6), torch.arange(8).view(2, 4)),
}


def strided(layer: nn.Linear) -> nn.Linear:
    layer.weight.data = layer.weight.data.t().contiguous().t()
    return layer


# Operations that read no entry.
LAYOUT = {"alias", "detach", "expand", "new_empty", "permute", "t", "transpose", "unsqueeze", "view", "_unsafe_view"}


@pytest.mark.parametrize("adapters", [("default",), ("default", "other")], ids=["one-adapter", "two-adapters"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_only_the_operation_sees_the_deltas(name: str, dtype: torch.dtype, adapters: tuple[str, ...]) -> None:
    make, x = LAYERS[name]
    layer = make().to(dtype)
    original = layer.weight.detach().clone()
    model, optimizer = stepping(layer, adapters, x, growth="accumulated_gradient", accumulation_steps=2)
    x = x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x
    products = 1 + x.is_floating_point()
    for _ in range(2):
        with Watch(layer.weight.data) as watch:
            loss = model(x).square().sum()
            assert_same_bits(stored(model), original)
            loss.backward()
            assert_same_bits(stored(model), original)
        moving = [op for op in watch.during if op not in LAYOUT]
        if name == "embedding":
            assert not watch.during
        else:
            assert len(watch.writes) == 2 * products, watch.writes
            # The product, and the operation that writes the originals back.
            assert len(moving) == 2 * products, moving
        optimizer.step()
        assert_same_bits(stored(model), original)
        optimizer.zero_grad()


def test_an_interrupted_product_leaves_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping()
    original = stored(model).clone()

    def interrupted(*_: Any) -> Tensor:
        assert not torch.equal(stored(model), original)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nn.functional, "linear", interrupted)
        model(X)
    assert_same_bits(stored(model), original)


def test_hooks_of_the_user_find_the_original() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    seen: list[Tensor] = []

    def look(*_: Any) -> None:
        seen.append(stored(model).clone())

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    layer = spiel_layer(model)
    for module in (layer, layer.base_layer):
        module.register_forward_pre_hook(look)
        module.register_forward_hook(look)
        module.register_full_backward_hook(look)
    values_of(model).register_hook(look)
    model(X.clone().requires_grad_()).sum().backward()
    optimizer.step()
    assert len(seen) == 9
    for weight in seen:
        assert_same_bits(weight, original)


def test_passes_with_and_without_gradients_give_the_same() -> None:
    model, _ = stepping()
    original = stored(model).clone()
    with torch.no_grad():
        out = model(X)
    assert_same_bits(model(X).detach(), out)
    with torch.inference_mode():
        assert_same_bits(model(X).clone(), out)
    model.eval()
    assert_same_bits(model(X).detach(), out)
    base = spiel_layer(model).base_layer
    assert_same_bits(out, nn.functional.linear(X, adapted(original, model), base.bias).detach())
    assert_same_bits(stored(model), original)


# Other readers of the weight between a forward pass and the step


def pickled(model: PeftModel) -> PeftModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


KEY = "base_model.model.layer.base_layer.weight"
WAYS: dict[str, Callable[[PeftModel], Tensor]] = {
    "state_dict": lambda model: model.state_dict()[KEY],
    "state_dict of the model inside": lambda model: model.get_base_model().state_dict()["layer.base_layer.weight"],
    "state_dict of the layer": lambda model: spiel_layer(model).state_dict()["base_layer.weight"],
    "deepcopy": lambda model: stored(copy.deepcopy(model)),
    "deepcopy of the model inside": lambda model: stored(copy.deepcopy(model.get_base_model())),
    "pickle": lambda model: stored(pickled(model)),
    "to": lambda model: stored(model.to(torch.float64)).float(),
    "half and back": lambda model: stored(model.half().float()),
    "train": lambda model: stored(model.train()),
    "eval": lambda model: stored(model.eval()),
    "forward": lambda model: (model(X), stored(model))[1],
    "weight": lambda model: spiel_layer(model).weight.detach(),
    "get_base_weight": lambda model: spiel_layer(model).get_base_weight().detach(),
    "unload": lambda model: model.unload().layer.weight.detach(),
    "delete_adapter": lambda model: (model.delete_adapter("other"), stored(model))[1],
    "set_adapter": lambda model: (model.set_adapter("other"), stored(model))[1],
    "merge and unmerge": lambda model: (model.merge_adapter(), model.unmerge_adapter(), stored(model))[2],
    "load_state_dict": lambda model: (model.load_state_dict(model.state_dict()), stored(model))[1],
}
OTHER_READERS: dict[str, Callable[[PeftModel], Tensor]] = {
    "the parameter": lambda model: stored(model).clone(),
    "an average": lambda model: next(AveragedModel(spiel_layer(model).base_layer).parameters()).detach(),
    "a copy of the base layer": lambda model: copy.deepcopy(spiel_layer(model).base_layer).weight.detach(),
}


@pytest.mark.parametrize("way", [*WAYS, *OTHER_READERS])
def test_all_readers_see_the_original(way: str) -> None:
    model, _ = stepping(adapters=("default", "other"))
    original = stored(model).clone()
    model(X).sum().backward()
    assert_same_bits(stored(model), original)
    seen = (WAYS | OTHER_READERS)[way](model)
    assert_same_bits(seen, original.half().float() if way == "half and back" else original)


def test_a_second_model_on_the_same_storage_trains_base_weights_without_deltas() -> None:
    """TRL's `create_reference_model(num_shared_layers=...)` sets the data of one parameter to that of another."""
    model, optimizer = stepping()
    other, alone = nn.Linear(9, 7), nn.Linear(9, 7)
    alone.load_state_dict(spiel_layer(model).base_layer.state_dict())
    other.load_state_dict(alone.state_dict())
    other.weight.data = spiel_layer(model).base_layer.weight.data
    steppers = [torch.optim.SGD(linear.parameters(), lr=0.1) for linear in (other, alone)]
    for _ in range(3):
        loss = model(X).square().sum()
        for linear, stepper in zip((other, alone), steppers, strict=True):
            stepper.zero_grad()
            linear(X).sin().sum().backward()
        loss.backward()
        for stepper in steppers:
            stepper.step()
        optimizer.step()
        optimizer.zero_grad()
        assert_same_bits(other.weight.detach(), alone.weight.detach())


def test_loading_between_forward_and_step_keeps_what_was_loaded() -> None:
    model, optimizer = stepping()
    loaded = {**model.state_dict(), KEY: torch.randn(7, 9)}
    model(X).sum().backward()
    model.load_state_dict(loaded)
    assert_same_bits(stored(model), loaded[KEY])
    optimizer.step()
    assert_same_bits(stored(model), loaded[KEY])


def test_loading_an_adapter_between_forward_and_step() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    delta = spiel_layer(model).spiel_delta["default"]
    model(X).sum().backward()
    delta.load_state_dict({"indices": torch.arange(20, dtype=torch.int32), "values": torch.randn(20)})
    assert_same_bits(stored(model), original)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_merging_between_forward_and_step_uses_the_originals() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    model(X).sum().backward()
    model.merge_adapter()
    assert_same_bits(stored(model), adapted(original, model))
    model.unmerge_adapter()
    optimizer.step()
    assert_same_bits(stored(model), original)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "some-entries"])
def test_what_others_write_stays(whole: bool) -> None:
    model, optimizer = stepping()
    expected = stored(model).clone()
    written = torch.randn(7, 9)
    model(X).sum().backward()
    rows = slice(None) if whole else slice(2, 4)
    expected[rows] = written[rows]
    with torch.no_grad():
        spiel_layer(model).base_layer.weight[rows] = written[rows]
    optimizer.step()
    assert_same_bits(stored(model), expected)


def test_backward_after_a_write_to_the_weight_is_refused() -> None:
    model, _ = stepping()
    loss = model(X.clone().requires_grad_()).sum()
    with torch.no_grad():
        spiel_layer(model).base_layer.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="base weight was changed"):
        loss.backward()


# Orders of calls


def gradient_of(model: nn.Module, backward: Callable[[], None]) -> Tensor:
    model.zero_grad()
    backward()
    return values_of(model).grad.clone()


def test_disabled_pass_between_forward_and_backward() -> None:
    """TRL's DPO computes the reference between the policy's forward pass and its backward pass."""
    model, optimizer = stepping()
    original = stored(model).clone()
    expected = gradient_of(model, lambda: model(X).square().sum().backward())
    loss = model(X).square().sum()
    with torch.no_grad(), model.disable_adapter():
        reference = model(X)
    base = spiel_layer(model).base_layer
    assert_same_bits(reference, nn.functional.linear(X, original, base.bias).detach())
    assert_same_bits(gradient_of(model, loss.backward), expected)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_switch_of_adapters_between_forward_and_backward() -> None:
    model, optimizer = stepping(adapters=("default", "other"))
    original = stored(model).clone()
    model.set_adapter("default")
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    expected, expected_x = values_of(model).grad.clone(), x.grad.clone()
    x.grad = None
    model.zero_grad()
    loss = model(x).square().sum()
    model.base_model.set_adapter("other")
    model(X)
    values_of(model).requires_grad_(True)
    loss.backward()
    assert_same_bits(values_of(model).grad, expected)
    assert_same_bits(x.grad, expected_x)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_several_forwards_before_their_backwards() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    expected = gradient_of(model, lambda: (model(X).square().sum() + model(2 * X).sum()).backward())

    def both() -> None:
        first, second = model(X).square().sum(), model(2 * X).sum()
        first.backward()
        second.backward()

    assert_same_bits(gradient_of(model, both), expected)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_values_changed_through_data_are_seen_by_the_next_forward() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    model(X)
    values_of(model).data.mul_(3.0)
    out = model(X)
    base = spiel_layer(model).base_layer
    assert_same_bits(out.detach(), nn.functional.linear(X, adapted(original, model), base.bias).detach())
    optimizer.step()
    assert_same_bits(stored(model), original)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_passes(use_reentrant: bool) -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    x = X.clone().requires_grad_()
    expected = gradient_of(model, lambda: model(x).square().sum().backward())
    again = gradient_of(model, lambda: checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward())
    assert_same_bits(again, expected)
    optimizer.step()
    assert_same_bits(stored(model), original)


def test_a_closure_runs_passes_inside_the_step() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    before = values_of(model).detach().clone()
    optimizer.step(closure)
    assert not torch.equal(values_of(model), before)
    assert_same_bits(stored(model), original)


def test_a_step_that_a_scaler_leaves_out_does_no_harm() -> None:
    model, optimizer = stepping()
    original = stored(model).clone()
    for _ in range(3):
        model(X).sum().backward()
        optimizer.zero_grad()
        assert_same_bits(stored(model), original)
    step(model, optimizer)
    assert_same_bits(stored(model), original)


# Weights that are never written to


def shared_between_processes(layer: nn.Linear) -> nn.Linear:
    layer.weight.data.share_memory_()
    return layer


def expanded(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(torch.randn(1, 9).expand(7, 9))
    return layer


def made_in_inference_mode(layer: nn.Linear) -> nn.Linear:
    with torch.inference_mode():
        layer.weight = nn.Parameter(torch.randn(7, 9), requires_grad=False)
    return layer


@pytest.mark.parametrize("prepare", [shared_between_processes, expanded, made_in_inference_mode])
def test_memory_that_others_use_is_not_written_to(prepare: Callable[[nn.Linear], nn.Linear]) -> None:
    layer = prepare(nn.Linear(9, 7))
    original = layer.weight.detach().clone()
    model = get_peft_model(Single(layer), SpIELConfig(num_deltas=20, init_weights=False, target_modules=["layer"]))
    inference = layer.weight.is_inference()
    with Watch(layer.weight.detach()) as watch, torch.inference_mode(inference):
        out = model(X)
        if not inference:
            out.sum().backward()
    assert not watch.writes
    assert_same_bits(out.detach().clone(), nn.functional.linear(X, adapted(original, model), layer.bias).detach())


def test_a_weight_that_is_cast_for_the_operation_is_not_written_to() -> None:
    layer = nn.Linear(9, 7)
    model, _ = stepping(layer)
    expected = adapted(layer.weight.detach(), model).bfloat16()
    with Watch(layer.weight.data) as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(X)
        out.float().sum().backward()
    assert not watch.writes
    assert_same_bits(out.detach(), nn.functional.linear(X.bfloat16(), expected, layer.bias.bfloat16()).detach())


def test_a_trained_base_weight_gets_its_gradient() -> None:
    model, _ = stepping()
    weight = spiel_layer(model).base_layer.weight.requires_grad_()
    original = stored(model).clone()
    model(X).sum().backward()
    assert_same_bits(weight.grad, X.sum(0).expand(7, 9).contiguous())
    assert_same_bits(stored(model), original)


def test_tied_weights() -> None:
    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = SpIELConfig(num_deltas=40, init_weights=False, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(base, config).train()
    original = base.get_input_embeddings().base_layer.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        assert_same_bits(base.get_input_embeddings().base_layer.weight.detach(), original)
        optimizer.step()


# Deltas that an interrupt has left in the weight


def interrupt(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Leave deltas in the weight, as two interrupts in a row do, and return the original."""
    original = stored(model).clone()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WeightFold, "_put_back", fail)
        model(X)
    assert not torch.equal(stored(model), original)
    return original


@pytest.mark.parametrize("way", WAYS)
def test_the_next_use_takes_out_what_is_left(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping(adapters=("default", "other"))
    original = interrupt(model, monkeypatch)
    seen = WAYS[way](model)
    assert_same_bits(seen, original.half().float() if way == "half and back" else original)


@pytest.mark.parametrize("disabled", [False, True], ids=["adapted", "disabled"])
def test_the_next_pass_after_an_interrupt_computes_as_before(disabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping()
    if disabled:
        model.base_model.disable_adapter_layers()
    expected = model(X).detach()
    model.base_model.enable_adapter_layers()
    original = interrupt(model, monkeypatch)
    if disabled:
        model.base_model.disable_adapter_layers()
    assert_same_bits(model(X).detach(), expected)
    assert_same_bits(stored(model), original)


def test_a_backward_pass_after_an_interrupt_computes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping()
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    expected, x.grad = x.grad, None
    loss = model(x).square().sum()
    original = interrupt(model, monkeypatch)
    loss.backward()
    assert_same_bits(x.grad, expected)
    assert_same_bits(stored(model), original)


def test_a_layer_that_is_collected_takes_out_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping()
    weight = stored(model)
    original = interrupt(model, monkeypatch)
    del model
    gc.collect()
    assert_same_bits(weight, original)


def test_what_was_written_after_an_interrupt_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight may be overwritten before the interrupted fold is undone, by loading another checkpoint."""
    model, _ = stepping()
    expected = interrupt(model, monkeypatch)
    written = torch.randn(3, 9)
    stored(model)[2:5] = written
    expected[2:5] = written
    model.eval()
    assert_same_bits(stored(model), expected)


def test_a_copy_of_an_interrupted_layer_holds_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping()
    original = interrupt(model, monkeypatch)
    twin = copy.deepcopy(model)
    assert_same_bits(stored(twin), original)
    twin(X)
    assert_same_bits(stored(twin), original)


# Threads


def test_threads_with_models_on_one_storage_take_turns() -> None:
    first, _ = stepping()
    second, _ = stepping(seed=3)
    base = spiel_layer(first).base_layer
    spiel_layer(second).base_layer.weight.data = base.weight.data
    spiel_layer(second).base_layer.bias.data = base.bias.data
    original = stored(first).clone()
    models, inputs = (first, second), [X.clone().requires_grad_() for _ in range(2)]
    expected = []
    for model, x in zip(models, inputs, strict=True):
        out = model(x)
        expected.append((out.detach(), *torch.autograd.grad(out.square().sum(), [x, values_of(model)])))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            out = models[number](inputs[number])
            grads = torch.autograd.grad(out.square().sum(), [inputs[number], values_of(models[number])])
            if not all(map(torch.equal, (out, *grads), expected[number])):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_same_bits(stored(first), original)


def test_saving_in_another_thread_waits_for_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping()
    original = stored(model).clone()
    inside, saved = threading.Event(), []
    linear = nn.functional.linear

    def slow(*args: Any) -> Tensor:
        inside.set()
        thread.join(0.2)
        return linear(*args)

    def save() -> None:
        inside.wait(10)
        saved.append(model.state_dict()[KEY].clone())

    thread = threading.Thread(target=save)
    thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", slow)
        model(X)
    thread.join()
    assert_same_bits(saved[0], original)


def test_locks_go_with_the_layers_that_use_them() -> None:
    gc.collect()
    before = len(folding._LOCKS)
    models = [stepping()[0] for _ in range(5)]
    assert len(folding._LOCKS) == before + 5
    del models
    gc.collect()
    assert len(folding._LOCKS) == before


# Whole runs


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_a_run_is_the_same_in_place_and_in_copies(growth: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with copies of the adapted weights, as on other devices, equal runs with folds in place."""

    def run(in_place: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            if not in_place:
                patch.setattr(folding, "can_fold", lambda parameter: False)
            config = SpIELConfig(r=2, growth=growth, regrow_every=3, accumulation_steps=2, total_steps=12)
            base = tiny_llama()
            originals = {name: p.detach().clone() for name, p in base.named_parameters()}
            model = get_peft_model(base, config).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            ids = torch.arange(24).view(2, 12)
            losses = []
            for _ in range(9):
                for half in ids:
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                        loss = model(input_ids=half[None], labels=half[None]).loss
                    loss.backward()
                    losses.append(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
            weights = {n.replace("base_layer.", ""): p.detach() for n, p in model.get_base_model().named_parameters()}
            for name, original in originals.items():
                assert_same_bits(weights[name], original, name)
        return {n: t.clone() for n, t in model.state_dict().items() if "spiel" in n}, losses

    kept, losses = run(in_place=True)
    again, losses_again = run(in_place=False)
    for name, tensor in kept.items():
        assert_same_bits(tensor, again[name], name)
    for one, other in zip(losses, losses_again, strict=True):
        assert_same_bits(one, other)
