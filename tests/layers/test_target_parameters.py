"""Bare parameters as targets: fused experts of mixtures, and other parameters that only their module computes with."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from safetensors.torch import load_file
from support.tensors import OpRecorder, assert_close, assert_same_bits
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from spiel_kernels import apply_deltas
from spiel_peft import (
    SpIELConfig,
    SpIELOptimizer,
    export_dense_diff,
    export_shira,
    export_sparse_patch,
    merge_adapter_into_checkpoint,
)
from spiel_peft.budget import allocate_deltas
from spiel_peft.layers import SpIELParameter, SpIELParameters
from spiel_peft.layers import parameter as parameter_module
from spiel_peft.targets import inspect_parameter

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}


def mixtral(implementation: str = "eager") -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, experts_implementation=implementation))


def qwen() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=24, num_experts=4, head_dim=8, experts_implementation="eager"
    )
    return Qwen3MoeForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, experts_implementation="eager")
    return GptOssForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": mixtral,
    "mixtral-grouped": lambda: mixtral("grouped_mm"),
    "mixtral-batched": lambda: mixtral("batched_mm"),
    "qwen3-moe": qwen,
    "gpt-oss": gpt_oss,
}


def build(name: str = "mixtral") -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.1)  # gpt-oss does not initialize them
    return model


def adapt(model: nn.Module, adapter_name: str = "default", **config: Any) -> PeftModel:
    settings = {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS, "init_weights": False, **config}
    return get_peft_model(model, SpIELConfig(**settings), adapter_name=adapter_name)


def batch() -> Tensor:
    return torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch()).logits


def parts(model: nn.Module) -> list[SpIELParameter]:
    return [module for module in model.modules() if isinstance(module, SpIELParameter)]


def originals(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base model's parameters by their names in the base model."""
    state = model.base_model.model.state_dict() if isinstance(model, PeftModel) else model.state_dict()
    return {key.replace(".base_layer", ""): v.clone() for key, v in state.items() if "spiel" not in key}


def train(model: PeftModel, steps: int = 9, **kwargs: Any) -> list[float]:
    optimizer = SpIELOptimizer(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), model, total_steps=steps
    )
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch(), labels=batch(), **kwargs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_dense_formula(name: str) -> None:
    base = build(name)
    dense = copy.deepcopy(base)
    model = adapt(base)
    loss = model(input_ids=batch(), labels=batch()).loss
    loss.backward()
    for layer in model.modules():
        if hasattr(layer, "spiel_delta"):
            parameter = dict(dense.named_parameters())[
                layer.module_name if isinstance(layer, SpIELParameter) else f"{layer.module_name}.weight"
            ]
            parameter.data += layer.get_delta_weight("default")
    expected = dense(input_ids=batch(), labels=batch()).loss
    expected.backward()
    assert_close(loss, expected, 1e-6)
    assert len(parts(model)) == 4
    for part in parts(model):
        delta = part.spiel_delta["default"]
        weight = dense.get_parameter(part.module_name)
        assert_close(delta.values.grad, weight.grad.flatten()[delta.indices.long()], 1e-4, part.module_name)
        assert float(delta.values.grad.abs().max()) > 0
        assert part.computing_module()._parameters[part.parameter_name].grad is None


@pytest.mark.parametrize("growth", ["accumulated_gradient", "momentum"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_training_moves_indices_and_lowers_the_loss(name: str, growth: str, tmp_path: Path) -> None:
    base = build(name)
    before, clean = originals(base), copy.deepcopy(base)
    model = adapt(base, init_weights=True, growth=growth, regrow_every=3, accumulation_steps=2)
    untrained = logits(model)
    assert_same_bits(untrained, logits(clean))
    start = [part.spiel_delta["default"].indices.clone() for part in parts(model)]
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    for part, indices in zip(parts(model), start, strict=True):
        now = part.spiel_delta["default"].indices
        assert not torch.equal(now, indices) and bool((now.diff() > 0).all())
        assert 0 <= int(now[0]) and int(now[-1]) < part.info.numel
    for key, value in originals(model).items():
        assert_same_bits(value, before[key], key)

    model.eval()
    trained = logits(model)
    assert not torch.equal(trained, untrained)
    model.save_pretrained(tmp_path)
    assert_same_bits(logits(PeftModel.from_pretrained(clean, tmp_path)), trained)
    model.merge_adapter()
    assert_same_bits(logits(model), trained)
    model.unmerge_adapter()
    for key, value in originals(model).items():
        assert_same_bits(value, before[key], key)
    with model.disable_adapter():
        assert_same_bits(logits(model), untrained)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, (SpIELParameter, SpIELParameters)) for module in merged.modules())
    assert_same_bits(logits(merged), trained)


