"""Models of diffusers, on the meta device, with three tied weights, and with modules that are read past forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
)

from spiel_kernels import check_index_set
from spiel_peft import SpIELConfig, SpIELLayer
from spiel_peft.delta import SparseDelta


def deltas(model: nn.Module) -> list[SparseDelta]:
    return [module for module in model.modules() if isinstance(module, SparseDelta)]


def randomize(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas(model):
        delta.values.data.copy_(torch.randn(delta.k, generator=generator) * 0.1)


class Configured(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("config", [{"a": 1}, {}, None, {"model_type": "unheard-of"}], ids=str)
@pytest.mark.parametrize("injected", [False, True])
def test_configs_that_transformers_does_not_know(config: Any, injected: bool, tmp_path: Path) -> None:
    wrap = inject_adapter_in_model if injected else lambda settings, model: get_peft_model(model, settings)
    model = wrap(SpIELConfig(r=1, target_modules=["layer"]), Configured(config))
    assert len(deltas(model)) == 1
    with pytest.raises(ValueError, match="target_modules"):
        wrap(SpIELConfig(r=1), Configured(config))


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2))
ATTENTION = SpIELConfig(r=2, target_modules=["to_q", "to_v"])


def denoised(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(NOISE, 3, TEXT).sample


def test_a_unet_of_diffusers_is_trained_saved_loaded_and_merged(tmp_path: Path) -> None:
    model = get_peft_model(
        unet(), SpIELConfig(r=2, target_modules=["to_q", "to_v"], regrow_every=2, accumulation_steps=1)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(4):
        model(NOISE, 3, TEXT).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [report.step for report in model.base_model.cycle_log()] == [1, 3]
    model.eval()
    trained = denoised(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(denoised(PeftModel.from_pretrained(unet(), tmp_path)), trained)
    assert torch.equal(denoised(model.merge_and_unload()), trained)


def test_adapters_of_diffusers_can_be_added_switched_and_weighted() -> None:
    """`add_adapter`, `disable_adapters`, `set_adapters` with weights, `fuse_lora`, and the scale of one call."""
    model = unet()
    plain = denoised(model)
    model.add_adapter(copy.deepcopy(ATTENTION), adapter_name="a")
    model.add_adapter(SpIELConfig(r=2, target_modules=["to_q", "to_v"], seed=1), adapter_name="b")
    randomize(model)
    outputs = {}
    for weight in (0.0, 0.5, 1.0):
        model.set_adapters("a", weight)
        outputs[weight] = denoised(model)
        with torch.no_grad():
            model.set_adapters("a", 1.0)
            called = model(NOISE, 3, TEXT, cross_attention_kwargs={"scale": weight}).sample
        torch.testing.assert_close(called, outputs[weight], rtol=1e-5, atol=1e-6)
        assert {delta.scale for delta in deltas(model)} == {1.0}
    assert torch.equal(outputs[0.0], plain)
    assert not torch.allclose(outputs[1.0], plain) and not torch.allclose(outputs[1.0], outputs[0.5])
    halved = unet()
    halved.add_adapter(copy.deepcopy(ATTENTION), adapter_name="a")
    randomize(halved)
    for delta, weighted in zip(deltas(halved), [d for d in deltas(model) if d.run.adapter_name == "a"], strict=True):
        delta.values.data.copy_(weighted.values * 0.5)
    assert torch.equal(denoised(halved), outputs[0.5])
    model.set_adapters(["a", "b"], [0.5, 2.0])
    both = denoised(model)
    model.set_adapters("a", 1.0)
    assert torch.equal(denoised(model), outputs[1.0])
    model.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(denoised(model), outputs[0.5], rtol=1e-5, atol=1e-6)
    model.unfuse_lora()
    model.disable_adapters()
    assert torch.equal(denoised(model), plain) and not torch.allclose(both, outputs[1.0])


@pytest.mark.parametrize("weight", [0.0, 0.25, -1.0])
def test_scaled_deltas_are_trained_merged_and_read_with_their_scale(weight: float) -> None:
    """The oracle is an adapter whose values were multiplied before."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    fields = {"target_modules": ["0"], "density": 0.4, "regrow_every": 2, "accumulation_steps": 1}
    model, expected = (get_peft_model(copy.deepcopy(base), SpIELConfig(**fields)) for _ in range(2))
    for each in (model, expected):
        randomize(each)
    layer = model.base_model.model[0]
    layer.set_scale("default", weight)
    expected.base_model.model[0].spiel_delta["default"].values.data.mul_(weight)
    x = torch.randn(5, 8)
    assert torch.equal(model(x), expected(x))
    assert torch.equal(layer.get_delta_weight("default"), expected.base_model.model[0].get_delta_weight("default"))
    model(x).square().sum().backward()
    expected(x).square().sum().backward()
    ours, theirs = (each.base_model.model[0].spiel_delta["default"].values.grad for each in (model, expected))
    torch.testing.assert_close(ours, theirs * weight)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"scale of \['default'\] cannot change while they are merged"):
        layer.set_scale("default", 3.0)
    merged = model.base_model.model[0].get_base_layer().weight.clone()
    expected.merge_adapter()
    assert torch.equal(merged, expected.base_model.model[0].get_base_layer().weight)
    model.unmerge_adapter()
    layer.unscale_layer()
    assert layer.spiel_delta["default"].scale == 1.0


