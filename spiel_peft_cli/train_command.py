"""`train`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import tables
from .commands import OK, command, writing
from .option_file import OptionFile, use_option_file
from .options import BudgetCount, BudgetDensity, BudgetR, Targets, one_budget
from .output import Output

if TYPE_CHECKING:
    from spiel_peft.config import SpIELConfig

DEFAULT_R = 16
# Of numbers of steps, tokens and examples. NumPy's seeds have 32 bits.
LARGEST = 2**31 - 1


@command("spiel-peft train --model base --data train.jsonl --output-dir run --r 2 --max-steps 12")
def train(
    output: Output,
    model: Annotated[
        str, typer.Option("--model", help="Folder of a checkpoint, .gguf file, or hub id.", show_default=False)
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help='.jsonl of {"question", "answer"}, {"prompt", "completion"} and {"messages"}, or {"text"}; or .txt.',
            show_default=False,
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="For the adapter and checkpoints.", show_default=False)
    ],
    r: BudgetR = None,
    density: BudgetDensity = None,
    num_deltas: BudgetCount = None,
    target_module: Targets = None,
    growth: Annotated[
        str, typer.Option("--growth", help="accumulated_gradient, momentum, random or none.")
    ] = "accumulated_gradient",
    regrow_every: Annotated[int, typer.Option("--regrow-every", min=1, help="Steps from close to close.")] = 20,
    accumulation_steps: Annotated[
        int, typer.Option("--accumulation-steps", min=1, help="Steps over which growth sums gradients.")
    ] = 5,
    initial_regrow_rate: Annotated[
        float, typer.Option("--initial-regrow-rate", help="Share replaced at a close, at first.")
    ] = 0.2,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="File to evaluate on instead of a part of --data.")
    ] = None,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.0, max=0.9, help="Share of --data to evaluate on; 0 for none.")
    ] = 0.1,
    max_length: Annotated[
        int, typer.Option("--max-length", min=2, help="Tokens; longer answers are cut, longer texts are split.")
    ] = 512,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Optimizer steps of the run.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data; 1 by default.")] = None,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Peak, after warm-up; falls linearly.")
    ] = 5e-4,
    warmup_steps: Annotated[float, typer.Option("--warmup-steps", min=0, help="Below 1: a share of the run.")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples in a forward pass.")] = 4,
    grad_accum: Annotated[int, typer.Option("--grad-accum", min=1, help="Forward passes per step.")] = 1,
    save_every: Annotated[
        int, typer.Option("--save-every", min=0, help="Steps between checkpoints to resume from; 0 for none.")
    ] = 100,
    eval_every: Annotated[
        int, typer.Option("--eval-every", min=0, help="Steps between evaluations; 0: before and after only.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Base weights and autocast in bfloat16.")] = False,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="NF4 base with double quantization (bitsandbytes).")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output-dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew over an earlier run.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file of options, such as r: 16, and of further fields of TRL's SFTConfig, such as "
            "weight_decay: 0.01. Options on the command line win.",
            is_eager=True,
            callback=use_option_file,
        ),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", help="Question to answer with and without the adapter; may be given several times."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Save the base model with the deltas added in OUTPUT_DIR/merged, too.")
    ] = False,
) -> int:
    """Fine-tune a causal language model on a file of pairs, chats or texts, with TRL's SFTTrainer.

    Answers are learnt, and plain texts as a whole. The adapter is saved in OUTPUT_DIR/adapter.
    """
    one_budget(r, density, num_deltas, needed=False)
    counts: dict[str, float] = {
        "regrow_every": regrow_every,
        "accumulation_steps": accumulation_steps,
        "max_length": max_length,
    }
    counts |= {"warmup_steps": warmup_steps, "batch_size": batch_size, "grad_accum": grad_accum}
    counts |= {"save_every": save_every, "eval_every": eval_every}
    _check(max_steps, epochs, learning_rate, resume, overwrite, counts, seed)
    if r is density is num_deltas is None:
        r = DEFAULT_R
    from spiel_peft.config import SpIELConfig
    from spiel_peft.finetune.run import RunSettings, finetune

    spiel_config: SpIELConfig = SpIELConfig(
        task_type="CAUSAL_LM",
        r=r,
        density=density,
        num_deltas=num_deltas,
        target_modules="all-linear" if target_module in (None, [], ["all-linear"]) else target_module,
        growth=growth,
        regrow_every=regrow_every,
        accumulation_steps=accumulation_steps,
        initial_regrow_rate=initial_regrow_rate,
        seed=seed,
    )
    file: OptionFile | None = config  # type: ignore[assignment]  # the callback's result
    settings = RunSettings(
        model=model,
        data=data,
        output_dir=output_dir,
        config=spiel_config,
        eval_data=eval_data,
        held_out=held_out,
        max_length=max_length,
        max_steps=max_steps,
        epochs=epochs or 1.0,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        grad_accum=grad_accum,
        save_every=save_every,
        eval_every=eval_every,
        seed=seed,
        bf16=bf16,
        load_in_4bit=load_in_4bit,
        gradient_checkpointing=gradient_checkpointing,
        resume=resume,
        overwrite=overwrite,
        arguments={} if file is None else file.other_fields,
        config_file=None if file is None else file.path,
        questions=ask or (),
        merge=merge,
    )
    with writing(output_dir), _quiet_libraries(), output.progress("Training") as progress:
        result = finetune(settings, progress)
    if not result.writes:
        return OK
    found = {name: value for name, value in vars(result).items() if name != "writes"}
    data = {**found, "answers": [vars(answers) for answers in result.answers]}
    output.result(data, lambda console: tables.show_run(console, result))
    return OK


def _check(
    max_steps: int | None,
    epochs: float | None,
    learning_rate: float,
    resume: bool,
    overwrite: bool,
    counts: dict[str, float],
    seed: int,
) -> None:
    counts = counts | ({} if max_steps is None else {"max_steps": max_steps})
    if max_steps is not None and epochs is not None:
        raise typer.BadParameter("give --max-steps or --epochs, not both")
    for name, value in (("--epochs", epochs), ("--learning-rate", learning_rate)):
        if value is not None and not 0 < value < float("inf"):
            raise typer.BadParameter(f"{name} must be a number above 0, got {value}")
    for name, number in counts.items():
        if number > LARGEST:
            raise typer.BadParameter(f"--{name.replace('_', '-')} must be at most {LARGEST}, got {number}")
    if seed >= 2**32:
        raise typer.BadParameter(f"--seed must be at most {2**32 - 1}, got {seed}")
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run, --overwrite begins anew: give one of them")


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the progress bars of libraries, and PEFT's warning that a GGUF file has no config."""
    import datasets
    from transformers.utils import logging

    shown, datasets_shown = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # The command restores the filters of warnings when it ends.
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if datasets_shown:
            datasets.enable_progress_bars()
