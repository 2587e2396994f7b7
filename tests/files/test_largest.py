"""The exact k largest of numbers that come in pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiel_peft.files.extract import find_cut


def chosen(values: Tensor, sizes: list[int], k: int | None) -> list[int]:
    pieces = values.split(sizes)
    cut = find_cut(lambda: pieces, k)
    found, start = [], 0
    for piece in pieces:
        found += (cut.choose(piece) + start).tolist()
        start += piece.numel()
    return found


def expected(values: Tensor, k: int | None) -> list[int]:
    """The same by sorting: largest first, ties go to the earliest, zeros are never chosen."""
    ranked = sorted(range(values.numel()), key=lambda i: (-float(values[i]), i))
    return sorted(i for i in ranked[:k] if values[i] > 0)


NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0000001, 0.5, 1e-30, 1e-45, 3e38]), st.floats(0, 1000, width=32, allow_nan=False)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=40), st.integers(1, 45), st.integers(1, 7))
def test_it_is_what_sorting_gives(numbers: list[float], k: int, size: int) -> None:
    values = torch.tensor(numbers)
    sizes = [size] * (values.numel() // size) + ([values.numel() % size] if values.numel() % size else [])
    assert chosen(values, sizes, k) == expected(values, k)
    assert chosen(values, sizes, None) == expected(values, None)


@pytest.mark.parametrize("k", [1, 100, 9_999, 20_000])
def test_many_equal_numbers(k: int) -> None:
    values = torch.randint(0, 5, (20_000,)).float()
    assert chosen(values, [6_000, 6_000, 8_000], k) == expected(values, k)
