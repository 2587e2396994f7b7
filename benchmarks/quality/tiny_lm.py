"""The base model of tier A: a Llama-shaped language model of 3 million parameters, pretrained once on English.

``python -m benchmarks.quality.tiny_lm`` is the recipe that made the files in `FOLDER`, which are committed; it takes
about an hour on one core. Everything that uses the model loads those files and checks their hash.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from ..environment import describe
from . import corpora

FOLDER = Path(__file__).parent / "tiny_lm"
WEIGHTS, TOKENIZER, RECORD = (FOLDER / name for name in ("model.safetensors", "tokenizer.json", "pretraining.json"))

VOCABULARY = 2048
END = 0  # the token after every chapter, and the padding
SEED = 0
STEPS, BATCH_SIZE, TOKENS = 5000, 16, 128
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 3e-3, 0.1, 200
EVALUATE_EVERY = STEPS // 10


def config() -> LlamaConfig:
    """3.05 million parameters, 2.65 million of them in the linear layers of the blocks."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )


def tokenizer() -> Tokenizer:
    """The byte-level BPE tokenizer, trained on the English training books."""
    return Tokenizer.from_file(str(TOKENIZER))


def load() -> LlamaForCausalLM:
    """The pretrained model in float32.

    Raises:
        RuntimeError: the weights are not those that `RECORD` names.
    """
    expected = json.loads(RECORD.read_text())["sha256"]
    if hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() != expected:
        raise RuntimeError(f"{WEIGHTS} is not the file that was pretrained (SHA-256 {expected}): take it from git")
    model = LlamaForCausalLM(config())
    # The tied output layer is no entry of its own.
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}, strict=False)
    model.tie_weights()
    return model.eval()


def chapters(verses: dict[corpora.Verse, str], split: str) -> list[str]:
    """The text of every chapter of a split's books, verses joined by spaces, in order."""
    texts: dict[tuple[str, int], list[str]] = {}
    for (book, chapter, _), text in verses.items():
        if corpora.split_of(book) == split:
            texts.setdefault((book, chapter), []).append(text)
    return [" ".join(parts) for parts in texts.values()]


def stream(texts: list[str], coder: Tokenizer) -> Tensor:
    """The tokens of all texts, one after the other, `END` behind each: int64 ``[n]``."""
    return torch.tensor([token for coded in coder.encode_batch(texts) for token in [*coded.ids, END]])


def windows(tokens: Tensor, length: int) -> Tensor:
    """A stream cut into rows ``[n // length, length]``; the rest is left out."""
    return tokens[: tokens.numel() // length * length].view(-1, length)


@torch.no_grad()
def loss_on(model: Any, rows: Tensor, batch_size: int = 32) -> float:
    """Cross entropy of the next token in nats, over all rows ``[n, length]``."""
    was_training = model.training
    model.eval()
    losses = [float(model(part, labels=part, use_cache=False).loss) * len(part) for part in rows.split(batch_size)]
    model.train(was_training)
    return sum(losses) / len(rows)


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    coder.train_from_iterator(texts, trainer)
    return coder


def _batches(rows_of: Tensor) -> Any:
    """Endless batches: the stream is cut anew, from another offset and in another order, in every pass."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        offset = int(torch.randint(TOKENS, (), generator=generator))
        rows = windows(rows_of[offset:], TOKENS)
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order.split(BATCH_SIZE):
            if len(chosen) == BATCH_SIZE:
                yield rows[chosen]


def pretrain() -> None:
    """Train tokenizer and model and write both, with a record of how the loss fell."""
    FOLDER.mkdir(exist_ok=True)
    verses = corpora.verses(corpora.ENGLISH)
    texts = chapters(verses, "train")
    coder = _train_tokenizer(texts)
    coder.save(str(TOKENIZER))
    held_out = windows(stream(chapters(verses, "validation"), coder), TOKENS)
    batches = _batches(stream(texts, coder))
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config()).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, STEPS)
    curve = []
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        ids = next(batches)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % EVALUATE_EVERY == 0:
            curve.append({"step": step, "train": float(loss), "validation": loss_on(model, held_out)})
            print(f"{curve[-1]} {time.perf_counter() - began:.0f} s", flush=True)
    # bfloat16 halves the file; the rounded weights are the model.
    save_file({name: p.detach().bfloat16() for name, p in model.named_parameters()}, WEIGHTS)
    record = {
        **describe("cpu"),
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "seed": SEED,
        "steps": STEPS,
        "tokens_per_step": BATCH_SIZE * TOKENS,
        "curve": curve,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"as loaded: validation {loss_on(load(), held_out):.4f}")


if __name__ == "__main__":
    pretrain()
