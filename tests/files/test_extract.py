"""Adapters extracted from two checkpoints hold the largest changes, and all of them at density 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from support.adapters import deltas_of, snapshot, train
from support.checkpoints import SHARD, PeakMemory, changed, loaded, saved
from support.models import IDS, logits, tiny_gpt2, tiny_llama
from support.tensors import same_bits
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from spiel_peft import extract_delta
from spiel_peft.files import tensors as tensor_files
from spiel_peft.files.adapter_file import write_adapter


def differences(base: nn.Module, finetuned: nn.Module, leaf: str = ".weight") -> dict[str, Tensor]:
    after = dict(finetuned.named_parameters())
    return {
        name.removesuffix(leaf): (after[name].float() - parameter.float()).flatten().detach()
        for name, parameter in base.named_parameters()
        if parameter.dim() > 1
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_density_one_gives_the_finetuned_model(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    base = saved(tiny_llama(tied=tied, dtype=dtype), tmp_path / "base", SHARD)
    tuned = saved(changed(tiny_llama(tied=tied, dtype=dtype)), tmp_path / "tuned")
    found = extract_delta(base, tuned, tmp_path / "out", density=1.0, norms_and_biases=True)
    assert found.kept == 1 and found.left_out == {} and found.folder == tmp_path / "out"
    model = PeftModel.from_pretrained(loaded(base), tmp_path / "out")
    assert torch.equal(logits(model), logits(loaded(tuned)))
    merged, expected = model.merge_and_unload().state_dict(), loaded(tuned).state_dict()
    if dtype == torch.bfloat16:
        assert all(same_bits(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("pieces", [1 << 24, 64], ids=["whole", "small-pieces"])
def test_each_weight_keeps_its_largest_changes(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    monkeypatch.setattr("spiel_peft.files.differences._ENTRIES", pieces)
    base, tuned = tiny_llama(), changed(tiny_llama())
    found = extract_delta(base, tuned, density=0.05)
    changes = differences(base, tuned)
    assert found.counts.keys() == found.adapter.deltas.keys() == changes.keys()
    squares = 0.0
    for module, change in changes.items():
        delta = found.adapter.deltas[module]
        k = max(1, int(0.05 * change.numel() + 0.5))
        assert torch.equal(delta.indices.long(), change.abs().topk(k).indices.sort().values)
        assert same_bits(delta.values, change[delta.indices.long()]) and delta.indices.dtype == torch.int32
        squares += float(delta.values.double().square().sum())
    whole = sum(float(change.double().square().sum()) for change in changes.values())
    assert found.kept == pytest.approx(squares / whole)


def test_a_global_budget_goes_where_changes_are_largest() -> None:
    base, tuned = tiny_llama(), changed(tiny_llama())
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.add_(0.1)
    found = extract_delta(base, tuned, num_deltas=300, scope="global")
    changes = differences(base, tuned)
    flat = torch.cat(list(changes.values())).abs()
    bound = flat.topk(300).values.min()
    assert found.counts == {
        name: int((c.abs() >= bound).sum()) for name, c in changes.items() if (c.abs() >= bound).any()
    }
    assert sum(found.counts.values()) == 300 and max(found.counts, key=found.counts.get) == "model.layers.1.mlp.up_proj"


def test_budgets_are_those_of_the_config() -> None:
    base, tuned = tiny_llama(), changed(tiny_llama())
    total = extract_delta(base, tuned, num_deltas=101)
    assert sum(total.counts.values()) == 101
    rank = extract_delta(base, tuned, r=2, target_modules=["q_proj", "down_proj"])
    assert rank.counts["model.layers.0.mlp.down_proj"] == 2 * (16 + 24) and len(rank.counts) == 4
    listed = extract_delta(base, tuned, num_deltas={"lm_head": 7, "model.embed_tokens": 3})
    assert listed.counts == {"lm_head": 7, "model.embed_tokens": 3}


def test_sources_of_every_kind_give_the_same(tmp_path: Path) -> None:
    base, tuned = tiny_llama(), changed(tiny_llama())
    folder = saved(base, tmp_path / "base", SHARD)
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    torch.save(tuned.state_dict(), tmp_path / "tuned.bin")
    expected = extract_delta(base, tuned, density=0.1)
    for before in (folder, base, base.state_dict()):
        for after in (tmp_path / "tuned.safetensors", str(tmp_path / "tuned.bin"), tuned.state_dict()):
            found = extract_delta(before, after, density=0.1)
            assert found.counts == expected.counts
            for module, delta in expected.adapter.deltas.items():
                assert torch.equal(found.adapter.deltas[module].indices, delta.indices)
    written = extract_delta(folder, tmp_path / "tuned.bin", tmp_path / "out", density=0.1)
    write_adapter(expected.adapter, tmp_path / "memory")
    models = [PeftModel.from_pretrained(loaded(folder), tmp_path / name) for name in ("out", "memory")]
    assert written.adapter is None and same_bits(logits(models[0]), logits(models[1]))


class HeadFirst(nn.Module):
    """Names the output layer before the embedding that it is tied to."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 9, bias=False)
        self.table = nn.Embedding(9, 4)
        self.table.weight = self.head.weight


