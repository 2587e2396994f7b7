#!/usr/bin/env python
"""SpIEL on a model that is not of transformers: a language model whose words have several sense embeddings.

In the manner of PolyLM (Ansell et al., 2021), without its two losses that keep senses apart. The script trains a model
on made-up sentences with ambiguous words, freezes it and teaches it new uses of these words with sparse deltas on the
sense table, the linear layers and a bag of words. No data, no download, half a minute on a CPU:

    python examples/sense_lm.py [--growth momentum]
"""

import argparse
import random

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from spiel_peft import SpIELConfig, SpIELOptimizer

PAD, MASK = 0, 1
TOPICS = {
    "river": ["water", "boat", "fish", "shore", "bridge", "flood"],
    "money": ["loan", "cash", "credit", "account", "debt", "interest"],
    "music": ["song", "guitar", "rhythm", "tune", "concert", "drum"],
    "sport": ["team", "goal", "match", "coach", "score", "league"],
}
# Topics in which the ambiguous words occur: in pretraining, and in the data for the deltas.
BEFORE = {"bank": ("river", "money"), "note": ("music", "money"), "pitch": ("music", "sport")}
AFTER = {"bank": ("river", "sport"), "note": ("music", "sport"), "pitch": ("river", "money")}
VOCABULARY = ["<pad>", "<mask>", *BEFORE, *(word for topic in TOPICS.values() for word in topic)]


class Block(nn.Module):
    """One transformer layer over ``[batch, length, width]``; attention sees the words, ``real [batch, length]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm_in, self.norm_mid = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        parts = [part(self.norm_in(x)) for part in (self.query, self.key, self.value)]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, real[:, None, None, :]).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


class SenseLM(nn.Module):
    """Masked language model over words with `senses` embeddings each; sense s of word w is row ``w * senses + s``.

    The output looks rows of the table up as the input does, instead of reading ``table.weight``: adapters of any PEFT
    method change what a module computes, not what is stored in it.
    """

    def __init__(self, words: int, senses: int = 3, width: int = 48, heads: int = 4, length: int = 16) -> None:
        super().__init__()
        self.words, self.senses = words, senses
        self.table, self.positions = nn.Embedding(words * senses, width, padding_idx=PAD), nn.Embedding(length, width)
        self.topic = nn.EmbeddingBag(words, width, mode="mean", padding_idx=PAD)
        self.prior = nn.Embedding(words, senses)
        nn.init.zeros_(self.prior.weight)
        self.disambiguation, self.prediction = Block(width, heads), Block(width, heads)
        self.to_sense, self.to_word = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Log-probabilities ``[batch, length, words]`` of words ``ids [batch, length]``, PAD at the end."""
        several = (ids > MASK)[..., None]  # the mask and the padding have one embedding
        embedded = self.table(ids[..., None] * self.senses + several * torch.arange(self.senses))
        place = self.positions(torch.arange(ids.shape[1])) + self.topic(ids)[:, None]
        prior = self.prior(ids)
        context = self.disambiguation((prior.softmax(-1)[..., None] * embedded).sum(-2) + place, ids != PAD)
        senses = (torch.einsum("blsd,bld->bls", embedded, self.to_sense(context)) + prior).softmax(-1)
        hidden = self.prediction((senses[..., None] * embedded).sum(-2) + place, ids != PAD)
        logits = self.to_word(hidden) @ self.table(torch.arange(self.words * self.senses)).T
        return logits.log_softmax(-1).unflatten(-1, (self.words, self.senses)).logsumexp(-1)


def make_sentences(uses: dict[str, tuple[str, str]], count: int, seed: int, length: int = 7) -> Tensor:
    """Sentences ``[count, length]`` of one ambiguous word among at least three words of one of its topics, padded."""
    draw, ids = random.Random(seed), torch.full((count, length), PAD)
    for row in ids:
        word = draw.choice(list(uses))
        words = draw.choices(TOPICS[draw.choice(uses[word])], k=draw.randrange(3, length))
        words.insert(draw.randint(0, len(words)), word)
        row[: len(words)] = torch.tensor([VOCABULARY.index(word) for word in words])
    return ids


def masked_loss(model: nn.Module, sentences: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cross entropy in nats of the masked words of random sentences: one word in four, and at least one in each."""
    ids = sentences[torch.randint(len(sentences), (size,), generator=generator)]
    chance = torch.rand(ids.shape, generator=generator).masked_fill(ids == PAD, 2.0)
    masked = (chance < 0.25) | (chance == chance.min(-1, keepdim=True).values)
    return F.nll_loss(model(ids.masked_fill(masked, MASK))[masked], ids[masked])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, sentences: Tensor, steps: int, size: int = 64) -> None:
    """An ordinary training loop; the SpIELOptimizer also closes cycles."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        masked_loss(model.train(), sentences, size, generator).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(model: nn.Module, sentences: Tensor) -> float:
    return float(masked_loss(model.eval(), sentences, 256, torch.Generator().manual_seed(1)))


def adapt(model: nn.Module, growth: str, **settings: object) -> PeftModel:
    """Put deltas on linear layers, embeddings, and (with `target_parameters`) bare parameters and an EmbeddingBag."""
    names = ["table", "prior", "query", "key", "value", "out", "up", "down", "to_sense", "to_word"]
    targets = {"target_modules": names, "target_parameters": ["topic.weight"]}
    return get_peft_model(model, SpIELConfig(growth=growth, **{"density": 0.05, **targets, **settings}))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", choices=["accumulated_gradient", "momentum"], default="accumulated_gradient")
    parser.add_argument("--pretraining-steps", type=int, default=400, help="of the whole model")
    parser.add_argument("--steps", type=int, default=200, help="of the deltas")
    args = parser.parse_args(argv)
    old, new = make_sentences(BEFORE, 500, seed=3), make_sentences(AFTER, 500, seed=4)

    def report(what: str, model: nn.Module) -> None:
        print(f"{what}: loss on old uses {held_out_loss(model, old):.3f}, on new ones {held_out_loss(model, new):.3f}")

    torch.manual_seed(0)
    base, sentences = SenseLM(len(VOCABULARY)), make_sentences(BEFORE, 2000, seed=1)
    train(base, torch.optim.AdamW(base.parameters(), lr=3e-3), sentences, args.pretraining_steps)
    report("trained whole", base)
    model = adapt(base, args.growth)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer = SpIELOptimizer(optimizer, model, total_steps=args.steps)
    train(model, optimizer, make_sentences(AFTER, 2000, seed=2), args.steps)
    report("with deltas", model)
    with model.disable_adapter():
        report("without them", model)
    report("merged", model.merge_and_unload())


if __name__ == "__main__":
    main()
