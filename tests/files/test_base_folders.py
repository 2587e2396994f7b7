"""Base folders that would lose tensors, bring in foreign files, or fill the memory when a merged model is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import SHARD, saved, trained_adapter
from support.models import tiny_llama

from spiel_peft import merge_adapter_into_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter for it."""
    root = tmp_path_factory.mktemp("folders")
    base = saved(tiny_llama(), root / "base")
    return base, trained_adapter(base, root / "adapter")


def sharded(base: Path, folder: Path, first: str, second: str) -> Path:
    """The base with its tensors in two files of these names."""
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    weight_map = {}
    for file, keys in ((first, names[:5]), (second, names[5:])):
        part = {key: tensors[key] for key in keys}
        torch.save(part, folder / file) if file.endswith(".bin") else save_file(part, folder / file)
        weight_map.update(dict.fromkeys(keys, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x.bin", "x.safetensors"),
        ("pytorch_model-1.bin", "model-1.safetensors"),
        ("X.safetensors", "x.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
    ],
)
def test_shards_that_would_become_one_file(folders, tmp_path: Path, first: str, second: str) -> None:
    base = sharded(folders[0], tmp_path / "base", first, second)
    with pytest.raises(ValueError, match=f"{INDEX} names the shards '({first}|{second})' and .* both be written to"):
        merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_two_kinds_are_merged_whole(folders, tmp_path: Path) -> None:
    base = sharded(folders[0], tmp_path / "base", "a.bin", "b.safetensors")
    merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out")
    found = [key for file in (tmp_path / "out").glob("*.safetensors") for key in load_file(file)]
    assert sorted(found) == sorted(load_file(folders[0] / "model.safetensors"))


def test_shards_that_disagree_about_a_tensor(folders, tmp_path: Path) -> None:
    base = sharded(folders[0], tmp_path / "base", "a.safetensors", "b.safetensors")
    tensors, other = load_file(base / "b.safetensors"), load_file(base / "a.safetensors")
    key = min(other)
    save_file({**tensors, key: other[key]}, base / "b.safetensors")
    merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out")  # twice the same is no contradiction
    save_file({**tensors, key: other[key] + 1}, base / "b.safetensors")
    with pytest.raises(ValueError, match=f"hold different tensors '{key}'"):
        merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out2")


@pytest.mark.parametrize("value", [3, None, ["a"], "../model.safetensors"])
def test_an_index_that_names_no_file_of_its_folder(folders, tmp_path: Path, value: object) -> None:
    base = sharded(folders[0], tmp_path / "base", "a.safetensors", "b.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
    with pytest.raises(ValueError, match=f"{INDEX}: tensor 'model.norm.weight' is in .*not a file of this folder"):
        merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out")


# --- links ---


def test_links_out_of_the_base_are_refused(folders, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    base = saved(tiny_llama(), tmp_path / "base", SHARD)
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="base/tokenizer.json is a link to .*secret, outside of .*base: put a copy"):
        merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (base / "tokenizer.json").unlink()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/a.jinja").symlink_to("../../secret")
    with pytest.raises(ValueError, match="a.jinja is a link to .*secret"):
        merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_links_out_of_the_base_are_refused(folders, tmp_path: Path) -> None:
    base, adapter = shutil.copytree(folders[0], tmp_path / "base"), folders[1]
    weights = next(base.glob("*.safetensors"))
    weights.rename(tmp_path / "others.safetensors")
    weights.symlink_to(tmp_path / "others.safetensors")
    with pytest.raises(ValueError, match="is a link to .*others.safetensors, outside of"):
        merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": 5}, "architectures must be a list of names, got 5"),
        ({"architectures": [["a"]]}, "architectures must be a list of names"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000"),
    ],
)
def test_base_configs_of_absurd_values(folders, tmp_path: Path, fields: dict[str, object], message: str) -> None:
    base, adapter = shutil.copytree(folders[0], tmp_path / "base"), folders[1]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        merge_adapter_into_checkpoint(base, adapter, tmp_path / "out")


def test_links_within_the_base_and_within_a_cache_are_copied(folders, tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    (base / "kept.txt").write_text("text")
    (base / "link.txt").symlink_to("kept.txt")
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots/main").mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (repository / "snapshots/main" / file.name).symlink_to(f"../../blobs/{number}")
    for number, source in enumerate((base, repository / "snapshots/main")):
        out = tmp_path / f"out{number}"
        merge_adapter_into_checkpoint(source, folders[1], out)
        assert (out / "link.txt").read_text() == "text" and not (out / "link.txt").is_symlink()
    (repository / "snapshots/main/more.txt").symlink_to("../../../base/kept.txt")  # another folder than its own blobs
    with pytest.raises(ValueError, match="more.txt is a link"):
        merge_adapter_into_checkpoint(repository / "snapshots/main", folders[1], tmp_path / "out2")


# --- files larger than themselves ---


def test_expanded_tensors_of_a_base(folders, tmp_path: Path) -> None:
    tensors = load_file(folders[0] / "model.safetensors")
    tensors["model.extra"] = torch.ones(1).expand(2**40)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
    torch.save(tensors, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model.bin: tensor 'model.extra' has {2**40} entries"):
        merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out")


def test_a_config_that_is_nested_too_deep(folders, tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    (base / "config.json").write_text('{"a": ' + "[" * 200_000)
    with pytest.raises(ValueError, match="config.json cannot be read: .*nested too deep"):
        merge_adapter_into_checkpoint(base, folders[1], tmp_path / "out")
