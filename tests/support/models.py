"""Tiny models with random weights, and a batch for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

# A batch for every language model below: their vocabulary has 40 tokens.
IDS = torch.tensor([[1, 5, 2, 9, 11], [7, 3, 30, 4, 9]])
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> nn.Module:
    """A Llama in eval mode; its weights are large enough for deltas and rounding to change its outputs.

    Args:
        fields: of `LlamaConfig`, such as `num_hidden_layers`.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **{**SHAPE, **fields})
    config.initializer_range = 0.2
    return LlamaForCausalLM(config).to(dtype).eval()


def logits(model: nn.Module) -> Tensor:
    """Outputs for `IDS`, in eval mode."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def tiny_gpt2(width: int = 16) -> nn.Module:
    """A GPT-2 of one block, in eval mode; its layers are transposed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=width, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval()


def tiny_bert() -> nn.Module:
    """A BERT classifier of one block, in eval mode."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    config.initializer_range = 0.3
    return BertForSequenceClassification(config).eval()


def tiny_t5(**sizes: int) -> nn.Module:
    """A T5 with one block on each side, in eval mode."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, **sizes}
    config = T5Config(vocab_size=40, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config).eval()


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Three linear layers ("0", "2", "4") with smooth activations."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 3)
    ).to(dtype)


def save_llama(folder: Path) -> None:
    """Save a Llama whose sizes bitsandbytes can quantize."""
    tiny_llama(hidden_size=32, intermediate_size=64).save_pretrained(folder)


def quantized_llama(folder: Path, bits: int = 4) -> nn.Module:
    """A 4-bit or 8-bit Llama, saved to ``folder/base`` and loaded as a user would."""
    save_llama(folder / "base")
    return load_quantized(folder / "base", bits)


def load_quantized(folder: Path, bits: int = 4) -> nn.Module:
    """Load a saved model in 4 or 8 bits, on the CPU."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**(nf4 if bits == 4 else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
