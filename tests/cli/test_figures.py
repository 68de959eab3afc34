from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2x.cli.figures import Figures, frontier, is_same_text, smaller_and_closer


def figures(size: int, kl_mean: float, name: str = "a", method: str = "rtn") -> Figures:
    return Figures(
        folder=Path(name),
        scheme="int4-g32",
        method=method,
        ran_on="onnx cpu",
        bits_per_weight=4.5,
        bytes=size,
        kl_mean=kl_mean,
        kl_p99=kl_mean,
        kl_max=kl_mean,
        top1_agreement=1.0,
        perplexity=1.0,
        perplexity_reference=1.0,
    )


def test_another_is_smaller_and_closer_if_it_is_better_in_one_and_no_worse_in_the_other() -> None:
    one = figures(100, 0.1)
    for size, kl_mean in ((90, 0.05), (100, 0.05), (90, 0.1)):
        other = figures(size, kl_mean)
        assert smaller_and_closer(one, [one, other]) is other
        assert smaller_and_closer(other, [one, other]) is None
    for size, kl_mean in ((110, 0.05), (90, 0.2), (100, 0.1)):
        assert smaller_and_closer(one, [one, figures(size, kl_mean)]) is None


def test_of_several_the_closest_is_named() -> None:
    one, near, nearest = figures(100, 0.1), figures(90, 0.05), figures(95, 0.01)
    assert smaller_and_closer(one, [one, near, nearest]) is nearest


def test_what_is_no_number_is_farther_than_anything() -> None:
    broken, good = figures(100, math.nan), figures(100, 5.0)
    assert smaller_and_closer(broken, [broken, good]) is good
    assert smaller_and_closer(good, [broken, good]) is None


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_the_frontier_falls_and_everything_else_has_something_better_on_it(
    pairs: list[tuple[int, int]],
) -> None:
    variants = [figures(size, kl_mean) for size, kl_mean in pairs]
    best = frontier(variants)
    assert best
    for left, right in pairwise(best):
        assert (left.bytes, left.kl_mean) == (right.bytes, right.kl_mean) or (
            left.bytes < right.bytes and left.kl_mean > right.kl_mean
        )
    for one in variants:
        assert one in best or smaller_and_closer(one, best) is not None


@pytest.mark.parametrize(
    ("method", "way"), [("gptq", "int4-g32 gptq"), ("none", "int4-g32"), ("unknown", "int4-g32")]
)
def test_a_method_that_says_nothing_is_left_out(method: str, way: str) -> None:
    assert figures(1, 1, method=method).way == way


def test_figures_are_comparable_on_the_same_tokens_in_the_same_windows() -> None:
    text = {"name": "a", "tokens": 10, "window": 5, "sha256": "1"}
    assert is_same_text(text, text | {"name": "b"})
    assert not is_same_text(text, text | {"window": 10})
    assert not is_same_text(text, text | {"sha256": "2"})
