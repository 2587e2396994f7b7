"""The README is true: its code runs, its defaults are the config's, its files and commands exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from support.docs_blocks import ROOT, code_blocks, page
from transformers import LlamaConfig, LlamaForCausalLM

import spiel_peft
from spiel_peft import SpIELConfig

README = page("README.md")


def swapped_example() -> str:
    """The LoRA-to-SpIEL diff with the change applied."""
    (diff,) = code_blocks(README, "diff")
    lines = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    return "\n".join(lines)


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.randint(0, 50, (2, 8))
    names = {"model": LlamaForCausalLM(config), "batches": [{"input_ids": ids, "labels": ids}] * 6}
    exec(swapped_example(), names)
    loss_before = float(names["model"](**names["batches"][0]).loss.detach())
    (loop,) = code_blocks(README, "python")
    exec(loop, names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert isinstance(names["merged"], LlamaForCausalLM)
    assert float(names["merged"](**names["batches"][0]).loss.detach()) < loss_before


def test_settings_table_has_the_real_fields_and_defaults() -> None:
    lines = re.findall(r"^\| `.*", README, flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines]
    fields = {field.name for field in dataclasses.fields(SpIELConfig)}
    config = SpIELConfig()
    listed = set()
    for names, default in rows:
        for name in re.findall(r"`(\w+)`", names):
            listed.add(name)
            assert name in fields, name
            if default:
                assert getattr(config, name) == eval(default.strip("`")), name
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    assert fields - listed <= inherited


def test_names_and_files_it_mentions_exist() -> None:
    for name in ("SpIELConfig", "SpIELCallback", "SpIELOptimizer", "SM3", "register_growth_criterion"):
        assert name in README and hasattr(spiel_peft, name)
    for path in ("constraints.txt", "docs/command-line.md", "benchmarks/results"):
        assert path in README and (ROOT / path).exists()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", code_blocks(README, "bash")[0], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_numbers_come_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import report, tables

    results = tables.Results()
    assert report.with_tables(README, results) == README
    assert tables.alone_table(results) in README
    result = results.get("alone_smollm2_r16_4x128")
    columns = (
        *(tables.alone_seconds(result, part) for part in ("between windows", "cycle")),
        tables.alone_peaks(result),
    )
    between, cycle, peak = (tables.ratio_by_round(column, "SpIEL-AG", "LoRA") for column in columns)
    said = (
        f"SpIEL-AG takes {between:.2f} of LoRA's step between windows and {cycle:.2f} over a whole cycle of the "
        f"defaults, with {peak:.2f} of its peak memory"
    )
    assert said in " ".join(README.split())
