"""Bytes that training needs on a GPU, counted on a CPU: SpIEL beside PEFT's LoRA, by what they are for and when.

`--count` counts and saves; without it, saved counts are printed. Every tensor of real training steps is counted, on the
path that a GPU takes (`pretend_gpu`), with sizes as given and decoder layers of the model as they are. Only the number
of layers is smaller: three and four are counted, from which follows what each further one adds.

A run is: a window and the first close, which replaces all positions; two steps between windows; a second window and its
close. The default cycle is longer and has the same peaks.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from .bases import LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, LlamaShape, llama_config, replace_by_nf4
from .environment import add_output_argument, load, load_all, save, two_sizes
from .ledger import (
    ACTIVATIONS,
    BACKWARD,
    FORWARD,
    PARTS,
    STEP,
    WORKSPACE,
    LayerWatch,
    Ledger,
    Moment,
    name_base,
    name_training,
)
from .pretend_gpu import make_hollow, pretend_gpu
from .stepping import LORA
from .tables import markdown
from .variants import GROWTH, Budget, TrainingRun, build, cycling_run

PREFIX = "count_"
MODELS = {"llama-2-7b": LLAMA_2_7B, "llama-2-13b": LLAMA_2_13B, "llama-2-70b": LLAMA_2_70B}
BASES = ("nf4", "bf16")
COUNTED = (LORA, "SpIEL-AG", "SpIEL-MA, SM3")
BETWEEN, OPEN, CLOSE = "between windows", "window open", "close"
FIRST_OPEN, FIRST_CLOSE = "first window", "first close"
PHASES = (BETWEEN, OPEN, CLOSE, FIRST_OPEN, FIRST_CLOSE)
# Numbers of decoder layers that are counted.
FEW, MORE = 3, 4
# The short cycle of a counted run, and what its steps and their closes are called.
_CYCLE = {"regrow_every": 4, "accumulation_steps": 2}
_STEPS = (
    (FIRST_OPEN, FIRST_OPEN),
    (FIRST_OPEN, FIRST_CLOSE),
    (BETWEEN, BETWEEN),
    (BETWEEN, BETWEEN),
    (OPEN, OPEN),
    (OPEN, CLOSE),
)


@dataclass(frozen=True)
class Setting:
    """One run that is counted.

    Attributes:
        variant: a name of `variants.VARIANTS`.
        base: "nf4" or "bf16".
        r: rank of LoRA; SpIEL trains as many values.
        checkpointing: whether decoder layers recompute their activations.
        candidates: as in SpIELConfig.
    """

    variant: str
    base: str
    r: int
    batch_size: int
    tokens: int
    checkpointing: bool
    candidates: float | None = None


# The model


def model_config(name: str) -> Any:
    """The configuration of a model.

    Args:
        name: of `MODELS`; six sizes of a Llama as `LlamaShape` lists them, "4096,11008,32,32,32,32000"; or what
            transformers can load a configuration from, a folder or a name on the Hub.
    """
    if name in MODELS:
        return llama_config(MODELS[name], torch.bfloat16)
    if name.replace(",", "").isdigit() and name.count(",") == 5:
        return llama_config(LlamaShape(*map(int, name.split(","))), torch.bfloat16)
    return AutoConfig.from_pretrained(name)


def shortened(config: Any, layers: int) -> Any:
    """The configuration with fewer decoder layers."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:layers]
    return short


