"""Adds a section to model cards (README.md) that describes the SpIEL adapters and how to load them.

PEFT writes the card; this module adds or replaces one section between two markers and changes nothing else in the text.
PEFT has no hook for that, so `install` wraps the two methods of `PeftModel` that write and upload cards. The wrapped
methods change only cards of models with SpIEL adapters.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from .config import SpIELConfig
from .delta import SparseDelta

FILE_NAME = "README.md"
BEGIN = "<!-- spiel-peft: begin, rewritten whenever the adapter is saved -->"
END = "<!-- spiel-peft: end -->"
TAGS = ("sparse-fine-tuning", "spiel")
_PAPER = "https://arxiv.org/abs/2401.16405"
_PLACE = "FOLDER_OR_HUB_ID"
_ORIGINAL = "_spiel_original"
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class CardFacts:
    """The facts about one adapter that a card states.

    Attributes:
        name: name of the adapter; every adapter but "default" is saved in a folder of its name.
        config: config of the adapter.
        num_deltas: number of deltas in all modules.
        num_modules: number of modules with deltas.
        num_weights: number of entries of these modules' weights; None if unknown.
        base: name or path of the base model; None if unknown.
    """

    name: str
    config: SpIELConfig
    num_deltas: int
    num_modules: int
    num_weights: int | None = None
    base: str | None = None


def facts_of_model(model: PeftModel) -> list[CardFacts]:
    """The facts about a model's SpIEL adapters. Adapters of other methods are left out."""
    facts = []
    for name, config in model.peft_config.items():
        if not isinstance(config, SpIELConfig):
            continue
        deltas = [m for m in model.modules() if isinstance(m, SparseDelta) and m.run.adapter_name == name]
        base = config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", None) or None
        sizes = sum(delta.numel for delta in deltas)
        facts.append(CardFacts(name, config, sum(delta.k for delta in deltas), len(deltas), sizes, base))
    return facts


def facts_of_counts(config: SpIELConfig, counts: Mapping[str, int]) -> CardFacts:
    """The facts about an adapter on disk, given its config and its number of deltas by module."""
    return CardFacts("default", config, sum(counts.values()), len(counts), None, config.base_model_name_or_path)


def update_card(folder: str | os.PathLike[str], adapters: Sequence[CardFacts], place: str | None = None) -> None:
    """Write the section about SpIEL adapters into README.md of a folder, which is created if there is none.

    Outside the section only metadata change: tags are added, `library_name` is set, and `base_model` if it is missing.

    Args:
        folder: the folder of README.md.
        adapters: facts about the adapters, at least one.
        place: folder or hub id from which users will load the adapters; None: a placeholder.
    """
    path = Path(folder) / FILE_NAME
    card = ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: peft\n---\n\n# Model card\n")
    card.text = with_section(card.text, section(adapters, place))
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *TAGS})
    base = next((facts.base for facts in adapters if facts.base), None)
    if base and not card.data.get("base_model"):
        card.data["base_model"] = base
    card.save(path)


def with_section(text: str, new: str) -> str:
    """The text of a card with a new section: in place of the old one, else below the first title, else at the top."""
    lines = text.splitlines()
    if BEGIN in lines and END in lines[lines.index(BEGIN) :]:
        start = lines.index(BEGIN)
        stop = lines.index(END, start) + 1
        return "\n".join([*lines[:start], *new.splitlines(), *lines[stop:]])
    place, fenced = 0, False
    for number, line in enumerate(lines):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and line.startswith("# "):
            place = number + 1
            break
    before, after = lines[:place], lines[place:]
    gap = [""] if after and after[0] else []
    return "\n".join([*before, *([""] if before else []), *new.splitlines(), *gap, *after])