def test_candidates_are_the_largest_gradients_of_all_experts() -> None:
    base = build()
    dense = copy.deepcopy(base)
    dense(input_ids=batch(), labels=batch()).loss.backward()
    model = adapt(base, init_weights=True, regrow_every=4, accumulation_steps=1)
    train(model, steps=1)
    for part in parts(model):
        gradient = dense.get_parameter(part.module_name).grad.abs().flatten()
        largest = set(gradient.topk(part.spiel_delta["default"].k).indices.tolist())
        assert set(part.spiel_delta["default"].indices.tolist()) == largest


def test_budget_counts_every_expert() -> None:
    model = adapt(build(), r=2)
    gate_up, down = parts(model)[:2]
    assert gate_up.spiel_delta["default"].k == 2 * (16 + 48) * 4
    assert down.spiel_delta["default"].k == 2 * (16 + 24) * 4
    info = inspect_parameter(gate_up.computing_module(), "gate_up_proj")
    assert allocate_deltas(SpIELConfig(density=0.1), {"a": info}) == {"a": round(0.1 * 4 * 48 * 16)}
    model = adapt(build(), r=2, rank_pattern={"experts.down_proj": 1})
    assert parts(model)[1].spiel_delta["default"].k == (16 + 24) * 4
    model = adapt(build(), r=None, num_deltas=1000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1000


EXPERT, EXPERTS_OF_A_LAYER = 48 * 16, 4 * 48 * 16


def held_copies(numel: int) -> int:
    """Number of live tensors of a size that are not parameters."""
    gc.collect()
    return sum(type(thing) is Tensor and thing.numel() == numel for thing in gc.get_objects())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_copy_of_the_weights_outlives_the_forward_pass(implementation: str) -> None:
    model = adapt(mixtral(implementation), target_modules=[], growth="none")
    before, held = originals(model), held_copies(EXPERTS_OF_A_LAYER)
    with OpRecorder() as forward:
        loss = model(input_ids=batch(), labels=batch()).loss
    assert any(EXPERTS_OF_A_LAYER in op.out_numels for op in forward.ops)
    assert held_copies(EXPERTS_OF_A_LAYER) == held and held_copies(EXPERT) == 0
    for key, value in originals(model).items():
        assert_same_bits(value, before[key], key)
    loss.backward()
    assert held_copies(EXPERTS_OF_A_LAYER) == held
    for key, value in originals(model).items():
        assert_same_bits(value, before[key], key)


@pytest.mark.parametrize("name", MODELS)
def test_weights_made_again_in_backward_give_the_gradients_of_kept_copies(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> list[Tensor]:
        model = adapt(build(name), growth="none")
        model.enable_input_require_grads()
        model(input_ids=batch(), labels=batch()).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    again = gradients()
    monkeypatch.setattr(parameter_module, "_hooks_on_saved_tensors", lambda: True)
    kept = gradients()
    assert len(again) == len(kept) > 0
    for one, other in zip(again, kept, strict=True):
        assert_same_bits(one, other)


def test_without_gradients_nothing_is_copied() -> None:
    model = adapt(build("mixtral-grouped"), target_modules=[], growth="none")
    with torch.no_grad(), OpRecorder() as ops:
        model(input_ids=batch())
    assert not [op.name for op in ops.ops if EXPERTS_OF_A_LAYER in op.out_numels]


@pytest.mark.parametrize("disturb", ["disable", "state dict", "evaluate", "nothing"])
def test_what_happens_after_the_forward_pass_does_not_change_the_backward_pass(disturb: str) -> None:
    model = adapt(build(), growth="none", total_steps=20)
    train(model, steps=2)
    reference = copy.deepcopy(model)
    reference(input_ids=batch(), labels=batch()).loss.backward()
    loss = model(input_ids=batch(), labels=batch()).loss
    if disturb == "disable":
        with model.disable_adapter():
            logits(model)
    elif disturb == "state dict":
        model.state_dict()
    elif disturb == "evaluate":
        model.eval()
    loss.backward()
    for got, expected in zip(parts(model), parts(reference), strict=True):
        assert_same_bits(got.spiel_delta["default"].values.grad, expected.spiel_delta["default"].values.grad)


def test_backward_after_a_write_to_a_parameter_is_refused() -> None:
    model = adapt(build(), growth="none")
    loss = model(input_ids=batch(), labels=batch()).loss
    with torch.no_grad():
        parts(model)[0].get_base_layer().weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="base weight was changed"):
        loss.backward()


def test_a_tensor_that_leaves_a_module_by_the_back_door_keeps_its_deltas() -> None:
    model = get_peft_model(Leaky(), SpIELConfig(density=0.5, target_parameters=["block.mix"], init_weights=False))
    (part,) = parts(model)
    delta = part.spiel_delta["default"]
    x = torch.randn(3, 6)
    model(x)
    model.eval()
    base = model.model.block.base_layer
    dense = apply_deltas(part.weight.detach(), [(delta.indices, delta.values.detach())]).requires_grad_()
    assert_same_bits(base.part.detach(), dense[2:].detach())
    assert_same_bits(base.kept.detach(), (x @ dense).detach())
    (base.kept.square().sum() + base.part.sin().sum()).backward()
    ((x @ dense).square().sum() + dense[2:].sin().sum()).backward()
    assert_close(delta.values.grad, dense.grad.flatten()[delta.indices.long()], 1e-6)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_an_output_that_is_a_view_of_the_weight_keeps_its_deltas(grad: bool) -> None:
    """A parameter that the module returns itself, such as learned queries."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Handed()

        def forward(self, n: int) -> dict[str, Tensor]:
            return self.block(n)

    class Handed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(2, 6))

        def forward(self, n: int) -> dict[str, Tensor]:
            return {"queries": self.queries.expand(n, -1, -1)}

    config = SpIELConfig(density=0.5, target_parameters=["block.queries"], init_weights=False)
    model = get_peft_model(Queries(), config)
    (part,) = parts(model)
    delta = part.spiel_delta["default"]
    expected = apply_deltas(part.weight.detach(), [(delta.indices, delta.values.detach())])
    with torch.set_grad_enabled(grad):
        out = model(3)["queries"]
    assert_same_bits(out.detach().contiguous(), expected.expand(3, -1, -1).contiguous())
    if grad:
        out.sum().backward()
        assert_same_bits(delta.values.grad, torch.full_like(delta.values, 3.0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain, checkpointed = adapt(build()), adapt(build())
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert train(plain, steps=4) == pytest.approx(train(checkpointed, steps=4), rel=1e-6)
    for a, b in zip(parts(plain), parts(checkpointed), strict=True):
        assert torch.equal(a.spiel_delta["default"].indices, b.spiel_delta["default"].indices)
        assert_close(a.spiel_delta["default"].values, b.spiel_delta["default"].values, 1e-4)


def test_several_adapters_add_up_and_switch() -> None:
    base = build()
    clean = logits(copy.deepcopy(base))
    model = adapt(base, "first")
    first = logits(model)
    model.add_adapter("second", SpIELConfig(r=1, target_modules=[], target_parameters=EXPERTS[:1], init_weights=False))
    assert_same_bits(logits(model), first)
    assert {name for part in parts(model) for name in part.spiel_delta} == {"first", "second"}
    model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    assert len({float(out.sum()) for out in (clean, first, second, both)}) == 4
    model.merge_adapter(["first"])
    model.merge_adapter(["second"])
    assert_same_bits(logits(model), both)
    model.unmerge_adapter()
    report = model.base_model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    assert report is not None
    model.set_adapter("sum")
    assert_close(logits(model), both, 1e-5)
    model.delete_adapter("second")
    model.set_adapter("first")
    assert_same_bits(logits(model), first)
    status = get_model_status(model)
    assert status.active_adapters == ["first"] and status.enabled is True and status.merged_adapters == []
    assert sum(line.available_adapters == ["first", "sum"] for line in get_layer_status(model)) == 6
    assert_same_bits(logits(model.unload()), clean)


def test_combined_adapter_is_saved_and_loaded_without_being_told_what_is_a_parameter(tmp_path: Path) -> None:
    model = adapt(build(), "first")
    model.base_model.add_weighted_adapter(["first"], [2.0], "twice")
    model.set_adapter("twice")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["twice"])
    folder = tmp_path / "twice"
    assert_same_bits(logits(PeftModel.from_pretrained(build(), folder)), expected)
    config = PeftConfig.from_pretrained(str(folder))
    counts = {name: int(k) for name, k in config.num_deltas.items()}
    bare = get_peft_model(build(), SpIELConfig(num_deltas=counts))
    assert bare.peft_config["default"].target_parameters == [n for n in sorted(counts) if "experts" in n]
    assert [part.spiel_delta["default"].k for part in parts(bare)] == [
        part.spiel_delta["twice"].k for part in parts(model)
    ]


def test_state_of_a_run_travels_with_the_adapter(tmp_path: Path) -> None:
    settings = {"growth": "momentum", "regrow_every": 3, "accumulation_steps": 2, "total_steps": 8}

    def loop(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(input_ids=batch(), labels=batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def sgd(model: PeftModel) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)

    whole = adapt(build(), init_weights=True, **settings)
    loop(whole, sgd(whole), 8)
    half = adapt(build(), init_weights=True, **settings)
    loop(half, sgd(half), 4)
    half.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    loop(resumed, sgd(resumed), 4)
    for a, b in zip(parts(whole), parts(resumed), strict=True):
        assert_same_bits(a.spiel_delta["default"].indices, b.spiel_delta["default"].indices)
        assert_same_bits(a.spiel_delta["default"].values.detach(), b.spiel_delta["default"].values.detach())


def test_merging_into_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    base = build()
    base.save_pretrained(tmp_path / "base")
    model = adapt(base)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter_into_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager")
    assert_same_bits(logits(loaded), expected)


def test_exports_of_what_plain_checkpoints_can_hold(tmp_path: Path) -> None:
    base = build()
    clean = copy.deepcopy(base)
    model = adapt(base)
    model.save_pretrained(tmp_path / "adapter")
    export_dense_diff(tmp_path / "adapter", tmp_path / "diff", clean)
    (file,) = (tmp_path / "diff").glob("*.safetensors")
    diff = load_file(file)
    part = parts(model)[0]
    (name,) = [key for key in diff if part.module_name in key]
    merged = model.merge_and_unload().get_parameter(part.module_name)
    assert_close(diff[name], merged.detach() - clean.get_parameter(part.module_name).detach(), 1e-6)
    with pytest.raises(ValueError, match="is a bare parameter, and SHiRA adapts linear layers only"):
        export_shira(tmp_path / "adapter", tmp_path / "shira", clean)
    clean.save_pretrained(tmp_path / "base")  # as Mixtral is stored: expert by expert
    with pytest.raises(ValueError, match="stored in another layout"):
        export_sparse_patch(tmp_path / "adapter", tmp_path / "patch.safetensors", tmp_path / "base")


def test_copies_pickles_and_casts() -> None:
    model = adapt(build())
    train(model, steps=2)
    model(input_ids=batch(), labels=batch())
    copied = copy.deepcopy(model)
    assert parts(copied)[0].computing_module() is not parts(model)[0].computing_module()
    pickled = pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert_same_bits(logits(other.eval()), logits(model.eval()))
    half = model.to(torch.bfloat16)
    assert parts(half)[0].weight.dtype == torch.bfloat16
    out = logits(half)
    half.merge_adapter()
    assert_same_bits(logits(half), out)


class Mixed(nn.Module):
    """A block that computes with parameters of its own, of one, two and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.cube = nn.Parameter(torch.randn(2, 2, 6, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = torch.einsum("bi,pqij->bj", x * self.scale, self.cube) @ self.mix
        return y, {"gate": y.sum(-1)}


class Leaky(nn.Module):
    """Keeps a result and a view of its parameter in attributes, apart from its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Mixed()
        self.block.forward = self._leak

    def _leak(self, x: Tensor) -> Tensor:
        self.block.base_layer.part = self.block.base_layer.mix[2:]
        self.block.base_layer.kept = x @ self.block.base_layer.mix
        return self.block.base_layer.kept.sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Mixed()
        self.bag = nn.EmbeddingBag(9, 6, mode="sum")
        self.sparse = nn.EmbeddingBag(9, 6, sparse=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.recurrent = nn.LSTM(6, 6)
        self.codes = nn.Module()
        self.codes.table = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
        self.outer = nn.Parameter(torch.ones(6))
        self.named = nn.Module()
        self.named._parameters["forward"] = nn.Parameter(torch.ones(3))
        self.tied = nn.Module()
        self.tied.weight = self.norm.weight

    def forward(self, ids: Tensor) -> Tensor:
        x, extra = self.block(self.bag(ids))
        x = self.norm(x * self.outer) + extra["gate"][:, None]
        return self.attention(x[None], x[None], x[None], need_weights=False)[0]


def test_parameters_of_any_dimension_in_modules_of_any_kind(tmp_path: Path) -> None:
    names = ["block.scale", "block.mix", "block.cube", "bag.weight", "attention.in_proj_weight", "norm.bias"]
    torch.manual_seed(0)
    base = Whole()
    dense, clean = copy.deepcopy(base), copy.deepcopy(base)
    model = get_peft_model(base, SpIELConfig(density=0.4, target_parameters=names, init_weights=False))
    ids = torch.randint(9, (4, 5))
    out = model(ids)
    out.square().sum().backward()
    for part in parts(model):
        dense.get_parameter(part.module_name).data += part.get_delta_weight("default")
    expected = dense(ids)
    expected.square().sum().backward()
    assert_close(out, expected, 1e-5)
    assert {part.module_name for part in parts(model)} == set(names)
    for part in parts(model):
        delta, grad = part.spiel_delta["default"], dense.get_parameter(part.module_name).grad
        assert_close(delta.values.grad, grad.flatten()[delta.indices.long()], 1e-4, part.module_name)
    model.save_pretrained(tmp_path)
    model.eval()
    with torch.no_grad():
        assert_same_bits(PeftModel.from_pretrained(clean, tmp_path)(ids), model(ids))


NOT_THERE = r"target_parameters names parameters that the model does not have: \['block.nothing'\]"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"target_parameters": ["block.scale", "block.nothing"]}, NOT_THERE),
    "integers": ({"target_parameters": ["codes.table"]}, r"codes\.table .* is stored as torch.int8"),
    "the model's own": ({"target_parameters": ["outer"]}, "outer .* belongs to the model itself"),
    "recurrent": ({"target_parameters": ["recurrent.weight_ih_l0"]}, "LSTM, which reads its weights from a list"),
    "sparse gradients": ({"target_parameters": ["sparse.weight"]}, "sparse.weight .* gradients are sparse tensors"),
    "tied": ({"target_parameters": ["norm.weight"]}, "norm.weight .* is tied to tied.weight"),
    "twice": (
        {"target_modules": ["out_proj"], "target_parameters": ["attention.in_proj_weight"]},
        "belongs to nn.MultiheadAttention|targets inside",
    ),
    "saved": ({"modules_to_save": ["norm"], "target_parameters": ["norm.bias"]}, "target_modules or modules_to_save"),
    "a name of our own": ({"target_parameters": ["named.forward"]}, "named.forward .* a name that adapted layers use"),
    "no list": ({"target_parameters": "norm.bias"}, "`target_parameters` must be a list of names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_as_it_was(case: str) -> None:
    config, message = REFUSED[case]
    model = Whole()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, SpIELConfig(density=0.5, **config))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_four_bit_experts_are_refused() -> None:
    model = Whole()
    nn.utils.parametrize.register_parametrization(model.block, "cube", nn.Identity())
    with pytest.raises(ValueError, match=r"block\.cube .* computed by a parametrization \(4-bit experts are\)"):
        get_peft_model(model, SpIELConfig(density=0.5, target_parameters=["block.cube"]))


def test_a_file_that_does_not_fit_leaves_no_empty_wrapper(tmp_path: Path) -> None:
    adapt(build(), "other", r=4, target_modules=[]).save_pretrained(tmp_path)
    folder = tmp_path / "other"
    config = PeftConfig.from_pretrained(str(folder))
    config.r = 5
    config.save_pretrained(str(folder))
    base = build()
    model = adapt(base, target_parameters=[])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(str(folder), "other")
    assert not parts(model) and not any(isinstance(module, SpIELParameters) for module in model.modules())


def test_frozen_experts_are_mentioned_with_the_names_to_give() -> None:
    with pytest.warns(UserWarning, match=r"target_parameters=\['experts.down_proj', 'experts.gate_up_proj'\]"):
        adapt(build(), target_parameters=None)
