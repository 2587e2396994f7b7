"""FSDP2 on a transformer: transposed layers, embeddings, tied weights, through Accelerate; each run is that of DDP."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from peft import get_peft_model
from support.adapters import trainable
from support.ranks import launch, results_of, run_here
from transformers import GPT2Config, GPT2LMHeadModel

from distributed.fsdp_on_cpu import allow_fsdp_on_cpu, reset_accelerate
from distributed.runs import assert_lockstep, snapshot
from distributed.sharded import Snapshots
from spiel_peft import SpIELConfig

RANKS, STEPS = 2, 7
# Accelerate's settings; the tied output layer is sharded together with the embedding.
BLOCKS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
SPARING = {**BLOCKS, "cpu_ram_efficient_loading": True, "activation_checkpointing": True}
CASES: dict[str, dict[str, Any]] = {
    "tied, not adapted": {"targets": ["c_attn", "c_fc", "c_proj", "wpe"], "tied": True, "plugin": BLOCKS},
    "embedding and output layer": {
        "targets": ["c_attn", "c_fc", "wte", "wpe", "lm_head"],
        "tied": False,
        "plugin": SPARING,
    },
    "tied and adapted": {"targets": ["wte", "lm_head"], "tied": True, "plugin": BLOCKS, "ensure_weight_tying": True},
}


def train(rank: int, ddp: bool, targets: list[str], tied: bool, plugin: dict[str, Any], **fields: Any) -> Snapshots:
    reset_accelerate()
    fsdp = None if ddp else FullyShardedDataParallelPlugin(fsdp_version=2, **plugin)
    accelerator = Accelerator(cpu=True, fsdp_plugin=fsdp)
    torch.manual_seed(0)
    sizes = {"vocab_size": 41, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    base = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, tie_word_embeddings=tied))
    config = SpIELConfig(
        density=0.05, target_modules=targets, total_steps=14, regrow_every=4, accumulation_steps=2, **fields
    )
    model = get_peft_model(base, config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=5e-3))
    model.train()
    out = []
    for number in range(STEPS):
        ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(10 * number + rank))
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        out.append(snapshot(model, optimizer.optimizer))
    return out


SCENARIOS = {
    f"{'ddp' if ddp else 'fsdp2'}, {name}": partial(train, ddp=ddp, **case)
    for name, case in CASES.items()
    for ddp in (True, False)
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch(__file__, tmp_path_factory.mktemp("models"), RANKS)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_model_is_trained_as_a_whole_one(launched: dict[str, list[Any]], name: str) -> None:
    by_rank = results_of(launched, f"fsdp2, {name}")
    assert_lockstep([*by_rank, results_of(launched, f"ddp, {name}")[0]])
    assert (by_rank[0][-1]["replaced"] > 0).all() and by_rank[0][-1]["replaced"].numel() == 2


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    run_here(SCENARIOS, RANKS)
