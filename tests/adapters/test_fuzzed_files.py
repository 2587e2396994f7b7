"""Random corruption of an adapter file never brings a bad index, or half of a file, into a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import set_peft_model_state_dict
from support.adapters import adapted, assert_unchanged, deltas_of, read_adapter, snapshot
from torch import Tensor, nn

from .conftest import Saved

DTYPES = [torch.int32, torch.int64, torch.float32, torch.float16, torch.uint8, torch.bool]
EXTREMES = [-(2**31), -1, 0, 1, 79, 80, 255, 256, 383, 384, 2**31 - 1, 10**6]

casts = st.sampled_from(DTYPES).map(lambda dtype: lambda tensor: tensor.to(dtype))
cuts = st.integers(0, 90).map(lambda size: lambda tensor: tensor.flatten()[:size])
grown = st.integers(1, 9).map(lambda count: lambda tensor: torch.cat([tensor, tensor.new_ones(count)]))
flips = st.just(lambda tensor: tensor.flip(0))
shuffles = st.integers(0, 99).map(lambda seed: lambda tensor: tensor[_permutation(seed, len(tensor))])
reshapes = st.just(lambda tensor: tensor[None])
writes = st.tuples(st.integers(0, 79), st.sampled_from(EXTREMES)).map(
    lambda args: lambda tensor: tensor.index_fill(0, torch.tensor(args[0] % max(1, len(tensor))), args[1])
)
nans = st.integers(0, 79).map(
    lambda slot: lambda tensor: tensor.float().index_fill(0, torch.tensor(slot % max(1, len(tensor))), float("nan"))
)
corruptions = st.one_of(casts, cuts, grown, flips, shuffles, reshapes, writes, nans, st.none())


@pytest.fixture(scope="module")
def model(saved: Saved) -> nn.Module:
    """One model for all examples: every file loaded into it before must have left it sound."""
    return adapted(saved.load_base(), seed=9)


def _permutation(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def corrupted(
    tensors: dict[str, Tensor], edits: list[tuple[int, Callable[[Tensor], Tensor] | None]]
) -> dict[str, Tensor]:
    """The file after edits of the tensors with these numbers; None drops one. Impossible edits are left out."""
    out, keys = dict(tensors), sorted(tensors)
    for number, edit in edits:
        key = keys[number % len(keys)]
        if edit is None:
            out.pop(key, None)
        elif key in out:
            try:
                out[key] = edit(out[key].clone())
            except (IndexError, RuntimeError, OverflowError):
                continue
    return out


def assert_sound(model: nn.Module) -> None:
    for delta in deltas_of(model).values():
        positions, state = delta.indices.long(), delta.state
        assert delta.indices.dtype == torch.int32 and delta.values.shape == positions.shape == (delta.k,)
        assert 0 <= int(positions.min()) and int(positions.max()) < delta.numel
        assert bool((positions[1:] > positions[:-1]).all())
        assert bool(torch.isfinite(delta.values).all())
        if state.window is not None:
            candidates = state.window.positions.long()
            assert candidates.numel() == 0 or 0 <= int(candidates.min()) <= int(candidates.max()) < delta.numel
            assert state.window.sums.shape == state.window.squares.shape == candidates.shape


@settings(max_examples=250, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 99), corruptions), min_size=1, max_size=4), low_memory=st.booleans())
def test_loading_corrupted_files(model: nn.Module, saved: Saved, edits: list, low_memory: bool) -> None:
    tensors, before = corrupted(read_adapter(saved.adapter), edits), snapshot(model)
    try:
        set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=low_memory)
    except (ValueError, RuntimeError) as error:
        assert "refused" in str(error) or "size mismatch" in str(error)
        assert_unchanged(model, before)
    assert_sound(model)


@settings(max_examples=150, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 99), corruptions), min_size=1, max_size=4), assign=st.booleans())
def test_plain_load_state_dict_of_corrupted_tensors(model: nn.Module, saved: Saved, edits: list, assign: bool) -> None:
    tensors = corrupted(read_adapter(saved.adapter), edits)
    live = {key.replace(".spiel_delta.", ".spiel_delta.default."): tensor for key, tensor in tensors.items()}
    try:
        model.load_state_dict(live, strict=False, assign=assign)
    except RuntimeError as error:
        assert "spiel_delta.default" in str(error)
    assert_sound(model)
