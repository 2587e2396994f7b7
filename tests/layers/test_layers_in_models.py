"""SpIEL layers inside models: gradient checkpointing, embeddings given directly, compilation, foreign forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.layers import adapt, dense_formula, spiel_layer, values_of
from support.models import tiny_llama
from support.tensors import assert_close, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from spiel_peft import SpIELConfig


def values_grads(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all values, which are cleared."""
    grads = {name: p.grad for name, p in model.named_parameters() if name.endswith(".values")}
    model.zero_grad()
    return grads


def assert_same_grads(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert got.keys() == expected.keys() and expected
    for name, grad in expected.items():
        assert_close(got[name], grad, tolerance, name)


class Stack(nn.Module):
    """Three layers, the middle one run under `torch.utils.checkpoint` on request."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 3)
        self.use_reentrant: bool | None = None

    def inner(self, x: Tensor) -> Tensor:
        return self.middle(x.relu().T).T

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.use_reentrant is not None:
            x = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        else:
            x = self.inner(x)
        return self.last(x)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_stack(use_reentrant: bool) -> None:
    stack, x = Stack(), torch.randn(4, 5)
    config = SpIELConfig(density=0.3, target_modules=["first", "middle", "last"], init_weights=False)
    model = get_peft_model(stack, config)
    model(x).square().sum().backward()
    expected = values_grads(model)
    stack.use_reentrant = use_reentrant
    model(x).square().sum().backward()
    assert_same_grads(values_grads(model), expected)


def adapted_llama(targets: str | list[str] = "all-linear") -> PeftModel:
    return get_peft_model(
        tiny_llama(), SpIELConfig(density=0.1, target_modules=targets, init_weights=False, task_type="CAUSAL_LM")
    )


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_llama(use_reentrant: bool) -> None:
    model = adapted_llama(["q_proj", "down_proj", "embed_tokens"]).train()
    ids = torch.randint(40, (2, 7))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = values_grads(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(input_ids=ids, labels=ids).loss.backward()
    assert_same_grads(values_grads(model), expected)


def test_inputs_embeds() -> None:
    """Embeddings given directly bypass the layer: all other layers and the embeddings get gradients."""
    model = adapted_llama()
    ids = torch.randint(40, (2, 7))
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=ids).loss
    loss.backward()
    expected_loss = model(input_ids=ids, labels=ids).loss
    assert_same_bits(loss.detach(), expected_loss.detach())
    grads = values_grads(model)
    expected_loss.backward()
    assert_same_grads(grads, values_grads(model))
    assert embeds.grad is not None and embeds.grad.any()


def test_compiled_model_gives_the_same_loss_and_gradients() -> None:
    torch._dynamo.reset()
    stack, x = Stack(), torch.randn(4, 5)
    config = SpIELConfig(density=0.3, target_modules=["first", "middle"], init_weights=False)
    model = get_peft_model(stack, config)
    loss = model(x).square().sum()
    loss.backward()
    expected = values_grads(model)
    compiled = torch.compile(model, backend="aot_eager")(x).square().sum()
    compiled.backward()
    assert_close(compiled, loss, 1e-6, "loss")
    assert_same_grads(values_grads(model), expected, 1e-5)
    torch._dynamo.reset()


class DoubledLinear(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + self.weight.sum()


def test_subclass_with_its_own_forward() -> None:
    layer, x = DoubledLinear(6, 5), torch.randn(3, 6, requires_grad=True)
    reference, weight = copy.deepcopy(layer).double(), layer.weight.detach().clone()
    model = adapt(layer, 9, ("a", "b"))
    layer.weight.requires_grad_()
    out = model(x)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected = dense_formula(spiel_layer(model), reference, weight, x, grad_out, ("a", "b"))
    assert_close(out, expected.out, 1e-5, "output")
    assert_close(x.grad, expected.grad_input, 1e-5, "input gradient")
    assert_close(layer.weight.grad, expected.grad_weight, 1e-5, "weight gradient")
    for name in ("a", "b"):
        assert_close(values_of(model, name).grad, expected.grad_values[name], 1e-5, name)
    with torch.no_grad():
        model.merge_adapter()
        assert_same_bits(model(x), out.detach())


def test_forward_patched_onto_an_instance_is_kept() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 3
    model = adapt(layer)
    out = model(x)
    weight = layer.weight.detach() + spiel_layer(model).get_delta_weight("default")
    assert_close(out, 3 * nn.functional.linear(x, weight, layer.bias), 1e-6)
    out.sum().backward()
    assert values_of(model).grad.any()


SCALE = 27.712812921102035  # sqrt(768), which bfloat16 rounds to 27.75
SCALED = {"number": BartScaledWordEmbedding, "buffer": Gemma3TextScaledWordEmbedding}


@pytest.mark.parametrize("kind", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_embedding_scales_base_and_deltas_alike(kind: type[nn.Embedding], dtype: torch.dtype) -> None:
    layer = kind(11, 6, 0, embed_scale=SCALE).to(dtype)
    ids = torch.randint(11, (3, 7))
    model = adapt(layer, 20)
    out = model(ids)
    out.sum().backward()
    counts = torch.bincount(ids.flatten(), minlength=11).double()
    counts[0] = 0  # the padding row
    rows = spiel_layer(model).spiel_delta["default"].indices.long() // 6
    assert_close(values_of(model).grad, counts[rows] * SCALE, 1e-5 if dtype == torch.float32 else 1e-2)
    with torch.no_grad():
        model.merge_adapter()
        assert_same_bits(out.detach(), model(ids))


def test_deterministic_algorithms() -> None:
    """Forward, backward, merging and unmerging run in deterministic mode, which `full_determinism` switches on."""
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    model = adapt(layer, adapters=("a", "b"))
    before, expected = layer.weight.detach().clone(), model(x)
    torch.use_deterministic_algorithms(True)
    try:
        out = model(x)
        out.sum().backward()
        model.merge_adapter()
        merged = model(x)
        model.unmerge_adapter()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(out.detach(), expected.detach())
    assert_same_bits(merged.detach(), expected.detach())
    assert_same_bits(layer.weight.detach(), before)
