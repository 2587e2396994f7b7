"""The pretrained base model of tier A: its files, its hash, and that it was trained long enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks_under_test import tiny_lm

ENGLISH = "In the beginning, God created the heavens and the earth. The earth was formless and empty."


def loss_of(model: torch.nn.Module, text: str) -> float:
    ids = torch.tensor([tiny_lm.tokenizer().encode(text).ids])
    return tiny_lm.loss_on(model, ids)


def test_the_committed_model_knows_english() -> None:
    model = tiny_lm.load()
    assert sum(p.numel() for p in model.parameters()) == 3_049_920
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.dtype == torch.float32 for p in model.parameters()) and not model.training
    untrained = type(model)(tiny_lm.config()).eval()
    assert loss_of(model, ENGLISH) < 3.0 < 7.0 < loss_of(untrained, ENGLISH)


def test_pretraining_went_on_until_it_gained_little() -> None:
    """The last tenth of the steps improved the held-out loss by less than 1%."""
    record = json.loads(tiny_lm.RECORD.read_text())
    losses = [entry["validation"] for entry in record["curve"]]
    assert [entry["step"] for entry in record["curve"]] == list(range(500, tiny_lm.STEPS + 1, 500))
    assert losses[-1] > 0.99 * losses[-2] and losses[-1] < 1.01 * min(losses)
    assert record["seed"] == tiny_lm.SEED and record["versions"]["torch"]


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = bytearray(tiny_lm.WEIGHTS.read_bytes())
    data[-1] ^= 1
    changed = tmp_path / "model.safetensors"
    changed.write_bytes(data)
    monkeypatch.setattr(tiny_lm, "WEIGHTS", changed)
    with pytest.raises(RuntimeError, match="is not the file that was pretrained .* take it from git"):
        tiny_lm.load()


def test_the_tokenizer_gives_text_back() -> None:
    coder = tiny_lm.tokenizer()
    for text in (ENGLISH, "EN el principio crió Dios los cielos y la tierra.", "日本 \t\n"):
        assert coder.decode(coder.encode(text).ids) == text
    assert coder.get_vocab_size() == tiny_lm.VOCABULARY and coder.token_to_id("<end>") == tiny_lm.END


def test_windows_cut_a_stream() -> None:
    rows = tiny_lm.windows(torch.arange(11), 4)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    stream = tiny_lm.stream(["a", "b"], tiny_lm.tokenizer())
    assert stream.tolist().count(tiny_lm.END) == 2 and stream[-1] == tiny_lm.END
