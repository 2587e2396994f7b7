#!/usr/bin/env python
"""Preference tuning with TRL's DPO. The reference model is the base without its deltas; no second one is loaded.

    python examples/dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data preferences.jsonl --output-dir adapter

A line of the data is {"prompt": ..., "chosen": ..., "rejected": ...}, of strings or of lists of messages.
"""

import argparse

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from spiel_peft import SpIELCallback, SpIELConfig


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument("--data", required=True, help="jsonl file; a tenth of it is held out")
    parser.add_argument("--output-dir", required=True, help="folder for the adapter")
    parser.add_argument("--max-steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    args = parser.parse_args(argv)

    data = load_dataset("json", data_files=args.data, split="train").train_test_split(0.1, seed=0)
    trainer = DPOTrainer(
        model=args.model,
        args=DPOConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            warmup_steps=10,
            beta=0.1,
            per_device_train_batch_size=4,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=SpIELConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[SpIELCallback()],
    )
    trainer.train()
    found = trainer.evaluate()
    # Before training the loss is log 2 = 0.693 and the margin 0: policy and reference are the same.
    print(f"held-out loss {found['eval_loss']:.3f}, margin of rewards {found['eval_rewards/margins']:.3f}")
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
