#!/usr/bin/env python
"""Supervised fine-tuning of a 4-bit base model (NF4, bitsandbytes), as in QLoRA.

    python examples/sft_4bit.py --model meta-llama/Llama-2-7b-hf --data chats.jsonl --output-dir adapter

The adapter belongs to the unquantized base as well: merge it there, where nothing is rounded to 4 bits.

    spiel-peft merge adapter --base Llama-2-7b-hf --out merged
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from spiel_peft import SpIELCallback, SpIELConfig


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
    parser.add_argument(
        "--data", required=True, help='jsonl file of {"messages"}, {"prompt", "completion"} or {"text"}'
    )
    parser.add_argument("--output-dir", required=True, help="folder for the adapter")
    parser.add_argument("--max-steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args(argv)

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": device}
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            warmup_steps=10,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            gradient_checkpointing=True,
            bf16=True,
            use_cpu=device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        # Deltas are float32, although base and computation are not: bfloat16 would lose most small updates.
        peft_config=SpIELConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[SpIELCallback()],
    )
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
