"""Memory per GPU and bytes sent per step for large models, from counted bytes (`python -m benchmarks memory --count`).

Counts are of one process. What several GPUs add, share or send is computed from formulas, each with its source.
`--write` puts the tables into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiel_peft.cycle.window import SHORTLIST

from .environment import RESULTS, load_all
from .ledger import BASE, GRADIENTS, OPTIMIZER, PARTS, VALUES, WINDOW
from .memory import BETWEEN, PREFIX, entry_name
from .stepping import LORA

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
_MARKED = re.compile(r"(<!-- plan: (\w+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
_GIB = 2**30

FLOAT32, BFLOAT16, INT32 = 4, 2, 4
# Defaults of SpIELConfig.
REGROW_EVERY, ACCUMULATION_STEPS = 20, 5
ON_ONE_GPU, ON_EIGHT_GPUS = ("llama-2-7b", "llama-2-13b"), ("llama-2-70b",)


@dataclass(frozen=True)
class Plan:
    """One line of the tables, in bytes per GPU.

    Attributes:
        settings, entry: of a counted run (`benchmarks.memory`).
        gpus: number of GPUs that train together, each on a batch as counted.
        sharded: by FSDP2, whose units are the decoder layers; otherwise every GPU has the whole base (DDP).
    """

    settings: dict[str, Any]
    entry: dict[str, Any]
    gpus: int = 1
    sharded: bool = False

    @property
    def _is_lora(self) -> bool:
        return self.entry["variant"] == LORA

    @property
    def trained(self) -> int:
        return self.entry["trainable"]

    # Memory

    def weights(self) -> float:
        """Bytes of the frozen model.

        With FSDP2: a share of it, and the parts that are gathered at one time: two layers (one is prefetched), the
        embedding and the output layer (accelerate's `fsdp2_prepare_model` makes them units of their own).
        """
        whole, part = self.entry["largest"][BASE], self.settings["base_bytes"]
        if not self.sharded:
            return whole
        return whole / self.gpus + 2 * part["layer"] + part["embedding"] + part["head"]

    def at_peak(self, phase: str) -> dict[str, float]:
        """Bytes by part at the peak of a phase.

        FSDP2 shards the trained values of LoRA, and with them gradients and optimizer state. DDP has buckets as large
        as the gradients, unless gradient_as_bucket_view is set. Several ranks first collect a shortlist; they agree on
        candidates matrix by matrix, from the proposals of all ranks.
        """
        parts = {part: float(self.entry["phases"][phase]["parts"].get(part, 0)) for part in PARTS}
        parts[BASE] = self.weights()
        if self.gpus == 1:
            return parts
        if self.sharded and self._is_lora:
            for part in (VALUES, GRADIENTS, OPTIMIZER):
                parts[part] /= self.gpus
        if not self.sharded:
            parts[GRADIENTS] += self.entry["largest"][GRADIENTS]
        if parts[WINDOW]:
            proposals = self.gpus * self.settings["r"] * self.settings["base_bytes"]["widest"] * (INT32 + FLOAT32)
            parts[WINDOW] = SHORTLIST * parts[WINDOW] + proposals
        return parts

    def memory(self, phase: str) -> float:
        """Bytes in all at the peak of a phase."""
        return sum(self.at_peak(phase).values())

    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.entry["phases"], key=self.memory)

    # Bytes that one GPU sends. In a ring (Thakur et al., 2005), all-gather and reduce-scatter of S bytes send
    # (n - 1) / n * S, all-reduce twice as much.

    @property
    def _once(self) -> float:
        return (self.gpus - 1) / self.gpus

    def sent_for_weights(self) -> float:
        """Bytes sent for weights: FSDP2 gathers layers and embedding twice, for the forward and the backward pass, and
        the output layer once."""
        if not self.sharded:
            return 0.0
        part = self.settings["base_bytes"]
        twice = self.settings["layers"] * part["layer"] + part["embedding"]
        return self._once * (2 * twice + part["head"])

    def sent_for_gradients(self) -> float:
        """Bytes sent for gradients, which are averaged in float32.

        Sharded values are gathered twice in bfloat16, and their gradients are reduce-scattered.
        """
        if self.sharded and self._is_lora:
            return self._once * self.trained * (2 * BFLOAT16 + FLOAT32)
        return 2 * self._once * self.trained * FLOAT32

    def sent_for_growth(self) -> float:
        """Bytes sent for candidates, averaged over the steps of a cycle.

        SpIEL-AG: every rank sends its k proposals (position and gradient) to all, and gradients are all-reduced: of the
        shortlist once, of k candidates in the window's other steps. SpIEL-MA: none, as the accumulators are updated
        with averaged gradients.
        """
        if not self.entry["largest"][WINDOW]:
            return 0.0
        proposals = (self.gpus - 1) * self.trained * (INT32 + FLOAT32)
        sums = 2 * self._once * self.trained * FLOAT32 * (SHORTLIST + ACCUMULATION_STEPS - 1)
        return (proposals + sums) / REGROW_EVERY

    def sent(self) -> float:
        """Bytes sent in all, per optimizer step of one micro-batch."""
        return self.sent_for_weights() + self.sent_for_gradients() + self.sent_for_growth()


def plans(models: tuple[str, ...], gpus: int = 1, sharded: bool = False, folder: Path = RESULTS) -> list[Plan]:
    """Plans for everything that was counted of these models with checkpointing."""
    results = [r for r in load_all(PREFIX, folder).values() if r["settings"]["model"] in models]
    results.sort(
        key=lambda r: (models.index(r["settings"]["model"]), r["settings"]["base"] != "bf16", r["settings"]["r"])
    )
    return [
        Plan(result["settings"], entry, gpus, sharded)
        for result in results
        for entry in result["counts"]
        if entry["checkpointing"]
    ]


def table(lines: list[Plan]) -> str:
    """Format plans as a Markdown table, in GiB; the parts are those at the largest peak."""
    several = any(plan.gpus > 1 for plan in lines)
    trained = (VALUES, GRADIENTS, "indices")
    head = ["model", "base", "r", "method", "between windows", "largest", "it is at", "weights", "trained", OPTIMIZER]
    head += [WINDOW, "rest", *(["sent per step"] if several else [])]
    rows = [head, ["---"] * len(head)]
    for plan in lines:
        worst = plan.worst()
        parts = plan.at_peak(worst)
        shown = [parts.pop(BASE), sum(parts.pop(part) for part in trained), parts.pop(OPTIMIZER), parts.pop(WINDOW)]
        shown += [sum(parts.values()), *([plan.sent()] if several else [])]
        settings = plan.settings
        row = [settings["model"], settings["base"], str(settings["r"]), entry_name(plan.entry)]
        row += [f"{plan.memory(BETWEEN) / _GIB:.2f}", f"{plan.memory(worst) / _GIB:.2f}", worst]
        rows.append([*row, *(f"{part / _GIB:.2f}" for part in shown)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def tables() -> dict[str, str]:
    """All tables of docs/scaling.md, by name."""
    return {
        "one": table(plans(ON_ONE_GPU)),
        "ddp": table(plans(ON_EIGHT_GPUS, 8)),
        "fsdp2": table(plans(ON_EIGHT_GPUS, 8, sharded=True)),
    }


def page(text: str) -> str:
    """Replace the tables in the text of docs/scaling.md."""
    found = tables()
    return _MARKED.sub(lambda match: f"{match[1]}\n{found[match[2]]}\n{match[4]}", text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.name} as well")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    titles = {"one": "One GPU", "ddp": "Eight GPUs, DDP", "fsdp2": "Eight GPUs, FSDP2"}
    for name, found in tables().items():
        print(f"{titles[name]}, GiB per GPU\n\n{found}")
    if args.write:
        PAGE.write_text(page(PAGE.read_text()))
