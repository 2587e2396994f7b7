#!/usr/bin/env python
"""Supervised fine-tuning with TRL: SpIELConfig takes the place of LoraConfig, and nothing else changes.

    python examples/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --output-dir adapter

A line of the data is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}, as TRL takes them.
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from spiel_peft import SpIELCallback, SpIELConfig


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--data", required=True, help="jsonl file; a tenth of it is held out")
    parser.add_argument("--output-dir", required=True, help="folder for the adapter")
    parser.add_argument("--max-steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="about a third of what LoRA needs")
    args = parser.parse_args(argv)

    data = load_dataset("json", data_files=args.data, split="train").train_test_split(0.1, seed=0)
    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            warmup_steps=10,  # past the first close of the cycle, after accumulation_steps=5
            per_device_train_batch_size=4,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        # As many trained values as LoRA of rank 16 has.
        peft_config=SpIELConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[SpIELCallback()],  # logs how deltas move; the cycle runs without it, too
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
