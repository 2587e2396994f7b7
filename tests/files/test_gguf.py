"""A merged checkpoint written as GGUF, for llama.cpp, is the same model."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from support.checkpoints import SHARD, loaded, saved, tensors_of, trained_adapter, unmerged_logits
from support.models import logits, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from spiel_peft import merge_adapter_into_checkpoint


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order in which GGUF keeps the halves of each rotated pair."""
    rows, cols = weight.shape
    return weight.view(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_gguf(config: PreTrainedConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """Write a Llama as llama.cpp's convert_hf_to_gguf.py does, without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in tensors.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        tensor = permuted(tensor, heads) if heads else tensor
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_checkpoints_become_gguf_files(tmp_path: Path, tied: bool) -> None:
    base = saved(tiny_llama(tied=tied, dtype=torch.bfloat16), tmp_path / "base", SHARD)
    adapter = trained_adapter(base, tmp_path / "adapter", torch.float32, target_modules="all-linear")
    merge_adapter_into_checkpoint(base, adapter, tmp_path / "merged", dtype="float32")
    config = loaded(tmp_path / "merged").config
    write_gguf(config, tensors_of(tmp_path / "merged"), tmp_path / "merged" / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", gguf_file="model.gguf", dtype=torch.float32)
    for name, parameter in loaded(tmp_path / "merged").named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert torch.allclose(logits(model), unmerged_logits(base, adapter, torch.float32), atol=1e-5)
