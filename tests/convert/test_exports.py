"""SpIEL adapters as stock SHiRA adapters, sparse checkpoint patches and dense differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, ShiraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapters import FILE, PREFIX, adapted, layers_of
from support.models import logits, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spiel_peft.convert import export_dense_diff, export_shira, export_sparse_patch, read_sparse_patches, sparse_patches
from spiel_peft.convert.shira import pad_with_zeros
from spiel_peft.files.adapter_file import AdapterFile, StoredDelta, config_of_deltas, read_adapter
from spiel_peft.files.checkpoint import Checkpoint
from spiel_peft.files.tensors import StoredTensor

from .helpers import DOWN, Q

Exporter = Callable[..., Any]
EXPORTERS = [export_shira, export_sparse_patch, export_dense_diff]


def saved(folder: Path, base: nn.Module | None = None, **fields: Any) -> tuple[Path, Tensor]:
    """An adapter folder and the outputs of the model that it was saved from."""
    model = adapted(base, **fields)
    for name, parameter in model.named_parameters():
        if "modules_to_save.default" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(model)


@pytest.fixture()
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# SHiRA


def test_counts_that_are_no_multiple_are_filled_up_with_zeros(tmp_path: Path) -> None:
    adapter, expected = saved(tmp_path, num_deltas={Q: 33, DOWN: 7})
    result = export_shira(adapter, tmp_path / "shira", tiny_llama())
    assert result.notes == [
        f"{2 * 32 - 33 + 2 * 40 - 7} entries of value zero were added, to have r * (in + out) of them with r=2"
    ]
    config = ShiraConfig.from_pretrained(tmp_path / "shira")
    assert config.r == 2 and config.target_modules == {Q, DOWN}
    with torch.no_grad():
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "shira")), expected)
    export_shira(adapter, tmp_path / "larger", tiny_llama(), r=3)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "larger")), expected)


def test_padding_keeps_the_entries_and_takes_free_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    for k, wanted in ((1, 1), (3, 8), (5, 12), (12, 12)):
        indices = torch.randperm(12, generator=generator)[:k].sort().values.int()
        delta = StoredDelta(indices, torch.arange(1.0, k + 1))
        full = pad_with_zeros(delta, wanted, 12)
        assert full.k == wanted and full.indices.dtype == torch.int32
        assert torch.equal(full.indices, full.indices.unique()) and int(full.indices.max()) < 12
        dense = torch.zeros(12)
        dense[full.indices.long()] = full.values
        assert torch.equal(dense[indices.long()], delta.values) and int((dense != 0).sum()) == k


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"num_deltas": {Q: 256, DOWN: 7}},
            {},
            rf"r=8, which module '{Q}' needs, makes 160 entries in module '{DOWN}'",
        ),
        ({"r": 2}, {"r": 1}, "r=1 is too small: module .* for which SHiRA needs r=2"),
        ({"target_modules": ["embed_tokens"]}, {}, "'model.embed_tokens' is a layer of kind 'embedding'"),
        ({"trainable_token_indices": [1, 2]}, {}, "no trained biases or tokens"),
    ],
)
def test_what_shira_cannot_express_is_refused(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    adapter, _ = saved(tmp_path, tiny_llama(intermediate_size=4), **fields)
    with pytest.raises(ValueError, match=message):
        export_shira(adapter, tmp_path / "shira", tiny_llama(intermediate_size=4), **options)
    assert not (tmp_path / "shira").exists()


def test_positions_outside_of_the_base_make_no_shira_adapter(tmp_path: Path) -> None:
    deltas = {"lin": StoredDelta(torch.tensor([3, 256], dtype=torch.int32), torch.ones(2))}
    adapter = AdapterFile(config_of_deltas(deltas), deltas)
    with pytest.raises(ValueError, match=r"'lin' has positions up to 256, but a weight of shape \(16, 16\)"):
        export_shira(adapter, tmp_path / "shira", {"lin.weight": (16, 16)})


# Sparse patches


def apply_patches(folder: Path, base: Path, dtype: torch.dtype) -> nn.Module:
    """Put the values where the patches say, in tensors as the checkpoint stores them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    weights = load_file(base / "model.safetensors")
    for patch in read_sparse_patches(folder):
        tensor = weights[patch.name]
        assert patch.indices.dtype == torch.int32 and patch.values.dtype == tensor.dtype
        assert patch.indices.dim() == patch.values.dim() == 1
        assert patch.indices.is_contiguous() and patch.values.is_contiguous()
        assert patch.full_shape == tuple(tensor.shape)
        tensor.view(-1)[patch.indices.long()] = patch.values
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_patched_checkpoint_computes_what_the_adapter_does(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tmp_path / "base"
    tiny_llama(dtype=dtype).save_pretrained(base)
    # With a base in lower precision, PEFT keeps a module saved in full as float32; a checkpoint cannot.
    others = ["model.norm"] if dtype == torch.float32 else []
    loaded_base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapter, expected = saved(tmp_path, loaded_base, r=2, modules_to_save=others)
    result = export_sparse_patch(adapter, tmp_path / "patch", base)
    assert result.modules == sorted(f"{name}.weight" for name in [*read_adapter(adapter).deltas, *others])
    assert torch.equal(logits(apply_patches(tmp_path / "patch", base, dtype)), expected)
    # Patches that are sent without a file.
    patches = list(sparse_patches(adapter, base))
    for sent, stored in zip(patches, read_sparse_patches(tmp_path / "patch"), strict=True):
        assert sent.name == stored.name and torch.equal(sent.values, stored.values)
        assert set(vars(sent)) == {"name", "indices", "values", "full_shape"}
    with safe_open(tmp_path / "patch" / "sparse_patch.safetensors", "pt") as file:
        assert "full_shapes" in file.metadata()


def test_biases_and_trained_tokens_are_in_the_patch(tmp_path: Path, base: Path) -> None:
    adapter, expected = saved(tmp_path, trainable_token_indices=[5, 9])
    tensors = load_file(adapter / FILE)
    key = next(key for key in tensors if "trainable_tokens_delta" in key)
    save_file({**tensors, key: tensors[key] + 1}, adapter / FILE)
    expected = logits(PeftModel.from_pretrained(tiny_llama(), adapter))
    export_sparse_patch(adapter, tmp_path / "patch", base)
    patches = {patch.name: patch for patch in read_sparse_patches(tmp_path / "patch")}
    rows = patches["model.embed_tokens.weight"].indices // 16
    assert set(rows.tolist()) == {5, 9}
    assert torch.equal(logits(apply_patches(tmp_path / "patch", base, torch.float32)), expected)


class Huge(StoredTensor):
    """A weight of 2**31 + 8 zeros that takes no memory."""

    def __init__(self) -> None:
        super().__init__((2**28 + 1, 8), torch.bfloat16, "huge")

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.zeros(1, dtype=torch.bfloat16).expand(self.numel)


def test_positions_that_int32_cannot_hold_are_refused() -> None:
    base = Checkpoint("huge", {"big.weight": Huge()})
    base.use_names(None)

    def patches(last: int) -> list[Any]:
        deltas = {"big": StoredDelta(torch.tensor([3, last]), torch.ones(2))}
        return list(sparse_patches(AdapterFile(config_of_deltas(deltas), deltas), base))

    assert patches(2**31 - 1)[0].indices.tolist() == [3, 2**31 - 1]
    with pytest.raises(ValueError, match=r"'big.weight' has 2147483656 entries; positions of 2\*\*31 and more"):
        patches(2**31)


def test_values_that_overflow_the_dtype_are_refused(tmp_path: Path) -> None:
    tiny_llama(dtype=torch.float16).save_pretrained(tmp_path / "base")
    deltas = {Q: StoredDelta(torch.tensor([0], dtype=torch.int32), torch.tensor([1e6]))}
    with pytest.raises(ValueError, match=f"{Q}.weight' gets values that are not finite in torch.float16"):
        list(sparse_patches(AdapterFile(config_of_deltas(deltas), deltas), tmp_path / "base"))


def test_damaged_patches_are_named(tmp_path: Path, base: Path) -> None:
    adapter, _ = saved(tmp_path)
    export_sparse_patch(adapter, tmp_path / "patch", base)
    file = tmp_path / "patch" / "sparse_patch.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="sparse_patch.safetensors cannot be read"):
        list(read_sparse_patches(tmp_path / "patch"))
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="sparse_patch.safetensors cannot be read as a sparse patch"):
        list(read_sparse_patches(file))
    with pytest.raises(FileNotFoundError, match="sparse_patch.safetensors is missing"):
        list(read_sparse_patches(base))


