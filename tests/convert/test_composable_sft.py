"""Adapters made of pytorch_diff.bin compute the same; damaged and hostile files are refused."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import logits, tiny_bert
from torch import Tensor, nn

from spiel_peft.convert import convert_adapter, convert_composable_sft
from spiel_peft.convert.from_composable_sft import _flat, _unravel_column_major
from spiel_peft.files.adapter_file import read_adapter

from .helpers import column_major, loaded, sparse_like

LAYER = "bert.encoder.layer.0"
MATRICES = (
    "bert.embeddings.word_embeddings.weight",
    f"{LAYER}.attention.self.query.weight",
    f"{LAYER}.output.dense.weight",
)
SMALL = (f"{LAYER}.attention.self.query.bias", f"{LAYER}.attention.output.LayerNorm.weight")


def diffs_of(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: sparse_like(model.get_parameter(name), seed=i) for i, name in enumerate(names)}


def write(folder: Path, tables: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(tables, folder / "pytorch_diff.bin")
    return folder


def applied(diffs: dict[str, Tensor], full: dict[str, Tensor]) -> Tensor:
    """Outputs of a model whose parameters were changed in place."""
    model = tiny_bert()
    with torch.no_grad():
        for name, diff in diffs.items():
            model.get_parameter(name).add_(diff)
        for name, value in full.items():
            model.get_parameter(name).copy_(value)
    return logits(model)


@pytest.mark.parametrize("tables", [("diffs", "abs"), ("body", "head")], ids="-".join)
def test_outputs_are_those_of_the_source(tmp_path: Path, tables: tuple[str, str]) -> None:
    model = tiny_bert()
    diffs = diffs_of(model, (*MATRICES, *SMALL))
    full = {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
    encoded = {name: column_major(diff) for name, diff in diffs.items()}
    if tables[0] == "body":
        encoded[MATRICES[0]] = diffs[MATRICES[0]].to_sparse()
    source = write(tmp_path / "source", {tables[0]: encoded, tables[1]: full})
    result = convert_adapter(source, tmp_path / "out", base=model, task_type="SEQ_CLS")
    assert result.kind == "composable-sft" and result.modules == sorted(n.removesuffix(".weight") for n in MATRICES)
    assert result.num_deltas == sum(int((diffs[name] != 0).sum()) for name in MATRICES)
    assert result.dropped == []
    torch.testing.assert_close(loaded(tiny_bert(), tmp_path / "out"), applied(diffs, full), rtol=0, atol=0)
    adapter = read_adapter(tmp_path / "out")
    assert adapter.config.growth == "none" and adapter.config.bias == "spiel_only"
    assert set(adapter.config.modules_to_save) >= {"classifier", f"{LAYER}.attention.output.LayerNorm"}
    # The adapter has all biases of adapted modules, and the unchanged part of the LayerNorm.
    assert f"{LAYER}.output.dense.base_layer.bias" in adapter.others
    assert f"{LAYER}.attention.output.LayerNorm.bias" in adapter.others


def test_positions_are_turned_from_columns_to_rows() -> None:
    for shape in ((3, 5), (4, 2, 3), (2, 3, 2, 5)):
        row_major = torch.arange(torch.Size(shape).numel()).view(shape)
        column_order = torch.from_numpy(row_major.numpy().flatten(order="F").copy())
        assert torch.equal(_flat(_unravel_column_major(torch.arange(len(column_order)), shape), shape), column_order)


def test_a_base_is_needed_only_for_what_cannot_be_a_delta(tmp_path: Path) -> None:
    model = tiny_bert()
    matrices, small = diffs_of(model, MATRICES), diffs_of(model, SMALL)
    source = write(tmp_path / "matrices", {"diffs": {n: column_major(d) for n, d in matrices.items()}})
    convert_composable_sft(source, tmp_path / "out")
    torch.testing.assert_close(loaded(tiny_bert(), tmp_path / "out"), applied(matrices, {}), rtol=0, atol=0)
    assert read_adapter(tmp_path / "out").others == {}

    both = {n: column_major(d) for n, d in {**matrices, **small}.items()}
    source = write(tmp_path / "both", {"diffs": both})
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.config.architectures = [type(model).__name__]
    for base in (None, shapes, model.config):
        with pytest.raises(ValueError, match=r"pytorch_diff.bin.*(values|full).*pass (base=|a checkpoint)"):
            convert_composable_sft(source, tmp_path / "new", base)
    assert not (tmp_path / "new").exists()
    result = convert_composable_sft(source, tmp_path / "new", others="drop")
    assert result.dropped == sorted(SMALL) and result.others == []
    torch.testing.assert_close(loaded(tiny_bert(), tmp_path / "new"), applied(matrices, {}), rtol=0, atol=0)


def test_the_base_may_be_a_folder_of_a_model_without_the_head(tmp_path: Path) -> None:
    model = tiny_bert()
    model.bert.save_pretrained(tmp_path / "base")
    diffs = diffs_of(model, (*MATRICES, *SMALL))
    source = write(tmp_path / "source", {"diffs": {name: column_major(diff) for name, diff in diffs.items()}})
    convert_adapter(source, tmp_path / "out", base=tmp_path / "base")
    torch.testing.assert_close(loaded(tiny_bert(), tmp_path / "out"), applied(diffs, {}), rtol=0, atol=0)
    # PEFT asks every adapter of this task for a head.
    with pytest.raises(ValueError, match="task_type='SEQ_CLS'.*pass base= with the head, or leave task_type out"):
        convert_adapter(source, tmp_path / "classifies", base=tmp_path / "base", task_type="SEQ_CLS")
    convert_adapter(source, tmp_path / "classifies", base=model, task_type="SEQ_CLS")
    torch.testing.assert_close(loaded(tiny_bert(), tmp_path / "classifies"), applied(diffs, {}), rtol=0, atol=0)


def test_files_written_by_older_versions_are_read(tmp_path: Path) -> None:
    """Older numpy had its numbers in another module, and older torch had a format without zip."""
    diff = sparse_like(torch.empty(6, 4))
    new = write(tmp_path / "new", {"diffs": {"lin.weight": column_major(diff)}}) / "pytorch_diff.bin"
    (tmp_path / "numpy").mkdir()
    with zipfile.ZipFile(new) as old, zipfile.ZipFile(tmp_path / "numpy" / new.name, "w") as written:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\nscalar\n" in content
                content = content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
            written.writestr(item, content)
    (tmp_path / "flat").mkdir()
    tables = {"diffs": {"lin.weight": column_major(diff)}}
    torch.save(tables, tmp_path / "flat" / new.name, _use_new_zipfile_serialization=False)
    for name in ("new", "numpy", "flat"):
        convert_adapter(tmp_path / name, tmp_path / f"{name} out")
        delta = read_adapter(tmp_path / f"{name} out").deltas["lin"]
        dense = torch.zeros(24)
        dense[delta.indices.long()] = delta.values
        assert torch.equal(dense.view(6, 4), diff), name


def test_a_shape_that_only_the_file_claims_takes_no_memory(tmp_path: Path) -> None:
    entry = {"size": (2**40,), "index_steps": [5], "values": torch.ones(1)}
    lin = column_major(torch.eye(4))
    source = write(tmp_path / "abs", {"diffs": {"lin.weight": lin}, "abs": {"head.weight": entry}})
    with pytest.raises(ValueError, match="'head.weight' of 'abs' has the shape .* too large"):
        convert_adapter(source, tmp_path / "out")
    source = write(tmp_path / "diffs", {"diffs": {"lin.weight": lin, "norm.weight": entry}})
    with pytest.raises(ValueError, match="'norm.weight' cannot become a sparse delta"):
        convert_adapter(source, tmp_path / "out")


def test_a_head_that_the_base_lacks_is_kept_and_said(tmp_path: Path) -> None:
    tables = {"diffs": {"lin.weight": column_major(torch.eye(4))}, "abs": {"head.weight": torch.ones(2, 4)}}
    result = convert_adapter(write(tmp_path / "source", tables), tmp_path / "out", base={"lin.weight": (4, 4)})
    assert result.others == ["head.weight"] and any("does not have head.weight" in note for note in result.notes)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    source = write(tmp_path / "evil", {"diffs": {"a.weight": Evil(tmp_path / "was_run")}})
    with pytest.raises(ValueError, match=r"pytorch_diff.bin is refused: .*could run code"):
        convert_adapter(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil"]


def edited(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    entry = column_major(sparse_like(torch.empty(4, 6), 0.5))
    change(entry)
    return {"diffs": {"lin.weight": entry}}


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"weights": {}}, "none of the tables"),
        ({"diffs": {}, "surprise": {}}, "does not know: .'surprise'"),
        ({"diffs": {}, "block_sparses": {"a": {}}}, "block_sparses"),
        ({"diffs": [1]}, "must map"),
        ({"diffs": {"lin.weight": {"size": [2]}}}, "'lin.weight' has none of the known encodings"),
        (edited(lambda e: e["index_steps"].append(1)), "index steps for"),
        (edited(lambda e: e.update(index_steps=[0] * len(e["index_steps"]))), "step below 1"),
        (edited(lambda e: e.update(index_steps=[-1, *e["index_steps"][1:]])), "lead out of the shape"),
        (edited(lambda e: e["index_steps"].__setitem__(0, 20)), "lead out of the shape"),
        (edited(lambda e: e.update(index_steps=[0.5] * len(e["index_steps"]))), "list of integers"),
        (edited(lambda e: e.update(size=(4, -6))), "positive integers"),
        (edited(lambda e: e["values"].fill_(float("nan"))), "not finite"),
        (edited(lambda e: e.update(values=e["values"].long())), "floating"),
        ({"diffs": {}}, "nothing to convert"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(tmp_path: Path, tables: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "source", tables)
    with pytest.raises(ValueError, match=rf"(?s)pytorch_diff\.bin.*{message}"):
        convert_adapter(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_another_models_base_and_cut_off_files_are_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    encoded = {name: column_major(diff) for name, diff in diffs_of(model, MATRICES).items()}
    source = write(tmp_path / "source", {"diffs": encoded})
    wrong = {name: (5, 5) for name in MATRICES}
    with pytest.raises(ValueError, match=rf"{MATRICES[0]}.* has shape \(40, 16\), but \(5, 5\)"):
        convert_adapter(source, tmp_path / "out", base=wrong)
    with pytest.raises(ValueError, match="has no tensor"):
        convert_adapter(source, tmp_path / "out", base={"other.weight": (40, 16)})
    with pytest.raises(ValueError, match="others must be one of"):
        convert_adapter(source, tmp_path / "out", others="burn")
    file = source / "pytorch_diff.bin"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="pytorch_diff.bin (cannot be read|is refused)"):
        convert_adapter(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="pytorch_diff.bin is missing"):
        convert_composable_sft(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parameter_of_a_module_with_children_is_not_silently_dropped(tmp_path: Path) -> None:
    entry = {"diffs": {"cls.predictions.bias": column_major(torch.ones(4)), "lin.weight": column_major(torch.eye(4))}}
    source = write(tmp_path / "source", entry)
    base = {"cls.predictions.bias": (4,), "cls.predictions.decoder.weight": (4, 4), "lin.weight": (4, 4)}
    with pytest.raises(ValueError, match=r"cls.predictions.bias.*further modules.*decoder.*others='drop'"):
        convert_adapter(source, tmp_path / "out", base=base)
    assert convert_adapter(source, tmp_path / "out", base=base, others="drop").dropped == ["cls.predictions.bias"]
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {
        f"base_model.model.lin.spiel_delta.{name}" for name in ("indices", "values")
    }
