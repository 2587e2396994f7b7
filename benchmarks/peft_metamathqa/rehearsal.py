"""A copy of the harness that runs in seconds on a CPU: the same code, a tiny model, made-up data, few steps."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spiel_peft import adapter_facts

from .harness import FILES, SETTINGS, Harness

STAND_INS = Path(__file__).parent / "stand_ins.py"
STEPS, CLOSES = 30, 2  # the defaults close at steps 5 and 25
TRAINING_ROWS, VALIDATION_ROWS, TEST_ROWS, TEXTS = 160, 50, 10, 20
LETTERS = "abcd"
# So wide that no budget is larger than its weight: rank 32 trains 60% of a v_proj.
SIZES = {
    "hidden_size": 160,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def copy(harness: Harness, folder: Path) -> Harness:
    """Copy the harness's code into a folder, and make model and data there.

    Data sets lie in folders with the names that they have on the Hub; `datasets.load_dataset` finds those first.
    """
    for name in FILES:
        shutil.copy(harness.folder / name, folder / name)
    settings = json.loads((folder / SETTINGS).read_text())
    settings |= {"model_id": "model", "max_steps": STEPS, "eval_steps": STEPS // 2}
    settings["generation_kwargs"]["max_new_tokens"] = 8
    (folder / SETTINGS).write_text(json.dumps(settings))
    for name in ("results", "temporary_results", "cancelled_results", "saved"):
        (folder / name).mkdir()
    _save_model(folder / "model")
    _save_data(folder)
    # The harness saves adapters in temporary folders.
    folders = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder / "saved")}
    return Harness(folder, harness.environment | folders, f"runpy.run_path({str(STAND_INS)!r})")


def check_adapters(rehearsed: Harness, count: int) -> None:
    """Check that so many adapters were saved, and that the cycle closed as often as it had to in each of their runs.

    Raises:
        ValueError: it did not, or an adapter is missing.
    """
    saved = [adapter_facts(path.parent) for path in (rehearsed.folder / "saved").glob("*/adapter_config.json")]
    training = [(facts.training.step, facts.training.closes) for facts in saved if facts.training]
    if training != [(STEPS, CLOSES)] * count:
        rule = f"{count} adapters must have been saved after {STEPS} steps and {CLOSES} closes"
        raise ValueError(f"{rule}, got steps and closes {training}")


def _save_model(folder: Path) -> None:
    """Save a Llama, and a tokenizer with one token per byte.

    The harness demands that the model's loss is between 1 and 2 on its texts. Those are drawn from four letters, so it
    comes down to log 4 = 1.39 as soon as a model has learnt which letters there are.
    """
    vocabulary = {sign: place for place, sign in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    coder = Tokenizer(models.BPE(vocabulary, []))
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=coder, eos_token="<end>")
    tokenizer.save_pretrained(folder)

    letters = torch.tensor(tokenizer(LETTERS)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), eos_token_id=0, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(torch.inf)
    while loss > 1.5:
        ids = letters[torch.randint(len(letters), (8, 64), generator=generator)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)


def _save_data(folder: Path) -> None:
    """Write the three data sets: sums in the formats of MetaMathQA and GSM8K, and texts in that of FineWiki."""
    draw = random.Random(0)
    sums = [(draw.randrange(50), draw.randrange(50)) for _ in range(TRAINING_ROWS + VALIDATION_ROWS + TEST_ROWS)]
    asked = [(f"What is {a} plus {b}?", f"{a} + {b} = {a + b}.\n#### {a + b}") for a, b in sums]
    training = [
        {
            "type": "GSM_Rephrased",
            "query": question,
            "response": f"{answer}\nThe answer is: {answer.rpartition(' ')[2]}",
            "original_question": question,
        }
        for question, answer in asked[:TRAINING_ROWS]
    ]
    held_out = [{"question": question, "answer": answer} for question, answer in asked[TRAINING_ROWS:]]
    texts = [{"text": "".join(draw.choices(LETTERS, k=100))} for _ in range(TEXTS)]
    _save_rows(folder / "meta-math" / "MetaMathQA" / "train.jsonl", training)
    _save_rows(folder / "openai" / "gsm8k" / "main" / "train.jsonl", held_out[:VALIDATION_ROWS])
    _save_rows(folder / "openai" / "gsm8k" / "main" / "test.jsonl", held_out[VALIDATION_ROWS:])
    header = "---\nconfigs:\n- config_name: main\n  data_dir: main\n---\n"
    (folder / "openai" / "gsm8k" / "README.md").write_text(header)
    _save_rows(folder / "HuggingFaceFW" / "finewiki" / "train.jsonl", texts)


def _save_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
