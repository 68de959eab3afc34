"""Compensated rounding against GPTQ written out plainly, and against rounding alone."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qwen2x.quantize.errors import CheckpointError, SchemeError
from qwen2x.quantize.gptq import (
    LEAST_DAMPING,
    Moments,
    damping_for,
    gather_moments,
    round_compensated,
)
from qwen2x.quantize.groups import QuantizedMatrix, dequantize, quantize
from qwen2x.quantize.scheme import Scheme
from qwen2x.quantize.search import search_grid

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
SCHEMES = [Scheme(bits=bits, group_size=size) for bits in (4, 8) for size in (32, 64, 128)]
INT4 = Scheme(bits=4, group_size=32)
# The factor is stored as float32, of float64 arithmetic: relative to the inverse's size.
FACTOR = 1e-6
# In float32, of moments with a damping of 0.6, whose condition is at most some 1,000.
SINGLE = 1e-4
# Squared output error over plain rounding's, on inputs of which a quarter of the directions hold
# nearly all: what compensation is for. Measured 0.07 to 0.13.
GAIN = 0.15
# A code may differ from float64's where a weight lies this near the middle of two, in steps:
# float32 sums over 128 columns, of weights up to 128 steps large.
TIE_STEPS = 5e-4
# Trials of scales are few, and the chosen one is rounded to bfloat16: weighted squared error over
# that of plain rounding's scale, for all groups together.
WEIGHTED_SCALES = {4: 1.0, 8: 1.02}


def inputs(seed: int, columns: int, samples: int = 1024) -> Floats:
    """Float32 [samples, columns]: few directions, some noise, channels of different size."""
    random = np.random.default_rng(seed)
    latent = random.standard_normal((samples, columns // 4))
    mixed = latent @ random.standard_normal((columns // 4, columns)) / np.sqrt(columns // 4)
    noisy = mixed + 0.2 * random.standard_normal((samples, columns))
    return (noisy * np.exp(0.5 * random.standard_normal(columns))).astype(np.float32)


def weights(seed: int, rows: int, columns: int) -> Floats:
    drawn = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    return drawn.astype(bfloat16).astype(np.float32)


def damped(products: Floats, damping: float = LEAST_DAMPING) -> Doubles:
    """The second moments with a share of their diagonal added, as GPTQ's paper advises."""
    exact = products.astype(np.float64)
    return exact + damping * np.diag(np.maximum(np.diag(exact), 1e-6 * np.diag(exact).mean()))


def inverse_of(moments: Moments) -> Doubles:
    """U^T U with the order undone."""
    factor = moments.factor.astype(np.float64)
    inverse = np.empty_like(factor)
    inverse[np.ix_(moments.order, moments.order)] = factor.T @ factor
    return inverse


def output_error(weight: Floats, matrix: QuantizedMatrix, x: Floats) -> float:
    """The squared size of (W - Q) X."""
    lost = weight.astype(np.float64) - dequantize(matrix)
    return float(np.square(lost @ x.T.astype(np.float64)).sum())


