"""Models whose files use other names than their modules do, and models with more than two tied weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from support.adapters import spiel_config
from support.checkpoints import saved, tensors_of
from support.tensors import same_bits
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from spiel_peft import merge_adapter_into_checkpoint

IDS = torch.tensor([[1, 2, 3]])
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def llava(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **SHAPE)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **SHAPE)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, tie_word_embeddings=tied)
    return LlavaForConditionalGeneration(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **shape)).eval()


def out(model: nn.Module) -> Tensor:
    decoder = {"decoder_input_ids": IDS} if isinstance(model, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=IDS, **decoder).logits


def merged(
    kind: type[nn.Module], base: Path, targets: list[str], folder: Path
) -> tuple[nn.Module, nn.Module, list[str]]:
    """The adapted model, the merged checkpoint loaded, and the parameters that were untied."""
    model = get_peft_model(kind.from_pretrained(base), spiel_config(target_modules=targets, task_type=None)).eval()
    model.save_pretrained(folder / "adapter")
    report = merge_adapter_into_checkpoint(base, folder / "adapter", folder / "out")
    return model.base_model.model, kind.from_pretrained(folder / "out").eval(), report.untied


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens", "lm_head"])
def test_a_vision_language_model(tmp_path: Path, tied: bool, target: str) -> None:
    base = saved(llava(tied), tmp_path / "base")
    assert "language_model.model.embed_tokens.weight" in tensors_of(base)  # model.language_model... in the model
    adapted, loaded, untied = merged(LlavaForConditionalGeneration, base, [target, "fc1"], tmp_path)
    assert same_bits(out(loaded), out(adapted))
    assert untied == (["lm_head.weight"] if tied and target != "q_proj" else [])
    stays_tied = tied and target == "q_proj"
    config = loaded.config
    assert config.tie_word_embeddings == config.text_config.tie_word_embeddings == stays_tied


@pytest.mark.parametrize("target", ["q", "shared", "lm_head"])
def test_four_names_of_one_weight(tmp_path: Path, target: str) -> None:
    base = saved(t5(), tmp_path / "base")
    adapted, loaded, untied = merged(T5ForConditionalGeneration, base, [target], tmp_path)
    assert same_bits(out(loaded), out(adapted))
    apart = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"]
    assert sorted(untied) == ([] if target == "q" else apart)
