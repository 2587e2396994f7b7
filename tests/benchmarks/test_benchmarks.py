"""The benchmarks: index sets, clocks, variants and the commands, all at tiny sizes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks_under_test import (
    bases,
    environment,
    index_sets,
    profile,
    scaling,
    step,
    stepping,
    timing,
    variants,
)

from spiel_kernels import check_index_set
from spiel_peft import SparseDelta, SpIELConfig

CPU = torch.device("cpu")
TINY = bases.BaseSpec(shape=bases.TINY)
STEEP = index_sets.Profile(
    tuple(torch.linspace(8, 0.2, index_sets.BINS).tolist()),
    tuple(torch.linspace(30, 0.05, index_sets.BINS).tolist()),
    0.01,
)


def parsed(module: Any, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(argv)


# Index sets


@pytest.mark.parametrize("k", [0, 1, 57, 60 * 40])
@pytest.mark.parametrize("kind", index_sets.INDEX_SETS)
def test_drawn_index_sets_are_index_sets(kind: str, k: int) -> None:
    drawn = index_sets.draw_index_set(kind, 60, 40, k, seed=1)
    assert drawn.numel() == k
    assert check_index_set(drawn, 60 * 40) is None
    assert torch.equal(drawn, index_sets.draw_index_set(kind, 60, 40, k, seed=1))
    if 0 < k < 60 * 40:
        assert not torch.equal(drawn, index_sets.draw_index_set(kind, 60, 40, k, seed=2))


def test_draws_have_the_profile_that_they_are_drawn_from() -> None:
    measured = index_sets.ProfileSampler.measured().profile("up_proj")
    rows, cols = 1536, 576
    drawn = index_sets.draw_positions(measured, rows, cols, rows * cols // 100, seed=0).long()
    for counts, expected in (
        (torch.bincount(drawn // cols, minlength=rows), measured.rows),
        (torch.bincount(drawn % cols, minlength=cols), measured.cols),
    ):
        profile_drawn = index_sets.profile_of(counts)
        heavy = torch.tensor(expected, dtype=torch.float64) > 1
        torch.testing.assert_close(profile_drawn[heavy], torch.tensor(expected)[heavy].double(), rtol=0.25, atol=0.0)


def test_profiles_concentrate_and_uniform_sets_do_not() -> None:
    k = 1536 * 576 // 100
    shares = {
        kind: index_sets.block_share(index_sets.draw_index_set(kind, 1536, 576, k, 0), 1536, 576)
        for kind in index_sets.INDEX_SETS
    }
    assert shares["profile"] < 0.15 and shares["uniform"] > 0.4


def test_profile_of_counts_by_hand() -> None:
    even = index_sets.profile_of(torch.full((512,), 7))
    torch.testing.assert_close(even, torch.ones(index_sets.BINS, dtype=torch.float64))
    one_row = index_sets.profile_of(torch.tensor([0] * 511 + [5]))
    assert one_row[0] == 512 and one_row[2:].max() == 0


def test_index_sets_refuse() -> None:
    with pytest.raises(ValueError, match="k must be between 0 and rows \\* cols=12, got 13"):
        index_sets.draw_positions(STEEP, 3, 4, 13, seed=0)
    with pytest.raises(ValueError, match="index set must be one of profile, uniform, got 'even'"):
        index_sets.draw_index_set("even", 3, 4, 1, seed=0)
    with pytest.raises(ValueError, match="no profiles; measure them"):
        index_sets.ProfileSampler({})


def test_profiles_are_measured_per_type_of_module() -> None:
    measured = profile.measure(TINY.build(), TINY.batches(2, 16)[:1], 0.05)
    assert set(measured) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    entry = measured["down_proj"]
    assert entry["shape"] == [64, 128] and entry["samples"] == 2
    widths = index_sets.bin_edges().diff()
    for side in ("rows", "cols"):
        # The mean over all rows of counts over their mean.
        assert float(torch.tensor(entry[side], dtype=torch.float64) @ widths) == pytest.approx(1.0, rel=1e-2)
    index_sets.Profile.from_json(json.loads(json.dumps(entry)))


def test_packed_batches_are_the_stream_in_order() -> None:
    batches = bases.packed_batches(torch.arange(25), 2, 4)
    assert torch.equal(torch.stack(batches).flatten(), torch.arange(24))
    with pytest.raises(ValueError, match="7 tokens do not fill one batch of 2 x 4"):
        bases.packed_batches(torch.arange(7), 2, 4)


# Clocks


def test_interleaved_actions_run_once_per_round() -> None:
    calls: list[str] = []
    actions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = timing.interleave(actions, 4, CPU)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)
    rounds = [calls[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(names) == list("abc") for names in rounds) and rounds[0] != rounds[1]


def test_interleaving_stops_with_the_clock_after_a_whole_round() -> None:
    seconds = timing.interleave({"a": lambda: None, "b": lambda: None}, 9, CPU, timing.Clock(0.0))
    assert [len(values) for values in seconds.values()] == [1, 1]


def test_quantiles() -> None:
    assert [timing.quantile([3.0, 1.0, 2.0], share) for share in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]
    assert timing.Clock().left() == float("inf") and not timing.Clock().expired()


def test_share_of_a_run_by_hand() -> None:
    assert stepping.moving_steps("accumulated_gradient", 25) == [1, 2, 3, 4, 5, 21, 22, 23, 24, 25]
    assert stepping.moving_steps("momentum", 25) == [5, 25]
    seconds = [9.0] * 5 + [1.0] * 15 + [1.2] * 5
    shares = stepping.shares(seconds, "accumulated_gradient")
    assert shares["share"] == pytest.approx(1.0 / 21) and shares["share_of_moving_steps"] == pytest.approx(1.0 / 21)


# Variants


@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
def test_every_variant_trains(nf4: bool) -> None:
    spec = bases.BaseSpec(shape=bases.TINY, dtype="bfloat16", nf4=nf4)
    batches, failures = spec.batches(1, 16), {}
    runs = stepping.set_up(spec.build, variants.VARIANTS, variants.Budget.of_rank(2), failures)
    for run in runs.values():
        run.use_checkpointing(nf4)
    stepping.warm_up(runs, batches, failures, steps=1)
    assert list(failures) == (["full fine-tuning"] if nf4 else [])
    counts = {name: run.trainable for name, run in runs.items() if name not in ("lower bound", "full fine-tuning")}
    assert len(set(counts.values())) == 1 and runs["lower bound"].trainable == 0
    seconds = stepping.step_seconds(runs, batches, 1)
    assert all(len(values) == 1 for values in seconds.values())


def test_the_dense_formula_computes_what_spiel_does() -> None:
    budget, ids = variants.Budget.of_rank(2), TINY.batches(1, 16)[0]
    ours = variants.build("SpIEL-AG, uniform indices", TINY.build(), budget)
    dense = variants.build("dense formula", TINY.build(), budget)
    deltas = [module for module in ours.model.modules() if isinstance(module, SparseDelta)]
    values = [parameter for parameter in dense.model.parameters() if parameter.requires_grad]
    for delta, parameter in zip(deltas, values, strict=True):
        delta.values.data.normal_()
        parameter.data.copy_(delta.values)
    for run in (ours, dense):
        run.model(input_ids=ids, labels=ids).loss.backward()
    for delta, parameter in zip(deltas, values, strict=True):
        torch.testing.assert_close(delta.values.grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_budget_by_density_gives_lora_the_nearest_rank() -> None:
    base = TINY.build()
    budget = variants.Budget.of_density(base, 0.1)
    spiel = variants.build("SpIEL-AG", base, budget).trainable
    lora = variants.build("LoRA", TINY.build(), budget).trainable
    assert abs(spiel / lora - 1) < 0.2
    with pytest.raises(ValueError, match="variant must be one of lower bound \\| LoRA .*, got 'DoRA'"):
        variants.build("DoRA", base, budget)


def test_a_variant_that_fails_fails_alone() -> None:
    failures: dict[str, str] = {}
    runs = stepping.set_up(TINY.build, ["LoRA", "DoRA"], variants.Budget.of_rank(2), failures)
    assert list(runs) == ["LoRA"] and "variant must be one of" in failures["DoRA"]
    stepping.warm_up(runs, [torch.tensor([[10**6]])], failures)
    assert not runs and "IndexError" in failures["LoRA"]


def test_bases_survive_json() -> None:
    spec = stepping.AloneSpec(TINY.sliced(1), "LoRA", variants.Budget.of_rank(2), 1, 16)
    assert stepping.AloneSpec.from_json(spec.to_json()) == spec
    measured = stepping.measure_here(spec)
    assert measured["peak_mib"] >= measured["loaded_mib"] > 50 and measured["trainable"] > 0
    assert measured["peak_mib"] == max(measured["step_peaks_mib"]) and len(measured["step_peaks_mib"]) == 3
    assert measured["trainable"] > 0 and "seconds" not in measured
    with pytest.raises(ValueError, match="a base needs a checkpoint or a shape"):
        bases.BaseSpec().build()


@pytest.mark.parametrize("name", step.COMPARED)
def test_a_variant_alone_is_timed_through_a_default_cycle(name: str) -> None:
    spec = stepping.AloneSpec(TINY, name, variants.Budget.of_rank(2), 1, 16, cycles=1)
    measured = stepping.measure_here(spec)
    assert len(measured["seconds"]) == 25 and min(measured["seconds"]) > 0
    moving = {"SpIEL-AG": [1, 2, 3, 4, 5, 21, 22, 23, 24, 25], "SpIEL-MA, SM3": [5, 25]}
    assert measured["moving_steps"] == moving.get(name, [])
    assert measured["peak_mib"] > 50


def test_the_default_cycle_is_what_is_timed() -> None:
    """The numbers that the benchmark repeats are those of the config, and a timed run moves deltas by them."""
    config = SpIELConfig()
    assert (config.accumulation_steps, config.regrow_every) == (variants.FIRST_CLOSE, stepping.REGROW_EVERY)
    run = variants.cycling_run("accumulated_gradient", TINY.build(), variants.Budget.of_rank(2))
    (delta, *_) = (module for module in run.model.modules() if isinstance(module, SparseDelta))
    ids, closes = TINY.batches(1, 16)[0], []
    for number in range(1, 26):
        before = delta.indices.clone()
        run.step(ids)
        if not torch.equal(before, delta.indices):
            closes.append(number)
    assert closes == [5, 25]


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    spec = stepping.AloneSpec(TINY, "SpIEL-AG", variants.Budget.of_rank(2), 1, 16)
    measured = stepping.in_own_process(spec)
    assert measured["peak_mib"] >= measured["loaded_mib"] > 50
    assert "no result after 0 s" in stepping.in_own_process(spec, timeout_seconds=0.01)["error"]


# Commands


def test_step_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "COMPARED", ("LoRA", "SpIEL-AG"))
    argv = [
        "--tiny",
        "--parts",
        "alone",
        "time",
        "share",
        "layer",
        "--r",
        "2",
        "--shapes",
        "1x16",
        "--repetitions",
        "1",
        "--rounds",
        "1",
    ]
    step.run(parsed(step, *argv, "--cycles", "1", "--output", str(tmp_path)))
    timed = environment.load("step_tiny_r2_1x16", tmp_path)
    assert list(timed["seconds"]) == list(step.TIMED) and not timed["failed"]
    assert timed["versions"]["torch"] == torch.__version__ and timed["commit"] and timed["date"]
    (entries,) = environment.load("alone_tiny_r2_1x16", tmp_path)["rounds"]
    assert {name: len(entry["seconds"]) for name, entry in entries.items()} == dict.fromkeys(step.COMPARED, 25)
    share = environment.load("share_tiny_r2_1x16", tmp_path)["growth"]
    assert {name: len(entry["seconds"]) for name, entry in share.items()} == {
        "accumulated_gradient": 25,
        "momentum": 25,
    }
    assert not environment.load("layer_64x48", tmp_path)["failed"]


def test_scaling_varies_one_size_at_a_time() -> None:
    args = parsed(scaling, "--densities", "0.1", "--widths", "64", "--tokens", "32")
    points = list(scaling.points(args))
    assert [point.grows for point in points] == ["density", "width", "tokens"]
    assert points[2].batch() == (1, 32) and points[0].batch() == (4, 128)
    small = scaling.Point("tokens", 0.1, 64, 16)
    result = scaling.measure(small, 1, memory=False)
    assert list(result["seconds"]) == list(scaling.VARIANTS) and not result["failed"]