def frozen_model(config: Any, nf4: bool) -> Any:
    """A hollow model in bfloat16; with `nf4`, its linear layers but the last are quantized."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        for parameter in module.parameters(recurse=False):
            make_hollow(parameter)
        if nf4 and isinstance(module, nn.Linear) and module is not head:
            replace_by_nf4(model, name, torch.bfloat16)
    if nf4:
        model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder layers of a model.

    Raises:
        ValueError: it has no list of so many modules.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no nn.ModuleList of {count} decoder layers")


# Counting


def count_run(
    config: Any, setting: Setting, layers: int, stand_ins: bool = True
) -> tuple[dict[Moment, dict[str, int]], dict[str, int]]:
    """Train a model with few decoder layers for a few steps.

    Returns:
        Bytes by part at the peak of every moment; and sizes: the number of trained values, bytes of the input embedding
        and the output layer, rows and columns of the widest matrix.
    """
    ledger = Ledger()
    with pretend_gpu(ledger.see, stand_ins):
        base = frozen_model(shortened(config, layers), setting.base == "nf4")
        decoder = decoder_layers(base, layers)
        name_base(ledger, base)
        sizes = {
            "embedding": base.get_input_embeddings().weight.nbytes,
            "head": base.get_output_embeddings().weight.nbytes,
            "widest": max(m.in_features + m.out_features for m in decoder.modules() if hasattr(m, "in_features")),
        }
        budget = Budget.of_rank(setting.r)
        growth = GROWTH.get(setting.variant)
        if growth is None:
            run = build(setting.variant, base, budget)
        else:
            run = cycling_run(growth, base, budget, candidates=setting.candidates, **_CYCLE)
        run.use_checkpointing(setting.checkpointing)
        watch = LayerWatch(ledger, decoder)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (setting.batch_size, setting.tokens), generator=generator)
        for number, (usual, closing) in enumerate(_STEPS if growth else _STEPS[2:4], start=1):
            if growth == "momentum" and usual in (OPEN, FIRST_OPEN):
                closing = BETWEEN if closing == usual else closing
                usual = BETWEEN
            _step(run, ids, ledger, watch, Moment(number, usual, FORWARD, ""), closing)
    peaks = {moment: parts for moment, parts in ledger.peaks().items() if moment.step}
    return peaks, {"trainable": run.trainable, **sizes}


def _step(run: TrainingRun, ids: torch.Tensor, ledger: Ledger, watch: LayerWatch, begin: Moment, closing: str) -> None:
    """One step, whose update is part of the phase `closing`."""
    assert run.optimizer is not None
    gc.collect()
    gc.disable()  # when it runs by itself depends on everything else in the process
    try:
        ledger.moment = begin
        first = ledger.count()
        loss = run.loss(ids)
        ledger.name_unnamed(ACTIVATIONS, first)
        ledger.moment = begin._replace(during=BACKWARD)
        watch.backward = True
        loss.backward()
        watch.backward = False
        name_training(ledger, run.model, run.optimizer)
        ledger.moment = begin._replace(phase=closing, during=STEP)
        run.optimizer.step()
        name_training(ledger, run.model, run.optimizer)
        run.optimizer.zero_grad()
        del loss
        # What outlives a step is no activation: plans of index sets and the like.
        ledger.rename(ACTIVATIONS, WORKSPACE)
    finally:
        gc.enable()


def count(config: Any, setting: Setting, stand_ins: bool = True) -> dict[str, Any]:
    """Count a run for all decoder layers of a model.

    Returns:
        ``phases``: by phase, bytes in all and by part at the peak, and when that is. ``largest``: the most that each
        part ever takes. ``trainable``: number of trained values. ``base_bytes``: of one decoder ``layer``, of the
        ``embedding`` and of the output layer (``head``), and rows and columns of the ``widest`` matrix.
    """
    layers = config.num_hidden_layers
    few, sizes_few = count_run(config, setting, FEW, stand_ins)
    more, sizes_more = count_run(config, setting, MORE, stand_ins)
    grown = {moment: _extrapolated(few[moment], more[moment], layers) for moment in few.keys() & more.keys()}
    phases: dict[str, Any] = {}
    for phase in PHASES:
        of_phase = {moment: parts for moment, parts in grown.items() if moment.phase == phase}
        if of_phase:
            moment, parts = max(of_phase.items(), key=lambda item: (sum(item[1].values()), item[0]))
            phases[phase] = {"bytes": sum(parts.values()), "during": " ".join(filter(None, moment[2:])), "parts": parts}
    moment = next(iter(few))
    layer = more[moment][PARTS[0]] - few[moment][PARTS[0]]
    trainable = _extrapolated(sizes_few, sizes_more, layers)["trainable"]
    base_bytes = {"layer": layer, **{name: size for name, size in sizes_few.items() if name != "trainable"}}
    largest = {part: max(parts.get(part, 0) for parts in grown.values()) for part in PARTS}
    return {"phases": phases, "largest": largest, "trainable": trainable, "base_bytes": base_bytes}


def _extrapolated(few: dict[str, int], more: dict[str, int], layers: int) -> dict[str, int]:
    """Linear in the number of layers: every further one adds what the fourth did."""
    names = [name for name in (*PARTS, *few) if name in few or name in more]
    return {name: (b := more.get(name, 0)) + (layers - MORE) * (b - few.get(name, 0)) for name in names}


# Results


def entry_name(entry: dict[str, Any]) -> str:
    """The name of a counted run, for tables."""
    few = entry["candidates"]
    return entry["variant"] if few is None else f"{entry['variant']}, candidates={few:g}"


def ratios(entries: list[dict[str, Any]], entry: dict[str, Any]) -> dict[str, float]:
    """Peak bytes of each phase over those of LoRA between windows, with checkpointing as in the entry."""
    reference = find(entries, LORA, entry["checkpointing"])
    if reference is None:
        return {}
    lora = reference["phases"][BETWEEN]["bytes"]
    return {phase: found["bytes"] / lora for phase, found in entry["phases"].items()}


def find(
    entries: list[dict[str, Any]], variant: str, checkpointing: bool, candidates: float | None = None
) -> dict[str, Any] | None:
    """The counted run of a variant; None if there is none."""
    wanted = (variant, checkpointing, candidates)
    return next((e for e in entries if (e["variant"], e["checkpointing"], e["candidates"]) == wanted), None)


def counts_table(result: dict[str, Any]) -> str:
    """A result as a Markdown table, in GiB."""
    head = ["method", "checkpointing", "phase", *PARTS, "sum", "/ LoRA", "peak is in"]
    rows = []
    for entry in result["counts"]:
        over = ratios(result["counts"], entry)
        for phase, found in entry["phases"].items():
            parts = [f"{found['parts'].get(part, 0) / 2**30:.2f}" for part in PARTS]
            ratio = f"{over[phase]:.3f}" if phase in over else ""
            row = [entry_name(entry), "yes" if entry["checkpointing"] else "no", phase, *parts]
            rows.append([*row, f"{found['bytes'] / 2**30:.2f}", ratio, found["during"]])
    return markdown(head, rows)


def title(result: dict[str, Any]) -> str:
    s = result["settings"]
    return f"{s['model']}, {s['base']}, r={s['r']}, {s['batch_size']}x{s['tokens']} tokens"


def _settings(args: argparse.Namespace) -> Iterable[Setting]:
    for checkpointing in args.checkpointing:
        for variant in args.variants:
            gathers = GROWTH.get(variant) == "accumulated_gradient"
            for candidates in args.candidates if gathers else [None]:
                for base in args.bases:
                    for batch_size, tokens in args.shapes:
                        yield Setting(variant, base, args.r, batch_size, tokens, checkpointing, candidates)


def _file_name(model: str, setting: Setting) -> str:
    short = Path(model).name.replace(",", "-")
    return f"{PREFIX}{short}_{setting.base}_r{setting.r}_{setting.batch_size}x{setting.tokens}"


def _keep(model: str, layers: int, setting: Setting, counted: dict[str, Any], folder: Path) -> Path:
    """Add a counted run to the result file of its setting, in the place of an earlier one."""
    name = _file_name(model, setting)
    entry = {"variant": setting.variant, "checkpointing": setting.checkpointing, "candidates": setting.candidates}
    kept = load(name, folder)
    counts = [e for e in kept["counts"] if {key: e[key] for key in entry} != entry] if kept else []
    settings = {
        "model": Path(model).name,
        "layers": layers,
        "base": setting.base,
        "r": setting.r,
        "batch_size": setting.batch_size,
        "tokens": setting.tokens,
        "base_bytes": counted.pop("base_bytes"),
    }
    counts.append(entry | counted)
    counts.sort(key=lambda e: (not e["checkpointing"], COUNTED.index(e["variant"]), e["candidates"] or 0))
    return save(name, {"settings": settings, "counts": counts}, folder, "cpu")


def _multiple(text: str) -> float | None:
    return None if text == "all" else float(text)


def _switch(text: str) -> bool:
    return {"yes": True, "no": False}[text]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--count", action="store_true", help="count and save; otherwise saved counts are printed")
    add(
        "--models",
        nargs="+",
        default=["llama-2-7b"],
        metavar="MODEL",
        help=f"{', '.join(MODELS)}; sizes of a Llama as "
        "hidden,intermediate,layers,heads,kv_heads,vocabulary; a folder or name that transformers finds",
    )
    add("--bases", nargs="+", choices=BASES, default=["nf4"])
    add("--r", type=int, default=64, help="rank whose number of values is trained")
    add("--shapes", nargs="+", type=two_sizes, default=[(1, 2048)], metavar="BxT", help="sequences x tokens of a batch")
    add("--variants", nargs="+", choices=COUNTED, default=list(COUNTED), metavar="NAME")
    add("--checkpointing", nargs="+", type=_switch, default=[True, False], metavar="yes|no")
    add(
        "--candidates",
        nargs="+",
        type=_multiple,
        default=[None, 2.0],
        metavar="N",
        help="of SpIEL-AG; all: as many as deltas",
    )
    add_output_argument(parser)


def run(args: argparse.Namespace) -> None:
    if args.count:
        for model in args.models:
            config = model_config(model)
            for setting in _settings(args):
                counted = count(config, setting)
                path = _keep(model, config.num_hidden_layers, setting, counted, args.output)
                peaks = ", ".join(f"{phase} {e['bytes'] / 2**30:.3f}" for phase, e in counted["phases"].items())
                print(f"{model}, {setting}: GiB {peaks} -> {path}", flush=True)
        return
    for result in load_all(PREFIX, args.output).values():
        print(f"{title(result)}\n\n{counts_table(result)}\n")