def require_well_formed(matrix: QuantizedMatrix, weight: Floats, scheme: Scheme) -> None:
    rows, columns = weight.shape
    assert matrix.scheme == scheme
    assert matrix.codes.shape == (rows, columns)
    assert matrix.codes.dtype == np.uint8
    assert matrix.codes.max() <= scheme.max_code
    assert matrix.scales.shape == (rows, columns // scheme.group_size)
    assert matrix.scales.dtype == np.float32
    assert np.isfinite(matrix.scales).all()
    np.testing.assert_array_equal(matrix.scales, matrix.scales.astype(bfloat16))


def round_slowly(
    weight: Floats, products: Floats, scales: Floats, scheme: Scheme
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """GPTQ as its paper has it: one column after another, the inverse updated behind each.

    Gives codes [rows, columns], and the rows in which no code was decided by a tie.
    """
    left = weight.astype(np.float64)
    inverse = np.linalg.inv(damped(products))
    of_column = np.repeat(scales.astype(np.float64), scheme.group_size, axis=1)
    codes = np.empty(weight.shape, np.int64)
    is_clear = np.ones(len(weight), bool)
    todo = list(np.argsort(-np.diag(products), kind="stable"))
    low, high = -scheme.zero_point, scheme.zero_point - 1
    while todo:
        column = todo.pop(0)
        steps = left[:, column] / of_column[:, column]
        within = (steps > low - 0.5 - TIE_STEPS) & (steps < high + 0.5 + TIE_STEPS)
        is_clear &= ~within | (np.abs(np.abs(steps % 1) - 0.5) > TIE_STEPS)
        rounded = np.clip(np.rint(steps), low, high)
        codes[:, column] = rounded + scheme.zero_point
        error = (left[:, column] - rounded * of_column[:, column]) / inverse[column, column]
        left[:, todo] -= np.outer(error, inverse[column, todo])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, is_clear


# Moments


@pytest.mark.parametrize("columns", [32, 128, 160, 384])
@pytest.mark.parametrize("damping", [LEAST_DAMPING, 0.15])
def test_the_factor_is_that_of_the_inverse_of_the_damped_moments(
    columns: int, damping: float
) -> None:
    x = inputs(1, columns)
    products = x.T @ x
    moments = gather_moments(products, damping)
    expected = np.linalg.inv(damped(products, damping))
    assert np.abs(inverse_of(moments) - expected).max() < FACTOR * np.abs(expected).max()
    np.testing.assert_array_equal(moments.factor, np.triu(moments.factor))
    assert (np.diag(moments.factor) > 0).all()
    assert moments.factor.dtype == np.float32


def test_wide_moments_are_factored_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(1, 384)
    exact = gather_moments(x.T @ x, 0.6)
    monkeypatch.setattr("qwen2x.quantize.gptq._WIDEST_IN_DOUBLE", 383)
    factor = gather_moments(x.T @ x, 0.6).factor
    assert (factor != exact.factor).any()
    assert np.abs(factor - exact.factor).max() < SINGLE * np.abs(exact.factor).max()


def test_columns_are_ordered_by_falling_importance() -> None:
    x = inputs(2, 64)
    moments = gather_moments(x.T @ x)
    np.testing.assert_array_equal(np.sort(moments.order), np.arange(64))
    assert (np.diff(moments.importance[moments.order]) <= 0).all()
    np.testing.assert_allclose(moments.importance, np.square(x).sum(axis=0), rtol=1e-4)


def test_solve_multiplies_by_the_inverse_of_the_damped_moments() -> None:
    x = inputs(3, 160)
    right = weights(3, 20, 160)
    expected = right @ np.linalg.inv(damped(x.T @ x))
    solved = gather_moments(x.T @ x).solve(right)
    assert np.abs(solved - expected).max() < 10 * FACTOR * np.abs(expected).max()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_moments_that_are_not_finite_are_refused(value: float) -> None:
    products = np.eye(32, dtype=np.float32)
    products[3, 3] = value
    with pytest.raises(CheckpointError, match=r"not finite; use --method rtn, or another text"):
        gather_moments(products)


def test_moments_that_rounding_made_indefinite_are_damped_more_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    products = np.eye(32, dtype=np.float32)
    products[0, 1] = products[1, 0] = 1.05
    with caplog.at_level(logging.WARNING):
        moments = gather_moments(products, damping=0.01)
    assert caplog.messages == ["moments are not positive definite; damping raised to 0.1"]
    expected = np.linalg.inv(damped(products, 0.1))
    np.testing.assert_allclose(inverse_of(moments), expected, atol=1e-5)


# Rounding


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_codes_are_those_of_gptq_written_out_plainly(scheme: Scheme) -> None:
    weight, x = weights(4, 48, 128), inputs(4, 128)
    products = x.T @ x
    matrix = round_compensated(weight, gather_moments(products), scheme)
    codes, is_clear = round_slowly(weight, products, matrix.scales, scheme)
    assert is_clear.mean() > 0.7
    np.testing.assert_array_equal(matrix.codes[is_clear], codes[is_clear])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("seed", [5, 6])
def test_outputs_are_clearly_closer_than_plain_roundings(seed: int, scheme: Scheme) -> None:
    weight, x = weights(seed, 64, 256), inputs(seed, 256)
    matrix = round_compensated(weight, gather_moments(x.T @ x), scheme)
    require_well_formed(matrix, weight, scheme)
    assert output_error(weight, matrix, x) < GAIN * output_error(
        weight, quantize(weight, scheme), x
    )


def test_no_output_is_further_than_plain_roundings() -> None:
    weight, x = weights(7, 256, 128), inputs(7, 128)
    ours = round_compensated(weight, gather_moments(x.T @ x), INT4)
    for row in range(256):
        plain = quantize(weight[[row]], INT4)
        own = QuantizedMatrix(codes=ours.codes[[row]], scales=ours.scales[[row]], scheme=INT4)
        assert output_error(weight[[row]], own, x) <= output_error(weight[[row]], plain, x)


def test_inputs_without_any_correlation_lose_nothing_by_it() -> None:
    weight = weights(8, 64, 128)
    x = np.eye(128, dtype=np.float32)
    ours = round_compensated(weight, gather_moments(x), INT4)
    # Nothing to make up with: what is left is the search for scales, of which ours tries more.
    assert output_error(weight, ours, x) <= 1.001 * output_error(weight, quantize(weight, INT4), x)


def test_fewer_samples_than_columns_still_round_well() -> None:
    weight, x = weights(9, 64, 256), inputs(9, 256, samples=40)
    matrix = round_compensated(weight, gather_moments(x.T @ x), INT4)
    require_well_formed(matrix, weight, INT4)
    assert output_error(weight, matrix, x) < 0.2 * output_error(weight, quantize(weight, INT4), x)


def test_one_sample_rounds_well() -> None:
    weight, x = weights(10, 16, 64), inputs(10, 64, samples=1)
    matrix = round_compensated(weight, gather_moments(x.T @ x), INT4)
    require_well_formed(matrix, weight, INT4)
    assert output_error(weight, matrix, x) < output_error(weight, quantize(weight, INT4), x)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_massive_channels_are_kept_closest(size: float) -> None:
    """Qwen2 has channels thousands of times the others' size."""
    weight, x = weights(11, 64, 128), inputs(11, 128)
    x[:, [5, 77]] *= np.float32(size)
    moments = gather_moments(x.T @ x)
    assert set(moments.order[:2]) == {5, 77}
    matrix = round_compensated(weight, moments, INT4)
    require_well_formed(matrix, weight, INT4)
    assert output_error(weight, matrix, x) < GAIN * output_error(weight, quantize(weight, INT4), x)


def test_columns_that_no_input_touches_are_rounded_to_the_nearest_code() -> None:
    weight, x = weights(12, 32, 128), inputs(12, 128)
    dead = np.r_[3, 32:64, 100]
    x[:, dead] = 0
    matrix = round_compensated(weight, gather_moments(x.T @ x), INT4)
    require_well_formed(matrix, weight, INT4)
    scales = np.repeat(matrix.scales, 32, axis=1)[:, dead]
    nearest = np.clip(np.rint(weight[:, dead] / scales), -8, 7) + 8
    assert (matrix.codes[:, dead] == nearest).mean() > 0.999  # a reciprocal may decide a tie
    assert output_error(weight, matrix, x) < GAIN * output_error(weight, quantize(weight, INT4), x)


@pytest.mark.parametrize("products", [0.0, 1e-44, 1e-30, 1e30])
def test_inputs_of_any_size_give_codes_like_others(products: float) -> None:
    """All zero, below and near both ends of float32."""
    weight = weights(13, 16, 64)
    moments = gather_moments(np.eye(64, dtype=np.float32) * np.float32(products))
    assert np.isfinite(moments.factor).all()
    matrix = round_compensated(weight, moments, INT4)
    require_well_formed(matrix, weight, INT4)
    assert np.abs(dequantize(matrix) - weight).max() < 0.5


def test_groups_and_rows_of_zeros_stay_zeros() -> None:
    weight, x = weights(14, 16, 128), inputs(14, 128)
    weight[3] = 0
    weight[:, 64:96] = 0
    matrix = round_compensated(weight, gather_moments(x.T @ x), INT4)
    require_well_formed(matrix, weight, INT4)
    restored = dequantize(matrix)
    assert not restored[3].any()
    assert not restored[:, 64:96].any()
    assert not matrix.scales[3].any()
    assert matrix.scales[4, [0, 1, 3]].all()


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30, -3e38])
def test_weights_that_are_none_are_refused(value: float) -> None:
    weight, x = weights(15, 8, 32), inputs(15, 32)
    weight[2, 7] = value
    with pytest.raises(SchemeError, match=r"finite and within 2\*\*48, got .*; export without"):
        round_compensated(weight, gather_moments(x.T @ x), INT4)


