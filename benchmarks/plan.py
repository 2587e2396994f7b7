"""Memory per GPU and bytes sent per step for a model too large to be run here, computed from formulas.

Nothing is measured. The source of every formula is given; `--write` puts the tables into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from spiel_peft.cycle.window import SHORTLIST

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
_MARKED = re.compile(r"(<!-- plan: (\w+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
_GIB = 2**30

FLOAT32, BFLOAT16, INT32 = 4, 2, 4
# bitsandbytes' NF4 with double quantization (Dettmers et al., 2023, QLoRA, section 3): half a byte per weight, one byte
# of scale per 64 weights, one float32 per 256 of these.
NF4 = 0.5 + 1 / 64 + FLOAT32 / (64 * 256)
# A candidate of an open window has a position, a sum, a sum of squares and the gradient of this step.
CANDIDATE = INT32 + 3 * FLOAT32
# Defaults of SpIELConfig.
REGROW_EVERY, ACCUMULATION_STEPS = 20, 5
BASES = {"bf16": BFLOAT16, "NF4": NF4}


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama model with grouped key-value heads; every linear layer of a block is adapted."""

    hidden: int
    intermediate: int
    key_value: int
    blocks: int
    vocabulary: int

    def matrices(self) -> list[tuple[int, int]]:
        """``(rows, cols)`` of one block's linear layers."""
        attention = [(self.hidden, self.hidden)] * 2 + [(self.key_value, self.hidden)] * 2
        return [*attention, *[(self.intermediate, self.hidden)] * 2, (self.hidden, self.intermediate)]

    @property
    def block_weights(self) -> int:
        """Number of weights in one block's linear layers."""
        return sum(rows * cols for rows, cols in self.matrices())

    @property
    def embedding(self) -> int:
        """Number of weights of the input embedding; the output layer has as many."""
        return self.vocabulary * self.hidden

    @property
    def norms(self) -> int:
        return (2 * self.blocks + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.blocks * self.block_weights + 2 * self.embedding + self.norms

    @property
    def sides(self) -> int:
        """Rows plus columns of all adapted matrices: the values of LoRA of rank 1, and the accumulators of SM3."""
        return self.blocks * sum(rows + cols for rows, cols in self.matrices())

    @property
    def largest(self) -> tuple[int, int]:
        return max(self.matrices(), key=lambda shape: shape[0] * shape[1])

    def base_bytes(self, per_weight: float) -> float:
        """Bytes of the base model: the blocks' linear layers at `per_weight`, the rest in bfloat16."""
        return self.blocks * self.block_weights * per_weight + (2 * self.embedding + self.norms) * BFLOAT16


LLAMA_70B = Llama(hidden=8192, intermediate=28672, key_value=1024, blocks=80, vocabulary=32000)


@dataclass(frozen=True)
class Method:
    """Bytes that one method of training needs.

    Attributes:
        name: for the table.
        index: bytes per trained value for its position.
        state: optimizer bytes per trained value.
        per_side: bytes per row and column of a matrix.
        window: whether the method has windows in which candidates are collected.
        sharded: whether FSDP2 shards the trained values.
    """

    name: str
    index: int
    state: int
    per_side: int
    window: bool
    sharded: bool


LORA = Method("LoRA, AdamW", 0, 2 * FLOAT32, 0, window=False, sharded=True)
METHODS = (
    LORA,
    Method("SpIEL-AG, AdamW", INT32, 2 * FLOAT32, 0, window=True, sharded=False),
    Method("SpIEL-MA, SM3", INT32, 0, FLOAT32, window=False, sharded=False),
)


@dataclass(frozen=True)
class Plan:
    """One line of the tables, in bytes per GPU.

    Attributes:
        gpus: number of GPUs that train together.
        sharded: by FSDP2, whose units are the blocks; otherwise every GPU has the whole base (DDP).
    """

    model: Llama
    method: Method
    r: int
    base: str
    gpus: int
    sharded: bool

    @property
    def trained(self) -> int:
        """Number of trained values: r per row and column, for LoRA and for SpIEL (`spiel_peft.budget`)."""
        return self.r * self.model.sides

    @property
    def name(self) -> str:
        return self.method.name.replace("LoRA", "QLoRA") if self.base == "NF4" else self.method.name

    # Memory

    def weights(self) -> float:
        """Bytes of the frozen model.

        With FSDP2: a share of it, and the parts that are gathered at one time: two blocks (one is prefetched), the
        embedding and the output layer (accelerate's `fsdp2_prepare_model` makes them units of their own).
        """
        per_weight = BASES[self.base]
        if not self.sharded:
            return self.model.base_bytes(per_weight)
        gathered = 2 * self.model.block_weights * per_weight + 2 * self.model.embedding * BFLOAT16
        return self.model.base_bytes(per_weight) / self.gpus + gathered

    def workspace(self) -> float:
        """Bytes of the workspace that all layers share: the largest matrix in bfloat16, with deltas.

        LoRA makes no adapted copy; it needs a workspace only to dequantize NF4.
        """
        rows, cols = self.model.largest
        return rows * cols * BFLOAT16 if self.base == "NF4" or self.method.index else 0.0

    def values(self) -> float:
        """Bytes of values, gradients (both float32) and indices.

        DDP's gradient buckets add as much as the gradients, unless gradient_as_bucket_view is set.
        """
        per_value = 2 * FLOAT32 + self.method.index
        if self.sharded and self.method.sharded:
            return self.trained * per_value / self.gpus
        buckets = 0 if self.sharded else FLOAT32
        return self.trained * (per_value + buckets)

    def optimizer(self) -> float:
        state = self.trained * self.method.state
        shared = self.gpus if self.sharded and self.method.sharded else 1
        return state / shared + self.model.sides * self.method.per_side

    def window(self) -> float:
        """Bytes of an open window when it is largest (`spiel_peft.cycle.window`).

        Ranks first collect a shortlist; they agree on candidates matrix by matrix, from the proposals of all ranks.
        """
        if not self.method.window:
            return 0.0
        proposals = self.gpus * self.r * sum(self.model.largest) * (INT32 + FLOAT32)
        return SHORTLIST * self.trained * CANDIDATE + proposals

    def memory(self) -> float:
        """Bytes in all, without activations, which are the same for all methods."""
        return self.weights() + self.workspace() + self.values() + self.optimizer() + self.window()

    # Bytes that one GPU sends. In a ring (Thakur et al., 2005), all-gather and reduce-scatter of S bytes send
    # (n - 1) / n * S, all-reduce twice as much.

    @property
    def _once(self) -> float:
        return (self.gpus - 1) / self.gpus

    def sent_for_weights(self) -> float:
        """Bytes sent for weights: FSDP2 gathers blocks and embedding twice, for the forward and the backward pass, and
        the output layer once."""
        if not self.sharded:
            return 0.0
        twice = self.model.blocks * self.model.block_weights * BASES[self.base] + self.model.embedding * BFLOAT16
        return self._once * (2 * twice + self.model.embedding * BFLOAT16)

    def sent_for_gradients(self) -> float:
        """Bytes sent for gradients, which are averaged in float32.

        Sharded values are gathered twice in bfloat16, and their gradients are reduce-scattered.
        """
        if self.sharded and self.method.sharded:
            return self._once * self.trained * (2 * BFLOAT16 + FLOAT32)
        return 2 * self._once * self.trained * FLOAT32

    def sent_for_growth(self) -> float:
        """Bytes sent for candidates, averaged over the steps of a cycle.

        SpIEL-AG: every rank sends its k proposals (position and gradient) to all, and gradients are all-reduced: of the
        shortlist once, of k candidates in the window's other steps. SpIEL-MA: none, as the accumulators are updated
        with averaged gradients.
        """
        if not self.method.window:
            return 0.0
        proposals = (self.gpus - 1) * self.trained * (INT32 + FLOAT32)
        sums = 2 * self._once * self.trained * FLOAT32 * (SHORTLIST + ACCUMULATION_STEPS - 1)
        return (proposals + sums) / REGROW_EVERY

    def sent(self) -> float:
        """Bytes sent in all, per optimizer step of one micro-batch."""
        return self.sent_for_weights() + self.sent_for_gradients() + self.sent_for_growth()


def plans(sharded: bool, model: Llama = LLAMA_70B, gpus: int = 8) -> list[Plan]:
    """Plans for every base, rank and method."""
    return [Plan(model, method, r, base, gpus, sharded) for base in BASES for r in (16, 64) for method in METHODS]


def table(lines: list[Plan]) -> str:
    """Format plans as a Markdown table, in GiB."""
    head = ["base", "r", "method", "weights", "workspace", "values", "optimizer", "window", "sum", "sent per step"]
    rows = [head, ["---"] * len(head)]
    for plan in lines:
        parts = (plan.weights(), plan.workspace(), plan.values(), plan.optimizer(), plan.window(), plan.memory())
        rows.append([plan.base, str(plan.r), plan.name, *(f"{part / _GIB:.2f}" for part in (*parts, plan.sent()))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(text: str) -> str:
    """Replace the tables in the text of docs/scaling.md."""
    tables = {"ddp": table(plans(sharded=False)), "fsdp2": table(plans(sharded=True))}
    return _MARKED.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[4]}", text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.name} as well")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    for title, sharded in (("DDP", False), ("FSDP2", True)):
        print(f"{title}, GiB per GPU\n\n{table(plans(sharded))}")
    if args.write:
        PAGE.write_text(page(PAGE.read_text()))
