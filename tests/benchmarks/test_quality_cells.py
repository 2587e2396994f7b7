"""Cells of the quality benchmark: every method on the toy task, what it trains, and what it measures."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks_under_test import cell, corpora, methods, quality_plan, tasks, training
from peft import ShiraConfig, get_peft_model
from torch import Tensor

from spiel_peft import PruneRequest, SpIELConfig, SpIELLayer

PLAN = quality_plan.load()
SPARSE = [name for name, settings in PLAN["methods"].items() if settings.get("kind") == "sparse"]
ABLATIONS = next(study["variants"] for study in PLAN["studies"] if study["study"] == "ablate")
STEPS = 7


def toy_cell(settings: dict[str, Any], **fields: Any) -> cell.Cell:
    described = {"study": "screen", "method": "m", "r": 2, "rate": 3e-3, "seed": 0, "steps": STEPS, **fields}
    return cell.Cell(tier="toy", task="toy", settings=settings, **described)


def toy_setup(settings: dict[str, Any], r: int = 2, steps: int = STEPS, seed: int = 0) -> tuple[Any, training.Setup]:
    """The bare base model, and a method set up on a copy of it."""
    task = tasks.Toy()
    base = task.model()
    return base, methods.set_up(copy.deepcopy(base), task, settings, r, steps, 3e-3, seed)


def indices_by_module(model: Any) -> dict[str, Tensor]:
    return {
        name.partition(".spiel_delta.")[0].removeprefix("base_model.model."): indices.clone()
        for name, indices in model.named_buffers()
        if name.endswith(".indices")
    }


def log_of(model: Any) -> list[Any]:
    layer = next(module for module in model.modules() if isinstance(module, SpIELLayer))
    return layer.spiel_delta["default"].run.log


# The plan's methods


@pytest.mark.parametrize("name", [name for name in PLAN["methods"] if name not in ("base", "bitfit")])
def test_every_method_trains_the_budget_and_is_measured(name: str) -> None:
    settings = PLAN["methods"][name]
    result = cell.run(toy_cell(settings, method=name))
    expected = methods.lora_values(tasks.Toy().model(), tasks.Toy(), 2)
    if name not in cell.WITHOUT_BUDGET:
        assert result["trained_values"] == expected
    assert result["settings"] == settings and result["diverged_at"] is None
    assert set(result["scores"]) == {"validation", "forgetting"}
    assert math.isfinite(result["scores"]["validation"]["loss"])
    assert [point["step"] for point in result["curve"]] == [2, 3, 4, 5, 6, 7]
    assert result["seconds"] > 0 and result["train_seconds"] > 0 and result["peak_mib"] > 10


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_every_ablation_runs_and_trains_the_budget(name: str) -> None:
    settings = PLAN["methods"]["ag"] | ABLATIONS[name]
    result = cell.run(toy_cell(settings, method=name, steps=27))
    assert result["trained_values"] == methods.lora_values(tasks.Toy().model(), tasks.Toy(), 2)
    assert math.isfinite(result["scores"]["validation"]["loss"])


@pytest.mark.parametrize(("name", "growth"), [("ag", "accumulated_gradient"), ("ma", "momentum")])
def test_the_methods_of_today_have_todays_defaults(name: str, growth: str) -> None:
    defaults = SpIELConfig(growth=growth)
    settings = {key: value for key, value in PLAN["methods"][name].items() if key not in ("kind", "start")}
    assert settings.keys() == {"growth", *methods._CYCLE_FIELDS}
    assert settings == {key: getattr(defaults, key) for key in settings}


def test_only_finals_read_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    rows = tasks.Toy.rows

    def noting(self: Any, split: str) -> Any:
        read.append(split)
        return rows(self, split)

    monkeypatch.setattr(tasks.Toy, "rows", noting)
    for study in ("screen", "ablate", "landmarks"):
        assert "test" not in cell.run(toy_cell({"kind": "lora"}, study=study))["scores"]
    assert "test" not in read
    assert "test" in cell.run(toy_cell({"kind": "lora"}, study="finals"))["scores"]
    assert read.count("test") == 1


def test_the_bare_base_is_measured_untrained() -> None:
    result = cell.run(toy_cell({}, method="base", study="base", rate=0.0))
    task = tasks.Toy()
    assert result["scores"]["validation"] == task.scores(task.model(), "validation")
    assert result["scores"]["forgetting"] == task.forgetting_scores(task.model())
    assert result["trained_values"] == 0


def test_another_budget_than_the_cells_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "lora_values", lambda *_: 3)
    with pytest.raises(RuntimeError, match="m trains 496 values, LoRA of rank 2 3"):
        cell.run(toy_cell({"kind": "lora"}))


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown settings \['regrow_evry'\]"):
        cell.run(toy_cell({"kind": "sparse", "growth": "none", "regrow_evry": 3}))


def test_a_diverged_run_says_when() -> None:
    result = cell.run(toy_cell({"kind": "full"}, rate=1e30))
    assert 1 < result["diverged_at"] <= STEPS
    assert "scores" not in result


def test_equal_cells_have_equal_names_and_others_do_not() -> None:
    one = toy_cell({"kind": "lora"})
    assert one.name == cell.Cell.from_json(one.to_json()).name
    others = [
        replace(one, seed=1),
        replace(one, rate=1e-3),
        replace(one, settings={"kind": "full"}),
        replace(one, steps=8),
        replace(one, method="prune by |delta g|"),
    ]
    assert len({one.name, *(other.name for other in others)}) == 6
    assert "|" not in others[-1].name


def test_cells_are_reproducible_and_methods_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    loss = tasks.Toy.loss

    def noting(self: Any, model: Any, batch: Any) -> Tensor:
        if model.training:
            seen[-1].append(int(batch["input_ids"].sum()))
        return loss(self, model, batch)

    monkeypatch.setattr(tasks.Toy, "loss", noting)
    losses = []
    for settings, seed in (
        (PLAN["methods"]["ag"], 0),
        (PLAN["methods"]["ag"], 0),
        ({"kind": "lora"}, 0),
        ({"kind": "lora"}, 1),
    ):
        seen.append([])
        losses.append(cell.run(toy_cell(settings, seed=seed))["scores"]["validation"]["loss"])
    assert losses[0] == losses[1]
    assert seen[0] == seen[1] == seen[2] != seen[3]


# Where deltas start


def first_gradients(base: Any, batches: int) -> dict[str, Tensor]:
    """Gradients by an independent path: plain autograd on all parameters."""
    task, total = tasks.Toy(), {}
    stream = task.batches(0)
    parameters = dict(base.requires_grad_(True).named_parameters())
    for _ in range(batches):
        grads = torch.autograd.grad(task.loss(base, next(stream)), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name] = total.get(name, 0) + grad
    return total


@pytest.mark.parametrize("start", ["gradient", "snip", "magnitude", "lift"])
def test_starts_are_the_largest_scores(start: str) -> None:
    settings = {"kind": "sparse", "growth": "none", "start": start, "start_batches": 3}
    base, setup = toy_setup(settings)
    gradients = first_gradients(copy.deepcopy(base), 3)
    found = indices_by_module(setup.model)
    assert len(found) == 7
    for name, indices in found.items():
        weight = base.get_submodule(name).weight.detach()
        u, s, v = torch.linalg.svd(weight)
        scores = {
            "gradient": gradients[f"{name}.weight"],
            "snip": gradients[f"{name}.weight"] * weight,
            "magnitude": weight,
            "lift": u[:, : len(s) // 8] @ torch.diag(s[: len(s) // 8]) @ v[: len(s) // 8],
        }[start]
        cut = scores.abs().flatten()[indices.long()].min()
        assert int((scores.abs() > cut * (1 + 1e-4)).sum()) < len(indices)
    assert not any(p.detach().any() for p in setup.trained.values())


def test_the_lottery_draws_what_dense_training_changed_most() -> None:
    settings = {"kind": "sparse", "growth": "none", "start": "lottery", "lottery_rate": 1e-2}
    base, setup = toy_setup(settings)
    dense = copy.deepcopy(base).requires_grad_(True)
    trained = training.Setup(dense.train(), dict(dense.named_parameters()))
    training.train(trained, tasks.Toy(), seed=0, steps=STEPS, rate=1e-2)
    for name, indices in indices_by_module(setup.model).items():
        change = (dense.get_submodule(name).weight - base.get_submodule(name).weight).detach().abs().flatten()
        assert torch.equal(indices.long(), torch.topk(change, len(indices)).indices.sort().values)


def test_random_starts_follow_the_seed() -> None:
    settings = {"kind": "sparse", "growth": "none", "start": "random"}
    first, again, other = (indices_by_module(toy_setup(settings, seed=seed)[1].model) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_fixed_masks_do_not_move() -> None:
    _, setup = toy_setup(PLAN["methods"]["fixed_gradient"], steps=27)
    before = indices_by_module(setup.model)
    training.train(setup, tasks.Toy(), seed=0, steps=27, rate=3e-3)
    after = indices_by_module(setup.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_fixed_random_masks_are_pefts_shira() -> None:
    """Trained on the same positions, PEFT's SHiRA ends with the same model."""
    task = tasks.Toy()
    torch.manual_seed(0)
    config = ShiraConfig(r=2, target_modules="all-linear", random_seed=3, init_weights=True)
    model = get_peft_model(task.model(), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.zero_()
    positions = {}
    for name, module in model.named_modules():
        if hasattr(module, "shira_indices"):
            rows, cols = module.shira_indices["default"]
            positions[name.removeprefix("base_model.model.")] = rows.long() * module.in_features + cols.long()
    _, setup = toy_setup({"kind": "sparse", "growth": "none", "start": "random"})
    state = {}
    for key, indices in [(k, b) for k, b in setup.model.named_buffers() if k.endswith(".indices")]:
        module = key.partition(".spiel_delta.")[0].removeprefix("base_model.model.")
        state[key] = positions[module].sort().values.to(indices.dtype)
        state[key.removesuffix("indices") + "values"] = torch.zeros(len(indices))
    setup.model.load_state_dict(state, strict=False)
    training.train(training.Setup(model.train(), trained), task, seed=0, steps=STEPS, rate=3e-3)
    training.train(setup, task, seed=0, steps=STEPS, rate=3e-3)
    scores = [task.scores(m, "validation")["loss"] for m in (model, setup.model)]
    assert setup.values == sum(p.numel() for p in trained.values())
    assert scores[0] != task.scores(task.model(), "validation")["loss"]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


# The cycle's variants


def closes_of(settings: dict[str, Any], steps: int = 27) -> list[Any]:
    _, setup = toy_setup(settings, steps=steps)
    training.train(setup, tasks.Toy(), seed=0, steps=steps, rate=3e-3)
    return log_of(setup.model)


def test_the_first_close_replaces_all_or_as_many_as_any() -> None:
    settings = PLAN["methods"]["ag"]
    assert [report.rate for report in closes_of(settings)] == [1.0, pytest.approx(0.2 * (1 - 25 / 27))]
    kept = closes_of(settings | {"first_close_replaces_all": False})
    assert kept[0].rate == pytest.approx(0.2 * (1 - 5 / 27))


def test_prune_scores() -> None:
    def request(indices: list[int], values: list[float], gradient: list[float]) -> PruneRequest:
        return PruneRequest("m", torch.tensor(indices), torch.tensor(values), torch.tensor(gradient), 1)

    magnitude, saliency = methods._PruneScore("magnitude", False), methods._PruneScore("saliency", True)
    first = request([1, 4, 6], [1.0, -2.0, 0.5], [1.0, 0.1, -8.0])
    assert magnitude(first).tolist() == [1.0, 2.0, 0.5]
    assert saliency(first).tolist() == pytest.approx([1.0, 0.2, 4.0])
    # 3 and 9 were grown since the last close.
    second = request([3, 4, 9], [1.0, 1.0, 1.0], [2.0, 3.0, 4.0])
    assert saliency(second).tolist() == [math.inf, 3.0, math.inf]
    assert saliency(request([3, 4, 9], [1.0] * 3, [2.0, 3.0, 4.0])).tolist() == [2.0, 3.0, 4.0]


def test_protected_deltas_survive_the_close_after_they_grew() -> None:
    settings = PLAN["methods"]["ag"] | {"regrow_every": 5, "initial_regrow_rate": 0.4, "regrow_schedule": "constant"}
    for protect in (False, True):
        _, setup = toy_setup(settings | {"protect_grown": protect}, steps=30)
        sets = [indices_by_module(setup.model)]

        def note(step: int, loss: float, sets: list[Any] = sets, setup: Any = setup) -> None:
            if step % 5 == 0:
                sets.append(indices_by_module(setup.model))

        training.train(setup, tasks.Toy(), seed=0, steps=30, rate=3e-3, on_step=note)
        lost = 0
        for before, grown, after in zip(sets[1:], sets[2:], sets[3:], strict=False):
            for name in grown:
                fresh = grown[name][~torch.isin(grown[name], before[name])]
                lost += int((~torch.isin(fresh, after[name])).sum())
        assert (lost == 0) == protect


def test_zero_moments_are_those_of_grown_deltas_only() -> None:
    settings = PLAN["methods"]["ag"] | {"zero_moments": True}
    _, setup = toy_setup(settings, steps=27)
    seen: list[tuple[int, int]] = []
    inner = setup.after_step

    def checked(optimizer: torch.optim.Optimizer) -> None:
        before = {name: indices.clone() for name, indices in inner.before.items()}
        inner(optimizer)
        for name, indices in inner.indices.items():
            grown = ~torch.isin(indices, before[name])
            second = optimizer.state[inner.values[name.removesuffix("indices") + "values"]]["exp_avg_sq"]
            assert not second[grown].any()
            seen.append((int(grown.sum()), int(second.count_nonzero())))

    setup.after_step = checked
    training.train(setup, tasks.Toy(), seed=0, steps=27, rate=3e-3)
    assert any(grown for grown, _ in seen) and any(kept for _, kept in seen)


def test_decay_left_is_what_is_left() -> None:
    described = toy_cell({"kind": "sparse", "growth": "none", "decay_left": 0.31}, steps=300, rate=2e-3)
    decay = cell._decay(described)
    left = math.prod(1 - 2e-3 * (1 - step / 300) * decay for step in range(300))
    assert left == pytest.approx(0.31, abs=0.01)
    assert cell._decay(toy_cell({"kind": "sparse", "decay": 3.0})) == 3.0
    assert cell._decay(toy_cell({"kind": "lora"})) == 0.0


def test_micro_batches_add_up_to_the_batch() -> None:
    losses = [cell.run(toy_cell({"kind": "full", "micro_batches": n}))["scores"]["validation"]["loss"] for n in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match="a batch of 8 rows cannot be cut into 3 equal parts"):
        cell.run(toy_cell({"kind": "full", "micro_batches": 3}))


def test_half_of_each_needs_an_even_rank() -> None:
    with pytest.raises(ValueError, match="even r, got 1"):
        toy_setup(PLAN["methods"]["rosa"], r=1)


# Data


def test_verses_are_read_from_an_export() -> None:
    export = """$$$[ Module Heading ]

$$$Ruth 0:0
<title>Ruth</title> a preface
$$$Ruth 1:1
<div sID="x"/><w lemma="1">In the</w> <w>days</w>, <w>he</w><note n="a">or <q>she</q></note> said,<q marker="“"/> “Go.”
$$$Ruth 1:2
<title type="x">A heading</title><l>first</l><l>se<seg>co</seg>nd</l>
$$$Ruth 1:3

$$$I John 2:14
  last <lb/> one
"""
    assert list(corpora.parse_export(export)) == [
        (("Ruth", 1, 1), "In the days, he said, “Go.”"),
        (("Ruth", 1, 2), "first second"),
        (("I John", 2, 14), "last one"),
    ]


def test_splits_are_by_book_and_apart() -> None:
    assert not set(corpora.VALIDATION_BOOKS) & set(corpora.TEST_BOOKS)
    assert {corpora.split_of(book) for book in ("Acts", "John", "I John", "Genesis")} == {
        "validation",
        "test",
        "train",
    }
    assert corpora.split_of("I John") == "train"


def test_rows_are_collated_with_padding_that_nothing_learns() -> None:
    rows = [
        {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), "attention_mask": torch.ones(len(ids)).long()}
        for ids in ([5, 6, 7], [8])
    ]
    batch = tasks.collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, tasks.IGNORED, tasks.IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    whole = [{**row, "labels": torch.tensor([label])} for row, label in zip(rows, (3, 4), strict=True)]
    assert tasks.collate(whole)["labels"].tolist() == [3, 4]


def test_scores_do_not_depend_on_how_rows_are_batched() -> None:
    task = tasks.Toy()
    model = task.model()
    rows = task.rows("validation")
    uneven = [{key: value[: 4 + i] for key, value in row.items()} for i, row in enumerate(rows)]
    one = tasks.next_token_scores(model, uneven, batch_size=1)["loss"]
    assert tasks.next_token_scores(model, uneven, batch_size=6)["loss"] == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_smollm2_is_read_from_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dequantized once into the cache, it can be trained, and it knows English."""
    monkeypatch.setenv("SPIEL_BENCHMARK_CACHE", str(tmp_path))
    task = tasks.SmolSpanish()
    model = task.model()
    assert (tmp_path / "smollm2" / "model.safetensors").is_file() and not list(tmp_path.glob("*.part"))
    ids = task.encode(["The sun rises in the east and sets in the west."])[None]
    assert float(model(input_ids=ids, labels=ids).loss) < 3.0
    budget = methods.lora_values(model, task, 16)
    setup = methods.set_up(model, task, {"kind": "lora"}, 16, 10, 1e-3, 0)
    assert setup.values == budget == 4_884_480