def test_scaled_candidates_are_measured_like_the_active_deltas() -> None:
    """With a scale s every gradient is s times that of the weight, at candidates too: what is grown starts alike."""
    models = []
    for scale in (1.0, 0.5):
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), SpIELConfig(target_modules=["0"], density=0.3, accumulation_steps=2)
        )
        model.base_model.model[0].set_scale("default", scale)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
        (model(x).square().sum()).backward()
        optimizer.step()
        models.append(deltas(model)[0].state.window)
    assert torch.equal(models[0].positions, models[1].positions)
    torch.testing.assert_close(models[0].sums * 0.5, models[1].sums)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1", None, True])
def test_a_scale_that_is_no_number_is_refused(bad: Any) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), SpIELConfig(target_modules=["0"], density=0.5))
    layer = model.base_model.model[0]
    for method in (lambda: layer.set_scale("default", bad), lambda: layer.scale_layer(bad)):
        with pytest.raises(ValueError, match="must be a finite number"):
            method()
    assert layer.spiel_delta["default"].scale == 1.0


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 12), nn.Embedding(10, 6), nn.Conv1d(4, 4, 3))


ALL = {"target_modules": ["0", "1", "2"], "density": 0.3}


@pytest.mark.parametrize("wrapped_inside", [True, False])
@pytest.mark.parametrize("init_weights", [True, False])
def test_models_on_the_meta_device_get_their_positions_from_to_empty(wrapped_inside: bool, init_weights: bool) -> None:
    config = SpIELConfig(**ALL, init_weights=init_weights)
    if wrapped_inside:
        with torch.device("meta"):
            model = get_peft_model(network(), config)
    else:
        with torch.device("meta"):
            base = network()
        model = get_peft_model(base, config)
    assert all(delta.indices.is_meta and delta.values.is_meta for delta in deltas(model))
    model.to_empty(device="cpu")
    usual = get_peft_model(network(), SpIELConfig(**ALL))
    for delta, other in zip(deltas(model), deltas(usual), strict=True):
        assert check_index_set(delta.indices, delta.numel) is None
        assert torch.equal(delta.indices, other.indices)
        assert bool(delta.values.any()) is not init_weights and torch.isfinite(delta.values).all()
    model.load_state_dict(usual.state_dict())
    for name, tensor in usual.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_to_empty_of_a_trained_adapter_starts_it_again() -> None:
    model = get_peft_model(network(), SpIELConfig(**ALL))
    expected = [delta.indices.clone() for delta in deltas(model)]
    randomize(model)
    for delta in deltas(model):
        delta.indices.copy_(torch.arange(delta.k))
        delta.state.step = 7
    model.to_empty(device="cpu")
    for delta, indices in zip(deltas(model), expected, strict=True):
        assert torch.equal(delta.indices, indices) and not delta.values.any() and delta.state.step == 0


def test_moves_and_casts_keep_an_adapter() -> None:
    model = get_peft_model(network(), SpIELConfig(**ALL))
    randomize(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "spiel" in name}
    model.to("cpu").share_memory().double().float()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


SMALL = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**SMALL))


def marian() -> PreTrainedModel:
    torch.manual_seed(0)
    return MarianMTModel(MarianConfig(**SMALL, pad_token_id=0, decoder_start_token_id=0, decoder_vocab_size=128))


TIED = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "shared"]},
    {"target_modules": ["q_proj", "decoder.embed_tokens"]},
    {"target_modules": ["lm_head", "encoder.embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["decoder.embed_tokens"]},
]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("fields", TIED, ids=str)
@pytest.mark.parametrize("build", [bart, marian])
def test_models_with_three_tied_weights_survive_merging_saving_and_loading(
    build: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = get_peft_model(build(), SpIELConfig(r=2, task_type="SEQ_2_SEQ_LM", **fields))
    randomize(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=IDS, labels=IDS).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS, labels=IDS).logits, adapted)
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path).eval()
        assert torch.equal(again(input_ids=IDS, labels=IDS).logits, merged(input_ids=IDS, labels=IDS).logits)


def test_weights_stay_tied_where_merging_leaves_them_alike(tmp_path: Path) -> None:
    model = get_peft_model(bart(), SpIELConfig(r=2, target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM"))
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.shared.weight is merged.model.encoder.embed_tokens.weight


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8))


@pytest.mark.parametrize("name", ["conv1d", "out_proj"])
def test_what_peft_refuses_in_mamba_models_is_refused(name: str) -> None:
    base = mamba()
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=f"Module '{name}' is incompatible with Mamba-based models"):
        get_peft_model(base, SpIELConfig(r=2, target_modules=["in_proj", name], task_type="CAUSAL_LM"))
    assert list(base.state_dict()) == before
    assert not any(isinstance(module, SpIELLayer) for module in base.modules())
