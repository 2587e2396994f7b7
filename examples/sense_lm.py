#!/usr/bin/env python
"""SpIEL on a model that transformers knows nothing of: a language model whose words have several sense embeddings.

In the manner of PolyLM (Ansell et al., 2021): a disambiguation layer looks at a sentence and says how probable each
sense of each word is there; the mean of its senses by these probabilities is a word's input to a prediction layer,
which predicts masked words as the sum over their senses. (The two losses with which PolyLM keeps senses apart are
left out.) The script trains such a model on sentences that it makes up, in which some words are ambiguous, then
freezes it and teaches it new uses of these words with sparse deltas on the sense table, the linear layers and a bag of
words. No data, no download, half a minute on a CPU.

    python examples/sense_lm.py                     # accumulated gradient (SpIEL-AG)
    python examples/sense_lm.py --growth momentum   # SpIEL-MA

PEFT's part is in `adapt` and `main`. Everything above them is an ordinary PyTorch model and training loop.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from _args import _Parser, positive_int
from _report import field, heading
from spiel_peft import SpIELConfig, SpIELOptimizer

PAD, MASK = 0, 1

# -- the model -------------------------------------------------------------------------------------


class Block(nn.Module):
    """One transformer layer over ``[batch, length, width]``; attention sees the whole sentence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in, self.norm_mid = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """``real [batch, length]`` is False at padding."""
        y = self.norm_in(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


class SenseLM(nn.Module):
    """Masked language model over words with `senses` embeddings each.

    Sense s of word w is row ``w * senses + s`` of the table, which is input and output embedding in one. The output
    side looks its rows up as the input side does, instead of reading ``table.weight``: adapters of any PEFT method
    change what a module computes, not what is stored in it.
    """

    def __init__(self, words: int, senses: int = 3, width: int = 48, heads: int = 4, length: int = 16) -> None:
        super().__init__()
        self.words, self.senses = words, senses
        self.table = nn.Embedding(words * senses, width, padding_idx=PAD)
        self.positions = nn.Embedding(length, width)
        self.topic = nn.EmbeddingBag(words, width, mode="mean", padding_idx=PAD)
        self.prior = nn.Embedding(words, senses)
        nn.init.zeros_(self.prior.weight)
        self.disambiguation, self.prediction = Block(width, heads), Block(width, heads)
        self.to_sense, self.to_word = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of words ``[batch, length, words]`` and of senses ``[batch, length, senses]``.

        Args:
            ids: ``[batch, length]`` words, PAD at the end.
        """
        real = ids != PAD
        rows = ids[..., None] * self.senses + torch.arange(self.senses, device=ids.device)
        # The mask and the padding have one embedding.
        rows = torch.where((ids > MASK)[..., None], rows, (ids * self.senses)[..., None])
        embedded = self.table(rows)
        place = self.positions(torch.arange(ids.shape[1], device=ids.device)) + self.topic(ids)[:, None]

        prior = self.prior(ids).softmax(-1)
        context = self.disambiguation((prior[..., None] * embedded).sum(-2) + place, real)
        scores = torch.einsum("blsd,bld->bls", embedded, self.to_sense(context)) + self.prior(ids)
        log_senses = scores.log_softmax(-1)

        hidden = self.prediction((log_senses.exp()[..., None] * embedded).sum(-2) + place, real)
        every = torch.arange(self.words * self.senses, device=ids.device)
        logits = self.to_word(hidden) @ self.table(every).T
        words = logits.log_softmax(-1).unflatten(-1, (self.words, self.senses)).logsumexp(-1)
        return words, log_senses


def masked_loss(model: nn.Module, ids: Tensor, masked: Tensor) -> Tensor:
    """Cross entropy in nats of the masked words ``[batch, length]`` (bool) of sentences ``ids [batch, length]``."""
    words, _ = model(ids.masked_fill(masked, MASK))
    return F.nll_loss(words[masked], ids[masked])


# -- the data --------------------------------------------------------------------------------------

TOPICS = {
    "river": ["water", "boat", "fish", "shore", "bridge", "flood"],
    "money": ["loan", "cash", "credit", "account", "debt", "interest"],
    "music": ["song", "guitar", "rhythm", "tune", "concert", "drum"],
    "sport": ["team", "goal", "match", "coach", "score", "league"],
}
# Which topics an ambiguous word is used in: when the model is made, and in what it is taught afterwards.
BEFORE = {"bank": ("river", "money"), "note": ("music", "money"), "pitch": ("music", "sport")}
AFTER = {"bank": ("river", "sport"), "note": ("music", "sport"), "pitch": ("river", "money")}
VOCABULARY = ["<pad>", "<mask>", *BEFORE, *(word for topic in TOPICS.values() for word in topic)]
NUMBERS = {word: number for number, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Sentences:
    """Word ids ``[n, length]``, padded at the end."""

    ids: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random sentences, one word in four masked and at least one in each."""
        ids = self.ids[torch.randint(len(self.ids), (size,), generator=generator)]
        chance = torch.rand(ids.shape, generator=generator).masked_fill(ids == PAD, 2.0)
        masked = (chance < 0.25) | (chance == chance.min(-1, keepdim=True).values)
        return ids, masked


def make_sentences(uses: dict[str, tuple[str, str]], count: int, seed: int, length: int = 7) -> Sentences:
    """Sentences of four to `length` words: one ambiguous word among words of one of its topics."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    ids = torch.full((count, length), PAD)
    for row in ids:
        word = pick(list(uses))
        topic = TOPICS[pick(uses[word])]
        size = int(torch.randint(3, length, (1,), generator=generator))
        words = [NUMBERS[pick(topic)] for _ in range(size)]
        words.insert(int(torch.randint(size + 1, (1,), generator=generator)), NUMBERS[word])
        row[: len(words)] = torch.tensor(words)
    return Sentences(ids)


# -- training --------------------------------------------------------------------------------------


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Sentences, steps: int, batch_size: int, seed: int
) -> list[float]:
    """Losses of `steps` optimizer steps; with a SpIELOptimizer, indices move by themselves."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    losses = []
    for _ in range(steps):
        loss = masked_loss(model, *data.batch(batch_size, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Sentences, seed: int = 1) -> float:
    """Cross entropy of masked words in nats, the same words at every call."""
    model.eval()
    ids, masked = data.batch(256, torch.Generator().manual_seed(seed))
    return float(masked_loss(model, ids, masked))


def adapt(model: nn.Module, growth: str, density: float = 0.05, **more: object) -> PeftModel:
    """Sparse deltas on the sense table, the priors, all linears and the bag of words.

    Modules of kinds that SpIEL knows go by `target_modules`, weights of any other by `target_parameters`.
    """
    settings = {"regrow_every": 20, "accumulation_steps": 5, **more}
    config = SpIELConfig(
        density=density,
        target_modules=["table", "prior", "query", "key", "value", "out", "up", "down", "to_sense", "to_word"],
        target_parameters=["topic.weight"],
        growth=growth,
        **settings,
    )
    return get_peft_model(model, config)


# -- the run ---------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a wrong one."""
    parser = _Parser(
        prog="sense_lm.py",
        description="SpIEL on a sense-embedding language model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--growth", choices=["accumulated_gradient", "momentum"], default="accumulated_gradient", help="what grows")
    add("--pretraining-steps", type=positive_int, default=400, help="optimizer steps of the whole model")
    add("--steps", type=positive_int, default=200, help="optimizer steps of the deltas")
    add("--batch-size", type=positive_int, default=64, help="sentences per batch")
    add("--seed", type=int, default=0, help="seed of everything random")
    return parser.parse_args(argv)


def check(condition: bool, what: str) -> None:
    field(what, "yes" if condition else "NO")
    if not condition:
        raise SystemExit(1)


def report(model: nn.Module, old: Sentences, new: Sentences) -> None:
    field("loss, old uses", f"{held_out_loss(model, old):.3f}")
    field("loss, new uses", f"{held_out_loss(model, new):.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    old, new = make_sentences(BEFORE, 2000, seed=1), make_sentences(AFTER, 2000, seed=2)
    old_held_out, new_held_out = make_sentences(BEFORE, 500, seed=3), make_sentences(AFTER, 500, seed=4)

    heading(f"A sense-embedding model of {len(VOCABULARY)} words, trained whole")
    base = SenseLM(len(VOCABULARY))
    train(base, torch.optim.AdamW(base.parameters(), lr=3e-3), old, args.pretraining_steps, args.batch_size, args.seed)
    report(base, old_held_out, new_held_out)

    heading(f"New uses of its ambiguous words, learnt with sparse deltas ({args.growth})")
    untouched = copy.deepcopy(base)
    model = adapt(base, args.growth, seed=args.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SpIELOptimizer(torch.optim.AdamW(trained, lr=1e-2), model, total_steps=args.steps)
    train(model, optimizer, new, args.steps, args.batch_size, args.seed)
    report(model, old_held_out, new_held_out)
    total = sum(p.numel() for p in untouched.parameters())
    field("trained", f"{sum(p.numel() for p in trained):,} of {total:,} values, {len(model.cycle_log())} closes")

    heading("Checks")
    ids = new_held_out.ids[:32]
    verify(model, untouched, lambda m: m.eval()(ids)[0])
    return 0


@torch.no_grad()
def verify(model: PeftModel, untouched: nn.Module, outputs: Callable[[nn.Module], Tensor]) -> None:
    """What an adapter promises, bit for bit."""
    adapted, plain = outputs(model), outputs(untouched)
    with model.disable_adapter():
        check(torch.equal(outputs(model), plain), "base unchanged")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(untouched), folder)
        check(torch.equal(outputs(loaded), adapted), "saved, loaded")
    check(torch.equal(outputs(model.merge_and_unload()), adapted), "merged")


if __name__ == "__main__":
    raise SystemExit(main())
