"""The command `memory`: counted bytes are those of the tensors that training keeps, on the path of a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks_under_test import ROOT, bases, environment, ledger, memory, pretend_gpu
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from spiel_peft import SpIELConfig

NAME = "64,96,6,4,2,128"  # of a Llama: hidden, intermediate, layers, heads, kv_heads, vocabulary
SHAPE = bases.LlamaShape(*map(int, NAME.split(",")))
AG, MA, LORA = "SpIEL-AG", "SpIEL-MA, SM3", "LoRA"
R = 4
# Rows and columns of all adapted matrices.
SIDES = 6 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (96 + 64))
K = R * SIDES


def setting(variant: str, **fields: Any) -> memory.Setting:
    usual = {"base": "nf4", "r": R, "batch_size": 1, "tokens": 32, "checkpointing": True}
    return memory.Setting(variant, **{**usual, **fields})


def counted(variant: str, **fields: Any) -> dict[str, Any]:
    return memory.count(memory.model_config(NAME), setting(variant, **fields))


@pytest.fixture(scope="module")
def ag() -> dict[str, Any]:
    return counted(AG)


def test_parts_are_as_large_as_the_design_says(ag: dict[str, Any]) -> None:
    """Value, index, gradient: 4 bytes each; AdamW: 8; a candidate: 16, and 16 probes per matrix."""
    largest, matrices = ag["largest"], 6 * 7
    assert ag["trainable"] == K
    assert largest["values"] == largest["indices"] == largest["gradients"] == 4 * K
    assert largest["optimizer state"] == 8 * K + 4 * matrices
    # And, per matrix, a number beyond the gradients that the search has found, and the zero that sums begin with.
    assert largest["window"] == 16 * K + 16 * (8 + 4) * matrices + 8 * matrices
    assert largest["workspace"] >= 2 * 96 * 64


@pytest.mark.slow
def test_sm3_keeps_a_number_per_row_and_column_and_momentum_no_window() -> None:
    result = counted(MA)
    assert result["largest"]["optimizer state"] == 4 * SIDES
    assert result["largest"]["window"] == 0
    assert result["phases"].keys() == {memory.BETWEEN, memory.CLOSE, memory.FIRST_CLOSE}


def test_lora_trains_as_many_values_and_has_no_phases() -> None:
    result = counted(LORA)
    assert result["trainable"] == K
    assert result["phases"].keys() == {memory.BETWEEN}
    assert result["largest"]["optimizer state"] == 8 * K + 4 * 2 * 6 * 7
    assert result["largest"]["workspace"] == result["largest"]["indices"] == result["largest"]["window"] == 0


@pytest.mark.parametrize("base", memory.BASES)
def test_base_weights_are_those_of_a_real_model(base: str) -> None:
    config = bases.llama_config(SHAPE, torch.bfloat16)
    if base == "nf4":
        model = bases.random_llama(SHAPE, torch.bfloat16, torch.device("cpu"), nf4=True)
    else:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    tensors = [*model.parameters(), *(b for b in model.buffers())]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        tensors += [] if state is None else [state.absmax, state.offset, state.state2.absmax]
    exact = sum(tensor.nbytes for tensor in tensors)
    # Tables of codes, one per model or one per matrix, are what is left.
    found = counted(MA, base=base)["largest"]["base weights"]
    assert exact <= found <= exact + 6 * 7 * (256 + 16) * 4 + 4096


@pytest.mark.slow
@pytest.mark.parametrize("variant", [AG, LORA])
def test_what_layers_add_is_linear(variant: str) -> None:
    """Counts of three and four layers say what all six take, moment by moment."""
    config, run = memory.model_config(NAME), setting(variant)
    few, _ = memory.count_run(config, run, memory.FEW)
    more, _ = memory.count_run(config, run, memory.MORE)
    all_layers, sizes = memory.count_run(config, run, 6)
    assert sizes["trainable"] == K
    for moment in few.keys() & more.keys():
        expected = sum(memory._extrapolated(few[moment], more[moment], 6).values())
        # Plans of how entries are gathered depend on where they lie.
        assert expected == pytest.approx(sum(all_layers[moment].values()), rel=0.01), moment


def test_counts_are_the_same_in_every_run(ag: dict[str, Any]) -> None:
    assert counted(AG) == ag


def test_few_candidates_make_small_windows(ag: dict[str, Any]) -> None:
    """The rate of the second close is 0.2; the first replaces all."""
    few = counted(AG, candidates=2.0)
    window = few["phases"][memory.OPEN]["parts"]["window"]
    # At its peak the step is the window's first one, which has no sums yet: positions and gradients, 8 bytes each.
    assert window == pytest.approx(0.4 * 8 * K, rel=0.1)
    assert ag["phases"][memory.OPEN]["parts"]["window"] == pytest.approx(16 * K, rel=0.1)
    assert few["phases"][memory.FIRST_OPEN] == ag["phases"][memory.FIRST_OPEN]


@pytest.mark.slow
def test_checkpointing_saves_activations() -> None:
    kept = {on: counted(MA, checkpointing=on)["largest"]["activations"] for on in (True, False)}
    assert kept[True] < kept[False] / 2


@pytest.mark.slow
def test_stand_ins_allocate_what_kernels_do() -> None:
    """With Triton's interpreter in the place of stand-ins, and numbers in all tensors, the same is counted."""
    script = (
        "import json, sys; from benchmarks import memory\n"
        f"run = memory.Setting({AG!r}, 'nf4', {R}, 1, 32, True)\n"
        f"peaks, _ = memory.count_run(memory.model_config({NAME!r}), run, 2, stand_ins=sys.argv[1] == 'yes')\n"
        "print(json.dumps([[*moment, parts] for moment, parts in peaks.items()]))"
    )
    found = []
    for stand_ins in ("yes", "no"):
        command = [sys.executable, "-W", "ignore", "-c", script, stand_ins]
        environment_ = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment_, capture_output=True, text=True, check=True)
        found.append({tuple(moment): parts for *moment, parts in json.loads(done.stdout.splitlines()[-1])})
    with_stand_ins, interpreted = found
    assert with_stand_ins == interpreted


