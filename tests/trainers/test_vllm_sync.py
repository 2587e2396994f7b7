"""GRPO with vLLM merges, sends and unmerges at every sync: exact for both sides, however often.

vLLM itself is not needed: TRL's own generator of the weights to be sent runs here.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from support.adapters import deltas_of, log_of
from support.adapters import train as train_a_little
from support.models import quantized_llama
from support.runs import assert_same_run
from torch import Tensor, nn
from transformers import TrainerCallback

from .helpers import adapted, config, tiny_llama
from .trl_runs import KINDS

# Older versions of TRL synchronize in other ways.
DistributedBackend = pytest.importorskip("trl.distributed").DistributedBackend
VLLMGeneration = pytest.importorskip("trl.generation.vllm_generation").VLLMGeneration

SYNCS = 50


def sent(model: PeftModel) -> dict[str, Tensor]:
    """The weights that one sync of TRL sends, by vLLM's names; the model is merged only during the sync."""
    sender = SimpleNamespace(model=model, _dist=DistributedBackend(Accelerator(cpu=True)), mode="server")
    sender._fix_param_name_to_vllm = lambda *args, **kwargs: VLLMGeneration._fix_param_name_to_vllm(
        sender, *args, **kwargs
    )
    return {name: tensor.clone() for name, tensor in VLLMGeneration._iter_named_params(sender)}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_syncs_change_no_bit(dtype: torch.dtype) -> None:
    model = adapted(tiny_llama(dtype=dtype), target_modules="all-linear")
    train_a_little(model, 5)
    before, first = bits(model), sent(model)
    for _ in range(SYNCS):
        assert_same(sent(model), first)
    assert_same(bits(model), before)


def test_what_is_sent_is_the_merged_model_under_its_own_names() -> None:
    """Every SpIEL parameter has the prefix by which TRL leaves it out."""
    model = adapted(target_modules="all-linear")
    train_a_little(model, 5)
    ours = [name for name, _ in model.named_parameters() if ".base_layer" not in name]
    base_names = {name for name, _ in tiny_llama().named_parameters()}
    added = [name for name in ours if name.removeprefix("base_model.model.") not in base_names]
    assert len(added) == 14 and all(model.prefix in name for name in added)
    got = sent(model)
    merged = dict(model.merge_and_unload().named_parameters())
    assert got.keys() == merged.keys() == base_names
    assert all(torch.equal(got[name], merged[name]) for name in merged)
    assert any(not torch.equal(got[name], p) for name, p in tiny_llama().named_parameters())


def test_a_4_bit_base_gets_its_packed_bytes_back(tmp_path: Path) -> None:
    model = adapted(quantized_llama(tmp_path), target_modules="all-linear")
    train_a_little(model, 5)
    before = bits(model)
    for _ in range(3):
        with pytest.warns(UserWarning, match="Quantization lost|4-bit"):
            sent(model)
    assert_same(bits(model), before)


class Sync(TrainerCallback):
    """Syncs where GRPO does: before it generates, with deltas of the last step and, at times, an open window."""

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.last = sent(model)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_run_with_syncs_equals_one_without(name: str, tmp_path: Path) -> None:
    models, sync = [], Sync()
    for callbacks in ([], [sync]):
        trainer = KINDS[name].build(tiny_llama(), tmp_path, config(), max_steps=7)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        models.append(trainer.model)
    assert_same_run(*models)
    assert [report.step for report in log_of(models[0])] == [2, 6]
    weight = deltas_of(models[0])["model.layers.0.self_attn.q_proj"]
    synced = sync.last["model.layers.0.self_attn.q_proj.weight"]
    assert 0 < int((synced != tiny_llama().model.layers[0].self_attn.q_proj.weight).sum()) <= weight.k
