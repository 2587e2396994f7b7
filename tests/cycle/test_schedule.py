"""When cycles close, when windows are open, which closes are skipped, and the rates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiel_peft.cycle.close import closes_at, in_window, is_skipped, lr_following_rate, next_close, regrow_rate

CYCLES = st.tuples(st.integers(1, 30), st.integers(1, 30))


@given(CYCLES)
def test_closes_at_g_then_every_s_steps(cycle: tuple[int, int]) -> None:
    every, offset = cycle
    closes = [step for step in range(1, 200) if closes_at(step, every, offset)]
    assert closes == list(range(offset, 200, every))


@given(CYCLES, st.integers(0, 150))
def test_next_close_is_the_first_one_that_comes(cycle: tuple[int, int], done: int) -> None:
    every, offset = cycle
    assert next_close(done, every, offset) == next(s for s in range(done + 1, 400) if closes_at(s, every, offset))


@given(CYCLES, st.integers(0, 150))
def test_a_window_is_the_last_g_steps_before_a_close(cycle: tuple[int, int], done: int) -> None:
    every, steps = max(cycle), min(cycle)
    coming = range(done + 1, done + 1 + steps)
    assert in_window(done, every, steps) == any(closes_at(step, every, steps) for step in coming)


@pytest.mark.parametrize(("every", "steps"), [(4, 2), (3, 3), (1, 1)])
def test_windows_do_not_overlap(every: int, steps: int) -> None:
    """Between two closes exactly g steps gather."""
    for cycle in range(5):
        begin, end = steps + cycle * every, steps + (cycle + 1) * every
        assert sum(in_window(done, every, steps) for done in range(begin, end)) == steps


@pytest.mark.parametrize(
    ("step", "total", "stop", "skipped"),
    [
        (50, 100, 0.5, False),
        (51, 100, 0.5, True),
        (100, 100, 1.0, False),
        (101, 100, 1.0, True),
        (1, 100, 0.0, True),
        (10_000, None, 1.0, False),
        # 0.29 * 100 is 28.999999999999996
        (29, 100, 0.29, False),
        (30, 100, 0.29, True),
    ],
)
def test_closes_after_the_given_fraction_are_skipped(step: int, total: int | None, stop: float, skipped: bool) -> None:
    assert is_skipped(step, total, stop) is skipped


@pytest.mark.parametrize("initial", [0.0, 0.2, 1.0])
def test_linear_rate(initial: float) -> None:
    rates = [regrow_rate("linear", initial, step, 100) for step in (0, 25, 100, 130)]
    assert rates == pytest.approx([initial, 0.75 * initial, 0.0, 0.0])


@pytest.mark.parametrize("initial", [0.0, 0.2, 1.0])
def test_cosine_rate(initial: float) -> None:
    rates = [regrow_rate("cosine", initial, step, 100) for step in (0, 25, 50, 100, 130)]
    quarter = (1 + math.sqrt(0.5)) / 2
    assert rates == pytest.approx([initial, quarter * initial, initial / 2, 0.0, 0.0])


def test_constant_rate() -> None:
    assert {regrow_rate("constant", 0.3, step, 100) for step in (1, 50, 100, 130)} == {0.3}


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 200), st.floats(0, 1))
def test_rates_fall_and_stay_between_zero_and_the_initial_one(schedule: str, total: int, initial: float) -> None:
    rates = [regrow_rate(schedule, initial, step, total) for step in range(0, total + 5)]
    assert all(0 <= later <= earlier <= initial for earlier, later in zip(rates, rates[1:], strict=False))


def test_without_a_length_the_rate_follows_the_learning_rate() -> None:
    assert lr_following_rate(0.2, 0.5, 1.0) == pytest.approx(0.1)
    assert lr_following_rate(0.2, 1.0, 1.0) == 0.2
    assert lr_following_rate(0.2, 0.0, 0.0) == 0.2
