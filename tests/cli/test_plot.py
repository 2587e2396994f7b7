"""`spiel-peft plot`: which pictures are drawn, and their content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.trainer_runs import regression, trainer

from spiel_peft import SpIELCallback, SpIELConfig
from spiel_peft.files.adapter_file import AdapterFile, StoredDelta
from spiel_peft.inspection import AdapterFacts, Close, adapter_facts, read_closes
from spiel_peft.inspection.facts import Losses, ModuleFacts
from spiel_peft.inspection.plots import (
    churn_figure,
    density_figure,
    histogram_figure,
    loss_figure,
    matrix_figure,
    place_of,
)

from .helpers import Shell


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_all_pictures_of_a_logged_run(shell: Shell, folders: Path) -> None:
    log = {"log_history": [{"loss": 1.0, "step": 1}, {"eval_loss": 2.0, "step": 1}, *closes()]}
    (folders / "adapter" / "trainer_state.json").write_text(json.dumps(log))
    data = shell.json("plot", "adapter", "--out", "new/plots", "--base", "base")
    assert data == {"files": [f"new/plots/{name}.png" for name in ("density", "histogram", "matrix", "churn", "loss")]}
    assert all(is_png(Path(file)) for file in data["files"])
    assert sorted(Path("new/plots").iterdir()) == sorted(Path(file) for file in data["files"])


def closes() -> list[dict[str, float]]:
    fields = {
        "spiel/rate": 0.2,
        "spiel/replaced": 3,
        "spiel/kept": 9,
        "spiel/churn": 0.25,
        "spiel/mean_abs_delta": 1e-3,
    }
    return [{**fields, "step": step, "epoch": 1.0} for step in (20, 5)]


def test_what_cannot_be_drawn_is_left_out_unless_asked_for(shell: Shell) -> None:
    data = shell.json("plot", "language", "--out", "plots")
    assert [Path(file).stem for file in data["files"]] == ["density", "histogram"]
    assert "matrix is left out" in data["warnings"][0] and "churn and loss are left out" in data["warnings"][1]
    assert "--base" in shell.fails("plot", "language", "--out", "more", "--kind", "matrix", code=3)
    assert "has no log of closes" in shell.fails("plot", "language", "--out", "more", "--kind", "churn", code=3)
    assert not Path("more").exists()


def test_the_matrix_is_chosen_by_the_end_of_its_name(shell: Shell) -> None:
    matrix = ["--kind", "matrix", "--base", "base"]
    shell("plot", "language", "--out", "plots", *matrix, "--module", "1.mlp.down_proj")
    message = shell.fails("plot", "language", "--out", "plots2", *matrix, "--module", "down_proj", code=3)
    assert "several modules" in message and "model.layers.0.mlp.down_proj" in message
    assert "no module named 'nothing'" in shell.fails(
        "plot", "language", "-o", "p", *matrix, "--module", "nothing", code=3
    )


def test_existing_pictures_are_kept(shell: Shell, folders: Path) -> None:
    shell("plot", "language", "--out", "plots", "--kind", "histogram")
    (folders / "plots" / "mine.txt").write_text("kept")
    before = (folders / "plots" / "histogram.png").read_bytes()
    assert "exists already" in shell.fails("plot", "task", "--out", "plots", "--kind", "histogram", code=4)
    assert (folders / "plots" / "histogram.png").read_bytes() == before
    shell("plot", "task", "--out", "plots", "--kind", "histogram", "--overwrite")
    assert (folders / "plots" / "histogram.png").read_bytes() != before
    assert (folders / "plots" / "mine.txt").read_text() == "kept"


def test_a_damaged_log_is_named(shell: Shell, folders: Path) -> None:
    (folders / "log.json").write_text("{")
    churn = ["--kind", "churn", "--out", "plots", "--log"]
    assert "log.json cannot be read" in shell.fails("plot", "language", *churn, "log.json", code=3)
    (folders / "log.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    assert "logs no close" in shell.fails("plot", "language", *churn, "log.json", code=3)


def test_a_log_without_losses_is_named(shell: Shell, folders: Path) -> None:
    (folders / "log.json").write_text(json.dumps({"log_history": closes()}))
    loss = ["--kind", "loss", "--out", "plots", "--log", "log.json"]
    assert "log.json logs no training loss" in shell.fails("plot", "language", *loss, code=3)
    (folders / "log.json").write_text(json.dumps({"log_history": [{"loss": "a", "step": 1}, *closes()]}))
    assert "log.json logs a loss without a step or a number" in shell.fails("plot", "language", *loss, code=3)


def test_the_loss_curve_has_every_loss_and_close() -> None:
    losses = Losses({1: 3.0, 2: 2.0, 3: 1.0}, {0: 3.5, 3: 1.5})
    (ax,) = loss_figure(losses, [Close(2, 1.0, 3, 0, 1.0, 1e-3)]).axes
    close, batches, _, held_out = ax.get_lines()
    assert close.get_xdata() == [2, 2]
    assert list(batches.get_xdata()) == [1, 2, 3] and list(batches.get_ydata()) == [3, 2, 1]
    assert list(held_out.get_xdata()) == [0, 3] and list(held_out.get_ydata()) == [3.5, 1.5]
    assert [text.get_text() for text in ax.texts] == ["3.50", "1.50"]


def test_unknown_kind_is_wrong_usage(shell: Shell) -> None:
    assert "density, histogram" in shell.fails("plot", "language", "--out", "plots", "--kind", "cake", code=2)


def test_without_matplotlib_the_extra_is_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "spiel_peft.inspection.plots")
    monkeypatch.delattr("spiel_peft.inspection.plots")
    assert "pip install 'spiel-peft[plot]'" in shell.fails("plot", "language", "--out", "plots", code=5)


# -- content of the pictures -----------------------------------------------------------------------


def test_the_map_holds_every_delta_in_its_place() -> None:
    """A weight of 400 x 600 in 200 x 200 cells: 2 rows and 3 columns each."""
    positions = torch.tensor([0, 599, 600 * 3 + 4, 600 * 399 + 599])
    delta = StoredDelta(positions, torch.tensor([1.0, -2.0, 3.0, -4.0]))
    module = ModuleFacts("a.b", 4, (400, 600), 400, "float32", 1.0, 1.0, 4.0, 0)
    axes = matrix_figure(module, delta).axes
    (image,) = [ax.images[0] for ax in axes if ax.images and ax.images[0].get_array().shape == (200, 200)]
    grid = np.asarray(image.get_array())
    expected = {(0, 0): 1.0, (0, 199): 2.0, (1, 1): 3.0, (199, 199): 4.0}
    assert {(int(r), int(c)): grid[r, c] for r, c in zip(*grid.nonzero(), strict=True)} == expected


def test_the_density_map_is_layer_by_module(folders: Path) -> None:
    facts = adapter_facts("language", "base")
    grid = np.asarray(density_figure(facts).axes[0].images[0].get_array())
    assert grid.shape == (2, 2)
    assert grid.tolist() == [[100 * m.density for m in facts.modules[row : row + 2]] for row in (0, 2)]


def test_the_histogram_counts_every_delta(folders: Path) -> None:
    facts = adapter_facts("language")
    counts = [patch.get_data().values.sum() for patch in histogram_figure(facts).axes[0].patches]
    values = torch.cat([delta.values for delta in facts.adapter.deltas.values()])
    assert counts == [int((values < 0).sum()), int((values > 0).sum())]


def test_a_rewound_adapter_can_be_drawn(shell: Shell) -> None:
    shell("extract", "--base", "base", "--finetuned", "finetuned", "--r", "1", "--rewind", "--out", "ticket")
    shell("plot", "ticket", "--out", "plots", "--base", "base")


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.7.mlp.up_proj", (7, "mlp.up_proj")),
        ("model.layers.3.mlp.experts.5.w1", (3, "mlp.experts.*.w1")),
        ("lm_head", (None, "lm_head")),
        ("model.embed_tokens", (None, "embed_tokens")),
        ("0.weight", (0, "weight")),
    ],
)
def test_layer_and_kind(module: str, place: tuple[int | None, str]) -> None:
    assert place_of(module) == place


def test_churn_of_a_run_by_the_trainer(tmp_path: Path) -> None:
    model = regression()
    run = trainer(model, tmp_path, callbacks=[SpIELCallback()], save_strategy="steps", save_steps=4)
    run.train()
    entries = [entry for entry in run.state.log_history if "spiel/churn" in entry]
    found = read_closes(tmp_path)  # of the last checkpoint
    assert [(c.step, c.churn, c.replaced) for c in found] == [
        (e["step"], e["spiel/churn"], e["spiel/replaced"]) for e in entries
    ]
    assert len(found) >= 3 and read_closes(tmp_path / "checkpoint-4") == found[:1]
    lines = churn_figure(found).axes[0].get_lines()
    assert lines[1].get_xdata().tolist() == [c.step for c in found]
    assert lines[1].get_ydata().tolist() == [100 * c.churn for c in found]


def facts_of(values: list[torch.Tensor]) -> AdapterFacts:
    """Facts of an adapter with these deltas, one module each."""
    deltas = {str(n): StoredDelta(torch.arange(v.numel()), v) for n, v in enumerate(values)}
    adapter = AdapterFile(SpIELConfig(r=1), deltas, {})
    modules = [ModuleFacts(n, d.k, None, None, "", 0.0, 0.0, float(d.values.abs().max()), 0) for n, d in deltas.items()]
    return AdapterFacts(Path("a"), adapter, modules, None, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_histogram_counts_deltas_of_every_size(dtype: torch.dtype) -> None:
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    odd = [float("nan"), float("inf"), 0.0, -0.0]
    samples = [torch.tensor([x], dtype=dtype) for x in (least, most, 1e-3, 0.1, -0.7)]
    samples += [torch.tensor([least, -least, most, -most, 1.0, *odd], dtype=dtype), torch.randn(1000).to(dtype)]
    for values in ([sample] for sample in samples):
        (ax,) = histogram_figure(facts_of(values)).axes
        drawn = sum(patch.get_data().values.sum() for patch in ax.patches)
        sized = sum(int((v.isfinite() & (v != 0)).sum()) for v in values)
        assert drawn == sized
        title = ax.get_title()
        assert f"{values[0].numel():,} deltas, {int((values[0] == 0).sum())} of them zero" in title
        assert ("2 NaN or infinite" in title) == (values[0].numel() == 9)


def test_losses_that_are_not_finite_are_named() -> None:
    nan = float("nan")
    (ax,) = loss_figure(Losses({1: 2.0, 2: nan, 3: 1.0}, {3: float("inf")}), []).axes
    assert "2 of the losses NaN or infinite" in ax.get_title() and ax.get_ylim()[1] == 2.5


def test_one_close_is_no_plural() -> None:
    (ax, _) = churn_figure([Close(2, 1.0, 3, 0, 1.0, 1e-3)]).axes
    assert ax.get_title() == "Index churn over 1 close"