def test_tied_weights_of_any_model_count_once() -> None:
    base, tuned = HeadFirst(), HeadFirst()
    found = extract_delta(base, tuned, density=0.5)
    assert found.counts == {"head": 18} and set(found.adapter.deltas) == {"head", "table"}
    tuned.table.weight = nn.Parameter(tuned.table.weight.detach() + 1)
    assert extract_delta(base, tuned, density=0.5).counts == {"head": 18, "table": 18}


def test_a_tied_adapter_in_memory_can_be_written(tmp_path: Path) -> None:
    base, tuned = tiny_llama(tied=True), changed(tiny_llama(tied=True))
    found = extract_delta(base, tuned, density=1.0, norms_and_biases=True)
    assert set(found.adapter.deltas) - set(found.counts) == {"lm_head"}
    write_adapter(found.adapter, tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path / "out")
    assert torch.equal(logits(model), logits(tuned))


def test_names_with_and_without_a_head_s_prefix_are_the_same_model(tmp_path: Path) -> None:
    base = saved(tiny_llama().model, tmp_path / "base")
    tuned = saved(changed(tiny_llama()), tmp_path / "tuned")
    found = extract_delta(tuned, base, density=0.1, target_modules=["q_proj"])
    assert set(found.counts) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}


def test_mixed_dtypes_are_compared_exactly() -> None:
    base, tuned = tiny_llama(dtype=torch.bfloat16), tiny_llama().float()
    found = extract_delta(base, tuned, density=1.0, target_modules=["q_proj"])
    for module, delta in found.adapter.deltas.items():
        before, after = (m.get_submodule(module).weight.detach().flatten() for m in (base, tuned))
        positions = delta.indices.long()
        assert same_bits(before.float()[positions] + delta.values, after[positions])


def test_targets_are_selected_as_in_the_config() -> None:
    base, tuned = tiny_llama(), changed(tiny_llama())
    linear = extract_delta(base, tuned, density=0.1, target_modules="all-linear", exclude_modules=["down_proj"])
    assert not any(name.endswith(("down_proj", "lm_head", "embed_tokens")) for name in linear.counts)
    assert len(linear.counts) == 12
    pattern = extract_delta(base, tuned, density=0.1, target_modules=r".*layers\.1\.mlp\..*")
    assert {name.rpartition(".")[0] for name in pattern.counts} == {"model.layers.1.mlp"}
    with pytest.raises(ValueError, match="target_modules: 'input_layernorm' matches nothing that can be adapted"):
        extract_delta(base, tuned, density=0.1, target_modules=["input_layernorm"])
    with pytest.raises(ValueError, match="'absent'.*no module has that name"):
        extract_delta(base, tuned, density=0.1, target_modules=["absent"])
    with pytest.raises(ValueError, match="leave no weight"):
        extract_delta(base, tuned, density=0.1, target_modules=["q_proj"], exclude_modules=["q_proj"])


