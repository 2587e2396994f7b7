#!/usr/bin/env python
"""Train a causal language model with SpIEL in an Accelerate loop, on as many processes as the config file says.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/train.py \
        --model meta-llama/Llama-2-70b-hf --text corpus.txt --output adapter

The loop knows neither SpIEL nor FSDP: what makes it SpIEL is the config.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from spiel_peft import SpIELConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per process and step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    return parser.parse_args()


def sequences(args: argparse.Namespace) -> TensorDataset:
    """Cut the text into pieces of `--tokens` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"))["input_ids"])
    pieces = ids.numel() // args.tokens
    if pieces == 0:
        raise SystemExit(f"{args.text} has {ids.numel()} tokens, fewer than --tokens {args.tokens}")
    return TensorDataset(ids[: pieces * args.tokens].view(pieces, args.tokens))


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    set_seed(0)  # every process has to begin with the same deltas
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    config = SpIELConfig(r=args.r, target_modules="all-linear", task_type="CAUSAL_LM", total_steps=args.steps)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(sequences(args), args.batch_size, shuffle=True, drop_last=True, generator=order)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    step = 0
    while step < args.steps:
        for (ids,) in loader:
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                accelerator.print(f"step {step}: loss {loss.item():.3f}")
            if step == args.steps:
                break
    tensors = accelerator.get_state_dict(model)  # gathers; every process takes part
    accelerator.unwrap_model(model).save_pretrained(
        args.output, state_dict=tensors, is_main_process=accelerator.is_main_process
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
