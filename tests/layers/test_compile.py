"""torch.compile keeps adapted layers whole, follows a cycle and compiles nothing anew when indices move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import get_peft_model
from support.layers import Single, spiel_layer, transposed, values_of
from support.models import tiny_llama
from support.quantized import QUANTIZED
from support.tensors import assert_close, assert_same_bits
from torch import Tensor, nn
from torch._dynamo.utils import counters

from spiel_peft import SM3, SpIELConfig


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: object) -> Callable[..., Tensor]:
    """The model compiled without graph breaks; one raises an error."""
    return torch.compile(model, backend="aot_eager", fullgraph=True, **options)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(9, 7), torch.randn(2, 4, 9)),
    "no bias": lambda: (nn.Linear(9, 7, bias=False), torch.randn(4, 9)),
    "transposed": lambda: (transposed(9, 7), torch.randn(2, 4, 9)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=1, groups=2), torch.randn(2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 5, 3, stride=2, padding="valid"), torch.randn(2, 3, 8, 7)),
    "embedding": lambda: (nn.Embedding(11, 6, padding_idx=3), torch.randint(11, (2, 5))),
}


def run(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    out = call(x)
    out.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads
    return [out.detach(), *grads, *([x.grad] if x.grad is not None else [])]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_it_gives_without_compiling(name: str) -> None:
    layer, x = LAYERS[name]()
    settings = {"num_deltas": 12, "target_modules": ["layer"], "init_weights": False, "bias": "all"}
    model = get_peft_model(Single(layer), SpIELConfig(**settings)).train()
    expected = run(model, model, x)
    for one, other in zip(run(compiled(model), model, x), expected, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_layer_gives_what_it_gives_without_compiling(kind: str) -> None:
    layer = QUANTIZED[kind]()
    x = torch.randn(3, layer.in_features)
    model = get_peft_model(
        Single(layer), SpIELConfig(num_deltas=50, target_modules=["layer"], init_weights=False)
    ).train()
    expected = run(model, model, x)
    got = run(torch.compile(model, backend="aot_eager"), model, x)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
def test_a_run_is_the_same_and_is_compiled_once(growth: str, autocast: bool) -> None:
    ids = torch.arange(24).view(2, 12)

    def train(compile_it: bool) -> tuple[list[Tensor], dict[str, Tensor], int]:
        torch.manual_seed(0)
        base = tiny_llama()
        originals = {name: p.detach().clone() for name, p in base.named_parameters()}
        config = SpIELConfig(
            r=2,
            growth=growth,
            regrow_every=3,
            accumulation_steps=2,
            total_steps=20,
            target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"],
        )
        model = get_peft_model(base, config).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = SM3(parameters, lr=1e-2) if growth == "momentum" else torch.optim.AdamW(parameters, lr=1e-2)
        call = compiled(model) if compile_it else model
        losses = []
        for _ in range(9):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        weights = {n.replace("base_layer.", ""): p.detach() for n, p in model.get_base_model().named_parameters()}
        for name, original in originals.items():
            assert_same_bits(weights[name], original, name)
        moved = sum(report.replaced for report in model.base_model.cycle_log())
        return losses, {n: t for n, t in model.state_dict().items() if "indices" in n}, moved

    losses, indices, moved = train(compile_it=False)
    counters.clear()
    got_losses, got_indices, got_moved = train(compile_it=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert moved and got_moved == moved
    if autocast:
        # Compiled code fuses operations, so that bfloat16 rounds at other places and the runs drift apart.
        assert_close(torch.stack(got_losses), torch.stack(losses), 3e-2)
        return
    assert_close(torch.stack(got_losses), torch.stack(losses), 1e-4)
    for name, tensor in indices.items():
        assert torch.equal(got_indices[name], tensor), name


def test_layers_that_are_alike_share_a_graph() -> None:
    """Compiling block by block must not compile every block anew."""
    base = tiny_llama(num_hidden_layers=4)
    # With an adapted embedding, the inputs of all blocks need gradients.
    model = get_peft_model(base, SpIELConfig(r=2, target_modules=["embed_tokens", "q_proj", "down_proj"])).train()
    for block in base.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_switching_and_disabling_adapters() -> None:
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    settings = {"num_deltas": 20, "target_modules": ["layer"], "init_weights": False}
    model = get_peft_model(Single(layer), SpIELConfig(**settings)).train()
    model.add_adapter("other", SpIELConfig(seed=1, **settings))
    call = compiled(model)
    outs = []
    for one in (model, call):
        for name in ("default", "other"):
            model.set_adapter(name)
            outs.append(one(x).detach())
        with model.disable_adapter():
            outs.append(one(x).detach())
    for expected, got in zip(outs[:3], outs[3:], strict=True):
        assert_close(got, expected, 1e-6)
    assert not torch.equal(outs[0], outs[1])


def test_switch_between_forward_and_backward() -> None:
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    settings = {"num_deltas": 20, "target_modules": ["layer"], "init_weights": False}
    model = get_peft_model(Single(layer), SpIELConfig(**settings)).train()
    model.add_adapter("other", SpIELConfig(seed=1, **settings))
    model(x).square().sum().backward()
    expected = values_of(model).grad.clone()
    model.zero_grad()
    loss = compiled(model)(x).square().sum()
    model.set_adapter("other")
    values_of(model).requires_grad_(True)
    loss.backward()
    assert_close(values_of(model).grad, expected, 1e-6)


def test_a_copy_compiles_for_itself() -> None:
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    model = get_peft_model(
        Single(layer), SpIELConfig(num_deltas=20, target_modules=["layer"], init_weights=False)
    ).train()
    other = copy.deepcopy(model)
    values_of(other).data.mul_(2.0)
    number = spiel_layer(model)._number
    assert int(spiel_layer(other)._number) != int(number)
    assert_close(compiled(other)(x), other(x), 1e-6)
    assert_close(compiled(model)(x), model(x), 1e-6)


@pytest.mark.slow
def test_the_default_backend() -> None:
    layer, x = nn.Linear(9, 7), torch.randn(4, 9)
    model = get_peft_model(
        Single(nn.Sequential(layer)), SpIELConfig(num_deltas=20, target_modules=["0"], init_weights=False)
    ).train()
    expected = run(model, model, x)
    for one, other in zip(run(torch.compile(model, fullgraph=True), model, x), expected, strict=True):
        assert_close(one, other, 1e-5)
