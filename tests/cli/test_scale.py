from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2x.cli.scale import Scale, log_scale

POSITIVE = st.floats(min_value=1e-14, max_value=1e6)


def test_a_linear_scale_reaches_from_end_to_end() -> None:
    scale = Scale(low=10, high=20, start=100, end=0)
    assert [scale.at(value) for value in (10, 15, 20)] == [100, 50, 0]
    assert [scale.at(value) for value in (-5, 99, math.nan, math.inf)] == [100, 0, 0, 0]


def test_a_logarithmic_scale_gives_decades_equal_lengths() -> None:
    scale = log_scale([0.02, 5], 0, 300)
    assert (scale.low, scale.high) == (0.01, 10)
    assert [scale.at(value) for value in (0.01, 0.1, 1, 10)] == [0, 100, 200, 300]
    assert [scale.at(value) for value in (0, 1e-9, math.nan, math.inf)] == [0, 0, 300, 300]


def test_ticks_are_round_numbers_at_their_places() -> None:
    assert Scale(low=0, high=1024, start=0, end=1024).ticks() == [
        (value, f"{value:g}") for value in (0, 200, 400, 600, 800, 1000)
    ]
    assert [label for _, label in log_scale([1e-6, 1], 0, 1).ticks()] == [
        "1e-6", "1e-5", "0.0001", "0.001", "0.01", "0.1", "1"
    ]  # fmt: skip
    narrow = [label for _, label in log_scale([0.02, 0.03], 0, 1).ticks()]
    assert narrow == ["0.01", "0.02", "0.05", "0.1"]


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_values_lie_within_their_scale_and_ticks_are_few(values: list[float]) -> None:
    scale = log_scale(values, 0, 100)
    assert scale.low <= min(values) * (1 + 1e-9)
    assert scale.high >= max(values) * (1 - 1e-9)
    assert 2 <= len(scale.ticks()) <= 8


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [math.nan, math.inf]])
def test_values_that_have_no_logarithm_leave_a_scale(values: list[float]) -> None:
    scale = log_scale(values, 0, 100)
    assert 0 < scale.low < scale.high < math.inf
    assert scale.ticks()


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_and_inside(low: float, length: float) -> None:
    ticks = Scale(low=low, high=low + length, start=0, end=100).ticks()
    assert 1 <= len(ticks) <= 8
    assert all(0 <= at <= 100 for at, _ in ticks)
