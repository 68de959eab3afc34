from __future__ import annotations

from dataclasses import fields
from itertools import pairwise, product

import pytest

from qwen2x.exporters.mlx_folder import BITS, GROUP_SIZES
from qwen2x.runtimes.tolerance import Tolerance, tolerance_between, tolerance_for

FLOATS = ("float32", "float16", "bfloat16")
QUANTIZED = [f"int{bits}-g{group_size}" for bits, group_size in product(BITS, GROUP_SIZES)]
SIDES = [
    *(("float", dtype) for dtype in FLOATS),
    *((scheme, dtype) for scheme in QUANTIZED for dtype in ("float32", "bfloat16")),
]


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_scheme_that_a_folder_may_have_has_limits(scheme: str, dtype: str) -> None:
    limits = tolerance_for(scheme, dtype)
    assert 0 < limits.kl_mean <= 3
    assert 0 < limits.top1_agreement < 1
    assert 0 < limits.layer_error <= 1
    assert limits.max_abs_diff is None
    assert limits.greedy_against == "bundle"


@pytest.mark.parametrize("suffix", ["-zp", "-mixed", "-zp-mixed"])
def test_zero_points_and_mixtures_have_the_limits_of_their_bits(suffix: str) -> None:
    """They had those of floats, which no quantized bundle keeps."""
    for scheme in ("int4-g32", "int4-g128", "int8-g32"):
        assert tolerance_for(scheme + suffix, "float32") == tolerance_for(scheme, "float32")


def test_float32_alone_is_held_to_transformers_text_and_to_a_largest_difference() -> None:
    exact = tolerance_for("float", "float32")
    assert exact.greedy_against == "transformers"
    assert exact.max_abs_diff is not None
    for dtype in ("float16", "bfloat16"):
        half = tolerance_for("float", dtype)
        assert half.greedy_against == "bundle"
        assert half.max_abs_diff is None
        assert is_looser(half, exact)


def is_looser(one: Tolerance, other: Tolerance) -> bool:
    return (
        one.kl_mean >= other.kl_mean
        and one.top1_agreement <= other.top1_agreement
        and one.layer_error >= other.layer_error
    )


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_fewer_bits_may_lose_more(group_size: int) -> None:
    limits = [tolerance_for(f"int{bits}-g{group_size}", "float32") for bits in sorted(BITS)]
    for fewer, more in pairwise(limits):
        assert is_looser(fewer, more)
        assert fewer.kl_mean > more.kl_mean


def test_larger_groups_may_lose_more() -> None:
    limits = [tolerance_for(f"int4-g{group_size}", "float32") for group_size in (128, 64, 32)]
    for larger, smaller in pairwise(limits):
        assert is_looser(larger, smaller)


@pytest.mark.parametrize("one", SIDES, ids="-".join)
def test_which_of_two_bundles_judges_does_not_matter(one: tuple[str, str]) -> None:
    for other in SIDES:
        assert tolerance_between(one, other) == tolerance_between(other, one)


@pytest.mark.parametrize("side", SIDES, ids="-".join)
def test_two_bundles_judge_no_text_by_transformers(side: tuple[str, str]) -> None:
    # There is none.
    for other in SIDES:
        assert tolerance_between(side, other).greedy_against == "bundle"


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_same_integers_are_nearer_to_each_other_than_to_the_floats(scheme: str) -> None:
    own = tolerance_for(scheme, "float32")
    between = tolerance_between((scheme, "float32"), (scheme, "bfloat16"))
    assert between.kl_mean == own.self_kl
    assert between.top1_agreement == 0.9
    assert between.layer_error == 0.1


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_two_roundings_may_lie_apart_as_far_as_both_from_the_floats(scheme: str) -> None:
    for other in {*QUANTIZED, "float"} - {scheme}:
        one, two = tolerance_for(scheme, "float32"), tolerance_for(other, "float32")
        between = tolerance_between((scheme, "float32"), (other, "float32"))
        assert between.kl_mean >= one.kl_mean + two.kl_mean
        assert is_looser(between, one)
        assert is_looser(between, two)


def test_floats_are_compared_as_the_coarser_of_them() -> None:
    between = tolerance_between(("float", "float32"), ("float", "bfloat16"))
    expected = tolerance_for("float", "bfloat16")
    for field in fields(Tolerance):
        assert getattr(between, field.name) == getattr(expected, field.name)
    exact = tolerance_between(("float", "float32"), ("float", "float32"))
    assert exact.kl_mean == tolerance_for("float", "float32").kl_mean
    assert exact.max_abs_diff == tolerance_for("float", "float32").max_abs_diff
