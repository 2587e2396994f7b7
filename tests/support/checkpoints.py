"""Folders of tiny models, written and changed for the tests of extraction and merging."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from support.adapters import adapted
from support.models import logits

# Small enough that a tiny Llama takes several files.
SHARD = "5KB"


def saved(model: nn.Module, folder: Path, shard: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(folder: Path, dtype: torch.dtype | str = "auto") -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def changed(model: nn.Module, size: float = 0.01, seed: int = 5) -> nn.Module:
    """The model with every parameter moved a little, as fine-tuning would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype))
    return model


def trained_adapter(base: Path, folder: Path, dtype: torch.dtype | str = "auto", **config: object) -> Path:
    """An adapter with random deltas, and random changes of the other trained parameters, saved."""
    model = adapted(loaded(base, dtype), **config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "spiel_delta" not in name:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype))
    model.save_pretrained(folder)
    return folder


def unmerged_logits(base: Path, adapter: Path, dtype: torch.dtype | str = "auto") -> Tensor:
    return logits(PeftModel.from_pretrained(loaded(base, dtype), adapter))


def edit_file(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a safetensors file after `edit` has changed its dict of tensors in place."""
    tensors = load_file(path)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class PeakMemory:
    """Bytes by which this process's resident memory grew at most while the block ran."""

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._start = self._peak = _resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, _resident())
            time.sleep(0.001)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.growth = self._peak - self._start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