def section(adapters: Sequence[CardFacts], place: str | None = None) -> str:
    """The text of the section with its markers. Arguments as in `update_card`."""
    lines = [
        BEGIN,
        "## SpIEL adapter",
        "",
        f"Sparse differences to single entries of the base model's weights ([SpIEL]({_PAPER}), as a PEFT method). "
        "Everything that is not listed here is the base model's.",
        "",
        "| adapter | method | budget | deltas | saved in full | base model |",
        "|---|---|---|---|---|---|",
        *(_row(facts) for facts in adapters),
        "",
        "PEFT learns the method from the package `spiel-peft`. Without it, loading stops with `KeyError: 'SPIEL'`.",
        "",
        "```bash",
        "pip install spiel-peft",
        "```",
        "",
        "```python",
        *_code(adapters[0], place or _PLACE),
        "```",
        "",
        "`spiel-peft` can also merge the adapter into the checkpoint, or write it as a SHiRA adapter, which PEFT loads "
        "without the package.",
        END,
    ]
    return "\n".join(lines)


def _row(facts: CardFacts) -> str:
    config = facts.config
    deltas = f"{facts.num_deltas:,} in {facts.num_modules} modules"
    if facts.num_weights:
        deltas += f" ({facts.num_deltas / facts.num_weights:.2%} of their weights)"
    full = [*(config.modules_to_save or [])]
    if config.bias != "none":
        full.append(f"biases ({config.bias})")
    if config.trainable_token_indices:
        full.append("trained tokens")
    cells = (facts.name, f"SpIEL, growth {config.growth}", _budget(config), deltas, ", ".join(full) or "nothing")
    return "| " + " | ".join(_cell(cell) for cell in (*cells, _base(facts))) + " |"


def _budget(config: SpIELConfig) -> str:
    if isinstance(config.num_deltas, dict):
        text = "counts by module"
    else:
        name = next(name for name in ("r", "density", "num_deltas") if getattr(config, name) is not None)
        text = f"{name}={getattr(config, name)}"
    for pattern in ("rank_pattern", "density_pattern"):
        text += f", {pattern}" if getattr(config, pattern) else ""
    return text


def _base(facts: CardFacts) -> str:
    revision = facts.config.revision
    return (facts.base or "not recorded") + (f" (revision {revision})" if facts.base and revision else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(facts: CardFacts, place: str) -> list[str]:
    task = getattr(facts.config.task_type, "value", facts.config.task_type)
    auto_class = _AUTO_CLASSES.get(task or "")
    lines = ["import spiel_peft  # makes the method known to PEFT", "from peft import PeftModel"]
    if auto_class is not None:
        lines += [f"from transformers import {auto_class}", ""]
        lines.append(f"base = {auto_class}.from_pretrained({_quoted(facts.base or 'BASE_MODEL')})")
    else:
        lines += ["", "base = ...  # the model that the adapter was trained on"]
    inside = "" if facts.name == "default" else f", subfolder={_quoted(facts.name)}"
    return [*lines, f"model = PeftModel.from_pretrained(base, {_quoted(place)}{inside})"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def install() -> None:
    """Make `PeftModel` write the section. Safe to call any number of times, and after this module was reloaded."""
    _wrap("create_or_update_model_card", _after_writing)
    _wrap("_upload_modified_files", _before_upload)


def _wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method of `PeftModel` by what `make` makes of the original one."""
    method = getattr(PeftModel, name, None)
    if method is None:
        return  # this version of PEFT or transformers writes cards in another way
    original = getattr(method, _ORIGINAL, method)
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, _ORIGINAL, original)
    setattr(PeftModel, name, wrapped)


def _after_writing(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> Any:
        result = original(self, output_dir)
        facts = facts_of_model(self)
        if facts:
            update_card(output_dir, facts)
        return result

    return create_or_update_model_card


def _before_upload(original: Callable[..., Any]) -> Callable[..., Any]:
    # `push_to_hub` saves the model and then writes the hub's card, or an empty one, over the card with the section.
    def _upload_modified_files(self: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        facts = facts_of_model(self)
        if facts:
            update_card(working_dir, facts, place=repo_id)
        return original(self, working_dir, repo_id, *args, **kwargs)

    return _upload_modified_files