# Dense differences


@pytest.mark.parametrize("shard", [10**9, 2000])
def test_the_base_plus_the_dense_difference_computes_the_same(tmp_path: Path, base: Path, shard: int) -> None:
    adapter, expected = saved(tmp_path, r=2)
    result = export_dense_diff(adapter, tmp_path / "diff", base, max_shard_bytes=shard)
    files = sorted((tmp_path / "diff").glob("*.safetensors"))
    assert len(files) == (1 if shard > 2000 else 4)
    assert (tmp_path / "diff" / "diff.safetensors.index.json").exists() == (len(files) > 1)
    model, seen = tiny_llama(), 0
    with torch.no_grad():
        for file in files:
            for name, diff in load_file(file).items():
                model.get_parameter(name).add_(diff)
                seen += int((diff != 0).sum())
    assert seen == result.num_deltas == sum(delta.k for delta in read_adapter(adapter).deltas.values())
    assert torch.equal(logits(model), expected)


# All exports


@pytest.mark.parametrize("export", EXPORTERS)
def test_a_base_that_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path, base: Path, export: Exporter) -> None:
    adapter, _ = saved(tmp_path, num_deltas={Q: 256})
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=rf"adapter: .*{Q}"):
        export(adapter, out, tiny_llama(hidden_size=8))
    with pytest.raises(ValueError, match=rf"adapter: the base .* has no tensor '{Q}.weight'"):
        export(adapter, out, {"another.weight": (4, 4)})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export(adapter, out, tmp_path / "nowhere")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        export(adapter, out, base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("export", EXPORTERS)
def test_a_full_disk_leaves_the_target_as_it_was(
    tmp_path: Path, base: Path, export: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = saved(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    with pytest.raises(FileExistsError, match="out exists already"):
        export(adapter, tmp_path / "out", base)

    def full_disk(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"{export.__module__}.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(adapter, tmp_path / "out", base, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    monkeypatch.undo()
    export(adapter, tmp_path / "out", base, overwrite=True)
    assert not (tmp_path / "out" / "old").exists()


@pytest.mark.parametrize("export", [export_sparse_patch, export_dense_diff])
def test_a_weight_tied_to_one_that_is_not_adapted_is_refused(tmp_path: Path, export: Exporter) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path / "base")
    tied = {"num_deltas": {"model.embed_tokens": 9}}
    adapter, _ = saved(tmp_path / "alone", tiny_llama(), **tied)
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' shares its place .*'lm_head.weight'"):
        export(adapter, tmp_path / "out", tmp_path / "base")
    both = {"target_modules": ["embed_tokens"], "density": 0.1, "ensure_weight_tying": True}
    adapter, expected = saved(tmp_path / "both", tiny_llama(tied=True), **both)
    result = export(adapter, tmp_path / "out", tmp_path / "base")
    assert result.modules == ["model.embed_tokens.weight"]
    if export is export_sparse_patch:
        assert torch.equal(logits(apply_patches(tmp_path / "out", tmp_path / "base", torch.float32)), expected)


def test_exports_are_what_merging_gives(tmp_path: Path, base: Path) -> None:
    model = adapted(r=2)
    model.save_pretrained(tmp_path / "adapter")
    modules = {layer.module_name for layer in layers_of(model)}
    merged = model.merge_and_unload().state_dict()
    for patch in sparse_patches(tmp_path / "adapter", base):
        assert patch.name.removesuffix(".weight") in modules
        assert torch.equal(merged[patch.name].flatten()[patch.indices.long()], patch.values)
    assert PREFIX not in patch.name
