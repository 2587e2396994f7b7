"""The frozen models that variants are trained on, with their batches: SmolLM2 on the demo's text, and random Llamas."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from spiel_peft.finetune.base_model import demo_model, load_base, load_tokenizer
from spiel_peft.finetune.data import Example, demo_pairs, split_examples

_STREAM = "token_stream.pt"
_INIT_STD = 0.02


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


LLAMA_2_7B = LlamaShape(4096, 11008, 32, 32, 32, 32000)
LLAMA_2_13B = LlamaShape(5120, 13824, 40, 40, 40, 32000)
LLAMA_2_70B = LlamaShape(8192, 28672, 80, 64, 8, 32000)
TINY = LlamaShape(64, 128, 2, 4, 2, 128)


@dataclass(frozen=True)
class BaseSpec:
    """Describes a frozen model. It can be converted to JSON, so that other processes can build the same model.

    Attributes:
        checkpoint: folder that `keep_smollm2` filled, or None for a random Llama.
        shape: sizes of the random Llama.
        dtype: of the weights ("float32", "bfloat16").
        nf4: whether linear layers are bitsandbytes NF4 with double quantization, computing in `dtype`.
        device: of the weights.
    """

    checkpoint: str | None = None
    shape: LlamaShape | None = None
    dtype: str = "float32"
    nf4: bool = False
    device: str = "cpu"

    @staticmethod
    def from_json(entry: dict[str, Any]) -> BaseSpec:
        shape = entry["shape"]
        return BaseSpec(**{**entry, "shape": None if shape is None else LlamaShape(**shape)})

    def sliced(self, layers: int) -> BaseSpec:
        """The same model with fewer decoder layers."""
        assert self.shape is not None
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, layers=layers))

    def build(self) -> Any:
        """Build the model; its parameters are frozen."""
        if self.checkpoint is not None:
            logging.disable_progress_bar()
            model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=getattr(torch, self.dtype))
            for parameter in model.parameters():
                # Copied, as it depends on the kernel whether memory of a mapped file is counted as resident.
                parameter.data = parameter.data.clone()
            return model.to(self.device).requires_grad_(False)
        if self.shape is None:
            raise ValueError("a base needs a checkpoint or a shape")
        return random_llama(self.shape, getattr(torch, self.dtype), torch.device(self.device), self.nf4)

    def batches(self, batch_size: int, tokens: int) -> list[Tensor]:
        """Batches ``[batch_size, tokens]``: of real text for SmolLM2, otherwise of random ids."""
        if self.checkpoint is not None:
            return packed_batches(torch.load(Path(self.checkpoint) / _STREAM), batch_size, tokens)
        assert self.shape is not None
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(self.shape.vocabulary, (8, batch_size, tokens), generator=generator)
        return [ids.to(self.device) for ids in drawn]


def keep_smollm2(folder: Path) -> BaseSpec:
    """Dequantize SmolLM2 and tokenize the demo's text into a folder, once for all processes of a benchmark."""
    with contextlib.redirect_stderr(io.StringIO()):
        task = load_task()
        task.model.save_pretrained(folder)
    torch.save(task.stream, folder / _STREAM)
    return BaseSpec(checkpoint=str(folder))


def llama_config(shape: LlamaShape, dtype: torch.dtype) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=dtype,
    )


def random_llama(shape: LlamaShape, dtype: torch.dtype, device: torch.device, nf4: bool) -> Any:
    """Build a frozen Llama with random weights, layer by layer on the device.

    With `nf4`, at most one unquantized matrix of a layer exists at a time.
    """
    config = llama_config(shape, dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator(device=device).manual_seed(0)
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            data = torch.ones(parameter.shape, dtype=dtype, device=device)
            if data.dim() > 1:
                data.normal_(0.0, _INIT_STD, generator=generator)
            setattr(module, key, nn.Parameter(data, requires_grad=False))
        if nf4 and isinstance(module, nn.Linear) and module is not model.lm_head:
            replace_by_nf4(model, name, dtype)
    # Buffers of this module are computed from the config.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if nf4:
        model.is_loaded_in_4bit = True  # PEFT's LoRA reads this to choose its 4-bit layers
    return model


def replace_by_nf4(model: nn.Module, name: str, compute_dtype: torch.dtype) -> None:
    """Quantize the linear layer of this name, in place, and free its weight."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(name)
    quantized = nf4_linear(module.weight.data, compute_dtype)
    module.weight = None  # type: ignore[assignment]
    quantized.bias = module.bias
    setattr(model.get_submodule(parent), child, quantized)


def nf4_linear(weight: Tensor, compute_dtype: torch.dtype) -> nn.Module:
    """A bitsandbytes layer with this weight ``[out, in]`` quantized to NF4, double quantization.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    import bitsandbytes as bnb

    rows, cols = weight.shape
    layer = bnb.nn.Linear4bit(
        cols, rows, bias=False, compute_dtype=compute_dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    return layer.to(weight.device)


@dataclass(frozen=True)
class DemoTask:
    """Model and data of the demo: SmolLM2-135M-Instruct in float32, and the tokens of all training pairs.

    Attributes:
        stream: int64 ``[n]``, the pairs one after the other.
    """

    model: Any
    stream: Tensor


def load_task(max_length: int = 128) -> DemoTask:
    """Load the demo's model and data; cuts pairs to at most `max_length` tokens."""
    source = demo_model()
    train, _ = split_examples(demo_pairs().examples, 0.1)
    tokenizer = load_tokenizer(source)
    stream = [token for example in train for token in _tokens(example, tokenizer)[:max_length]]
    return DemoTask(load_base(source, bf16=False, load_in_4bit=False), torch.tensor(stream))


def _tokens(example: Example, tokenizer: Any) -> list[int]:
    messages = [*example.messages, {"role": "assistant", "content": example.answer}]
    return list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])


def packed_batches(stream: Tensor, batch_size: int, tokens: int) -> list[Tensor]:
    """Cut a stream of tokens into full batches ``[batch_size, tokens]``, without padding.

    Raises:
        ValueError: the stream does not fill one batch.
    """
    size = batch_size * tokens
    whole = stream[: stream.numel() // size * size]
    if whole.numel() == 0:
        raise ValueError(f"{stream.numel()} tokens do not fill one batch of {batch_size} x {tokens}")
    return list(whole.view(-1, batch_size, tokens))
