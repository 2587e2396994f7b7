"""What finetune.py prints and saves at the end."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _data import AnswerCollator, Tokens
from _model import ModelSource, probe_logits


def heading(text: str) -> None:
    """Prints the start of a section."""
    print(f"\n{text}", flush=True)


def field(name: str, value: object) -> None:
    """Prints one named value of a section."""
    print(f"  {name:<14} {value}", flush=True)


class Clock:
    """Names the parts of a run and how many seconds each took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends the part ``name``, which began with the clock or with the last lap."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 1)
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.0f}" for name, seconds in self.laps.items())
        return f"{sum(self.laps.values()):.0f} s ({parts})"


# How each number that SpIELCallback logs at a close is printed, in the order of the table.
CYCLE_COLUMNS = {
    "rate": ".3f",
    "replaced": ",.0f",
    "kept": ",.0f",
    "churn": ".3f",
    "mean_abs_delta": ".2e",
}


def cycle_log(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """One row per close, from what SpIELCallback logged through the Trainer."""
    return [
        {"step": entry["step"]}
        | {key.removeprefix("spiel/"): float(value) for key, value in entry.items() if key.startswith("spiel/")}
        for entry in history
        if "spiel/replaced" in entry
    ]


def print_cycle_log(rows: Sequence[dict[str, float]]) -> None:
    """The closes as a table."""
    heading("Cycle (at a close, the deltas that moved least are dropped and as many are grown elsewhere)")
    columns = [name for name in CYCLE_COLUMNS if rows and name in rows[0]]
    print("".join(f"{name:>16}" for name in ["step", *columns]))
    for row in rows:
        cells = [format(row[name], CYCLE_COLUMNS[name]) for name in columns]
        print("".join(f"{cell:>16}" for cell in [f"{row['step']:.0f}", *cells]))


def save_merged(model: Any, tokenizer: Any, held_out: Sequence[Tokens], folder: Path) -> float:
    """Saves the base model with the deltas added in; the largest change of a held-out logit by it.

    Merging changes the model in place, so this comes last.
    """
    collator = AnswerCollator(tokenizer.pad_token_id)
    unmerged = probe_logits(model, held_out, collator)
    merged = model.merge_and_unload()
    difference = (probe_logits(merged, held_out, collator) - unmerged).abs().max()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(difference)


def save_plots(model: Any, folder: Path, summary: dict[str, Any]) -> None:
    """Draws the loss curve and the map of the deltas."""
    from _plots import collect_deltas, plot_deltas, plot_loss  # matplotlib takes a while to import

    curve, deltas = folder / "loss_curve.png", folder / "deltas.png"
    closes = [int(row["step"]) for row in summary["cycle"]]
    title = f"SpIEL on {Path(summary['model']).name}"
    plot_loss(summary["train_loss"], summary["held_out_loss"], closes, title, curve)
    field("loss curve", curve)
    plot_deltas(collect_deltas(model), deltas)
    field("deltas", deltas)


def save_results(
    model: Any,
    source: ModelSource,
    tokenizer: Any,
    held_out: Sequence[Tokens],
    args: argparse.Namespace,
    summary: dict[str, Any],
) -> None:
    """Writes the adapter, the plots and the merged checkpoint, and says where they are."""
    out = args.output_dir
    heading("Saved")
    # The script never resizes the vocabulary, so PEFT need not look into the base model for that.
    model.save_pretrained(out / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(out / "adapter")
    field("adapter", out / "adapter")
    more = f", gguf_file={source.gguf_file!r}" if source.gguf_file else ""
    field("", f"after import spiel_peft: AutoPeftModelForCausalLM.from_pretrained({str(out / 'adapter')!r}{more})")
    save_plots(model, out, summary)
    if args.no_merge:
        field("merged", "not saved (--no-merge)")
    elif args.load_in_4bit:
        field(
            "merged",
            "not saved: rounding back to 4 bits loses most of the deltas; merge into the 16-bit base",
        )
    else:
        change = save_merged(model, tokenizer, held_out, out / "merged")
        summary["merge_max_logit_difference"] = change
        field("merged", f"{out / 'merged'} (largest change of a logit by merging: {change:.2g})")


def save_summary(summary: dict[str, Any], folder: Path) -> None:
    """Writes all numbers of the run as JSON."""
    path = folder / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    field("numbers", path)