def test_twice_the_same_gives_the_same_bytes_and_leaves_its_arguments() -> None:
    weight, x = weights(16, 32, 128), inputs(16, 128)
    before = weight.copy()
    moments = gather_moments(x.T @ x)
    one, two = (round_compensated(weight, moments, INT4) for _ in range(2))
    assert one.codes.tobytes() == two.codes.tobytes()
    assert one.scales.tobytes() == two.scales.tobytes()
    np.testing.assert_array_equal(weight, before)


# Scales


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_scales_lose_no_more_of_what_is_important_than_plain_ones(scheme: Scheme) -> None:
    weight, x = weights(17, 64, 256), inputs(17, 256)
    importance = np.square(x).sum(axis=0)

    def lost(scales: Floats) -> float:
        of_column = np.repeat(scales, scheme.group_size, axis=1)
        low, high = -scheme.zero_point, scheme.zero_point - 1
        restored = np.clip(np.rint(weight / of_column), low, high) * of_column
        return float((importance * np.square(weight - restored)).sum())

    scales = search_grid(weight, importance, scheme).scales
    assert lost(scales) <= WEIGHTED_SCALES[scheme.bits] * lost(quantize(weight, scheme).scales)


def test_a_weight_alone_in_its_group_is_met_whatever_its_importance() -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[0, 5], weight[1, 40] = 0.75, -1.5
    for importance in (np.zeros(64, np.float32), np.ones(64, np.float32)):
        scales = search_grid(weight, importance, INT4).scales
        steps = np.rint(weight / np.where(scales == 0, 1, scales).repeat(32, axis=1))
        restored = steps.clip(-8, 7) * scales.repeat(32, axis=1)
        # A scale has eight bits.
        np.testing.assert_allclose(restored, weight, rtol=2**-8)


def test_less_text_for_each_column_means_more_damping() -> None:
    assert damping_for(896, 1_000_000) == LEAST_DAMPING
    assert damping_for(896, 24_576) < damping_for(4864, 24_576) < damping_for(18_944, 24_576) <= 1