def test_a_kernel_without_stand_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(pretend_gpu.STAND_INS, "_fold_4bit_kernel")
    with pytest.raises(NotImplementedError, match="kernel _fold_4bit_kernel has no stand-in"):
        memory.count_run(memory.model_config(NAME), setting(MA), 2)


def test_numbers_that_were_not_computed_are_not_read() -> None:
    with pretend_gpu.pretend_gpu():
        hollow = pretend_gpu.make_hollow(torch.empty(3, 3))
        product = hollow @ torch.ones(3, 2)
        assert pretend_gpu.is_hollow(product) and product.shape == (3, 2)
        assert pretend_gpu.is_hollow(product.add_(1.0).T)
        assert not pretend_gpu.is_hollow(torch.ones(3).mul(2))
        with pytest.raises(RuntimeError, match="reads numbers that were not computed"):
            bool(product[0, 0] > 0)


def test_only_our_own_code_is_told_of_a_gpu() -> None:
    namespace: dict[str, Any] = {"__name__": "spiel_kernels.somewhere", "x": torch.ones(2)}
    question = "asked = x.is_cuda, x.device.type, str(x.new_zeros(1, device=x.device).untyped_storage().device)"
    with pretend_gpu.pretend_gpu():
        exec(question, namespace)
        assert namespace["asked"] == (True, "cuda", "cpu")
        assert not namespace["x"].is_cuda


def test_the_ledger_finds_the_peak_and_names_it_afterwards() -> None:
    book = ledger.Ledger()
    book.moment = moment = ledger.Moment(1, "step", "forward", "")
    first = torch.ones(10)
    book.see(first)
    view = first[2:]
    book.see(view)
    second = torch.ones(5)
    book.see(second)
    del first  # the view keeps the memory
    del second
    book.name("values", [view])
    third = torch.ones(2)
    book.see(third)
    assert book.peaks() == {moment: {"values": 40, "temporary": 20}}


def test_models_by_folder(tmp_path: Path) -> None:
    memory.model_config(NAME).save_pretrained(tmp_path)
    assert memory.count(memory.model_config(str(tmp_path)), setting(LORA)) == counted(LORA)


@pytest.mark.slow
def test_the_command_keeps_what_it_counts_and_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    common = ["--output", str(tmp_path)]
    counting = [*common, "--count", "--models", NAME, "--r", "4", "--shapes", "1x32", "--checkpointing", "yes"]
    memory.run(parser.parse_args([*counting, "--variants", MA]))
    memory.run(parser.parse_args([*counting, "--variants", LORA]))
    memory.run(parser.parse_args([*counting, "--variants", LORA]))
    (result,) = environment.load_all(memory.PREFIX, tmp_path).values()
    assert [memory.entry_name(entry) for entry in result["counts"]] == [LORA, MA]
    assert result["settings"]["layers"] == 6
    capsys.readouterr()
    memory.run(parser.parse_args(common))
    printed = capsys.readouterr().out
    assert memory.counts_table(result) in printed and "| 1.000 |" in printed


def test_budgets_are_those_of_peft() -> None:
    config = bases.llama_config(SHAPE, torch.float32)
    for peft_config in (LoraConfig(r=R, target_modules="all-linear"), SpIELConfig(r=R, target_modules="all-linear")):
        model = get_peft_model(LlamaForCausalLM(config), peft_config)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == K