def test_a_head_untied_by_fine_tuning_gets_deltas_of_its_own(tmp_path: Path) -> None:
    base = saved(tiny_llama(tied=True), tmp_path / "base")
    model = tiny_llama(tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    tuned = saved(changed(model), tmp_path / "tuned")
    extract_delta(base, tuned, tmp_path / "out", density=1.0, norms_and_biases=True)
    model = PeftModel.from_pretrained(loaded(base), tmp_path / "out")
    assert torch.equal(logits(model), logits(loaded(tuned)))


def bert() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=40, max_position_embeddings=16, **shape)).eval()


@pytest.mark.parametrize("make", [bert, tiny_gpt2])
def test_biases_norms_and_transposed_layers_come_along(tmp_path: Path, make: object) -> None:
    base, tuned = make(), changed(make(), 0.1)
    found = extract_delta(base, tuned, tmp_path / "out", density=1.0, norms_and_biases=True)
    assert found.left_out == {}
    model = PeftModel.from_pretrained(make(), tmp_path / "out")
    assert torch.allclose(logits(model), logits(tuned), atol=1e-6)
    bare = extract_delta(base, tuned, density=1.0)
    assert bare.left_out and all("norms_and_biases=True" in reason for reason in bare.left_out.values())


def test_rewound_tickets_start_as_the_base_and_train(tmp_path: Path) -> None:
    """Lottery-ticket sparse fine-tuning: train all, keep the positions that moved most, train those alone."""
    base = saved(tiny_llama(), tmp_path / "base")
    dense = loaded(base)
    train(dense, 5, lr=0.01)
    saved(dense, tmp_path / "dense")
    extract_delta(base, tmp_path / "dense", tmp_path / "ticket", density=0.05, rewind=True, norms_and_biases=True)
    model = PeftModel.from_pretrained(loaded(base), tmp_path / "ticket", is_trainable=True)
    kept = extract_delta(base, tmp_path / "dense", density=0.05).adapter.deltas
    assert model.peft_config["default"].growth == "none"
    assert same_bits(logits(model), logits(loaded(base)))
    before = snapshot(model)
    with torch.no_grad():
        start = float(model(IDS, labels=IDS).loss)
    train(model, 25, lr=0.02)
    with torch.no_grad():
        assert float(model(IDS, labels=IDS).loss) < 0.7 * start
    for module, delta in deltas_of(model).items():
        assert torch.equal(delta.indices, kept[module].indices) and bool((delta.values != 0).any())
    moved = {name for name, tensor in model.state_dict().items() if not same_bits(before[name], tensor)}
    assert moved and not any("base_layer" in name or name.endswith("indices") for name in moved)
    model.save_pretrained(tmp_path / "task")
    again = PeftModel.from_pretrained(loaded(base), tmp_path / "task")
    assert same_bits(logits(again), logits(model.eval()))


def test_progress_is_told_to_the_end() -> None:
    base, tuned = tiny_llama(), changed(tiny_llama())
    for scope in ("module", "global"):
        for density in (0.1, 1.0):
            seen: list[tuple[int, int, str]] = []
            extract_delta(base, tuned, density=density, scope=scope, progress=lambda *e, to=seen: to.append(e))
            done = [event[0] for event in seen]
            assert done == sorted(done) and seen[-1][0] == seen[-1][1]
            assert {event[2] for event in seen} >= {"lm_head", "model.layers.0.mlp.up_proj"}


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Half of 96 MiB of weights becomes an adapter of the same size, with less memory than one of the three tensors."""
    for name, seed in (("base", 0), ("tuned", 1)):
        generator = torch.Generator().manual_seed(seed)
        save_file(
            {f"{layer}.weight": torch.randn(2048, 4096, generator=generator) for layer in "abc"},
            tmp_path / f"{name}.safetensors",
        )
    piece = tensor_files.PIECE_BYTES // 16
    with pytest.MonkeyPatch.context() as patch, PeakMemory() as memory:
        patch.setattr("spiel_peft.files.differences._ENTRIES", piece // 4)
        patch.setattr("spiel_peft.files.extract.PIECE_BYTES", piece)
        found = extract_delta(
            tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out", density=0.5
        )
    assert sum(found.counts.values()) == 3 * 2048 * 2048
    assert memory.growth < 2048 * 4096 * 4
