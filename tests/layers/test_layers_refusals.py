"""Layers that cannot be adapted are refused by name and reason, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from support.layers import CASES, adapt, spiel_layer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from spiel_peft import SpIELConfig, SpIELLayer
from spiel_peft.weights import base_weight


def integer_linear() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.uint8), requires_grad=False)
    return layer


def float8_linear() -> nn.Module:
    layer = nn.Linear(6, 5)
    layer.weight = nn.Parameter(torch.zeros(5, 6).to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def complex_linear() -> nn.Module:
    return nn.Linear(6, 5).to(torch.complex64)


def hooked_weight_norm() -> nn.Module:
    """The older `weight_norm`, which computes a plain tensor `weight` in a forward pre-hook."""
    layer = nn.Linear(6, 5)
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight_v = nn.Parameter(weight)
    layer.weight = weight
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.weight_v * 2))
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "attention-projection": (
        lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 5),
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        "belongs to nn.MultiheadAttention",
    ),
    "max-norm": (lambda: nn.Embedding(6, 5, max_norm=1.0), "torch.nn.modules.sparse.Embedding", "max_norm"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 5)),
        "ParametrizedLinear",
        "has a parametrized weight; remove the parametrization first",
    ),
    "weight-norm": (hooked_weight_norm, "torch.nn.modules.linear.Linear", "computes its weight before every forward"),
    "uint8": (integer_linear, "torch.nn.modules.linear.Linear", "stores its weight as torch.uint8"),
    "float8": (float8_linear, "torch.nn.modules.linear.Linear", "stores its weight as torch.float8_e4m3fn"),
    "complex": (complex_linear, "torch.nn.modules.linear.Linear", "stores its weight as torch.complex64"),
    "empty": (lambda: nn.Linear(0, 5), "torch.nn.modules.linear.Linear", r"has an empty weight of shape \(5, 0\)"),
    "layer-norm": (lambda: nn.LayerNorm(5), "torch.nn.modules.normalization.LayerNorm", "is not a supported layer"),
    "transposed-convolution": (
        lambda: nn.ConvTranspose2d(2, 3, 3),
        "torch.nn.modules.conv.ConvTranspose2d",
        "is not a supported layer",
    ),
    "embedding-bag": (lambda: nn.EmbeddingBag(6, 5), "torch.nn.modules.sparse.EmbeddingBag", "is not a supported"),
    "no-weight": (nn.ReLU, "torch.nn.modules.activation.ReLU", "is not a supported layer"),
}


class Two(nn.Module):
    """A supported layer before the layer to be refused."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.good, self.bad = nn.Linear(6, 6), second


def assert_refused(model: Two, pattern: str) -> None:
    good, bad = model.good, model.bad
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=pattern):
        get_peft_model(model, SpIELConfig(r=1, target_modules=["good", "bad"]))
    assert model.good is good and model.bad is bad
    assert not any(isinstance(module, SpIELLayer) for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].view(torch.uint8), t.view(torch.uint8)) for name, t in before.items())
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("make, type_name, reason", REFUSED.values(), ids=REFUSED)
def test_refused_with_name_type_and_reason(make: Callable[[], nn.Module], type_name: str, reason: str) -> None:
    assert_refused(Two(make()), rf"cannot adapt: bad \({type_name if '.' in type_name else '.*'}.*\) .*{reason}")


def test_all_bad_modules_are_named_at_once() -> None:
    model = nn.ModuleDict({f"bad{i}": integer_linear() for i in range(10)})
    with pytest.raises(ValueError, match=r"bad0 .*bad7 .*; and 2 more\. Supported are torch.nn.Linear"):
        get_peft_model(model, SpIELConfig(r=1, target_modules=[f"bad{i}" for i in range(10)]))


def test_projection_inside_multihead_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12)
    with pytest.raises(ValueError, match=r"self_attn.out_proj .* belongs to nn.MultiheadAttention"):
        get_peft_model(model, SpIELConfig(r=1, target_modules=["out_proj"]))


class PackedLinear(nn.Module):
    """A layer with integers under another name and with sizes, as GPTQ layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 6
        self.register_buffer("qweight", torch.zeros(9, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_quantization_that_peft_cannot_dequantize(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = base_weight.resolve_quantization_backend

    def with_gptq(module: nn.Module, **kwargs: object) -> object:
        if isinstance(module, PackedLinear):
            return ForwardOnlyQuantizationBackend("gptq")
        return resolve(module, **kwargs)

    monkeypatch.setattr(base_weight, "resolve_quantization_backend", with_gptq)
    assert_refused(Two(PackedLinear()), r"bad \(.*PackedLinear\) is quantized with gptq, whose weights PEFT cannot")


def test_second_adapter_on_a_refused_module_leaves_the_first_alone() -> None:
    model = get_peft_model(Two(integer_linear()), SpIELConfig(r=1, target_modules=["good"]))
    values = model.base_model.model.good.spiel_delta["default"].values
    with pytest.raises(ValueError, match="stores its weight as torch.uint8"):
        model.add_adapter("second", SpIELConfig(r=1, target_modules=["bad"]))
    assert list(model.base_model.model.good.spiel_delta) == ["default"]
    assert model.base_model.model.good.spiel_delta["default"].values is values


def test_data_parallel_replica_is_refused() -> None:
    """A replica of a layer, as `nn.DataParallel` makes one on every device."""
    layer, x = CASES["linear"].build()
    replica = spiel_layer(adapt(layer))._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="does not work under nn.DataParallel; use DistributedDataParallel"):
        replica(x)


def test_mixed_batches_are_refused() -> None:
    layer, x = CASES["linear"].build()
    model = adapt(layer)
    with pytest.raises(ValueError, match=r"adapter_names \(mixed batches\) is not supported .* use set_adapter"):
        model(x, adapter_names=["default"] * 5)
    with pytest.raises(ValueError, match="adapter_names"):
        spiel_layer(model)(x, adapter_names=["default"] * 5)


def test_encoder_layer_with_a_fast_path_of_its_own() -> None:
    """The encoder layer's inference path reads linear1.weight without the deltas; without that path it is adapted."""
    encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
    config = SpIELConfig(target_modules=["linear1", "linear2"], density=0.5, init_weights=False)
    with pytest.raises(ValueError, match="linear1 .*set_fastpath_enabled"):
        get_peft_model(encoder, config)
    assert not any(isinstance(module, SpIELLayer) for module in encoder.modules())
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        x = torch.randn(3, 4, 8)
        with torch.no_grad():
            plain = encoder(x)
            assert not torch.allclose(get_peft_model(encoder, config)(x), plain)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
