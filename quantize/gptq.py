"""Rounding that makes up for its own errors: GPTQ (https://arxiv.org/abs/2210.17323).

Columns are rounded one after another, and what a column loses is spread over those that are still
to be rounded, as the inputs' second moments say. The order is by falling moment, so that the
columns that matter most are rounded first, while groups stay the neighbours that they are: every
group's scale is chosen beforehand, so the format is that of plain rounding.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import Codes, Float, QuantizedMatrix, require_within_range
from qwen2x.quantize.scheme import Scheme

Double = NDArray[np.float64]

_log = logging.getLogger(__name__)

# Added to the diagonal of the moments, as a share of it; raised where the factorization fails.
# Little text tells little of thousands of columns: on the 0.5B checkpoint and 24,576 tokens KL is
# 0.0332 on prose and 0.0245 on code with 0.01, and 0.0291 and 0.0216 with 0.15.
DAMPING = 0.15
_MOST_DAMPING = 1.0
_BLOCK = 32
# Up to this size LAPACK factors and inverts, larger matrices by products of their parts.
_SMALL_TRIANGLE = 128
# Where trials place a group's largest weight, in codes from zero, as shares of the far end.
_REACHES = {4: np.arange(0.80, 1.42, 0.04), 8: np.arange(0.97, 1.04, 0.01)}
_SMALLEST = 2.0**-56


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of a matrix's calibration inputs: what rounding needs to know of them.

    Attributes:
        importance: float32 [columns], the mean square of each input, up to a factor.
        order: int64 [columns], by falling importance.
        factor: float32 [columns, columns], upper triangular U with U^T U the inverse of the
            damped second moments, in that order.
    """

    importance: Float
    order: NDArray[np.int64]
    factor: Float

    def solve(self, right: Float) -> Float:
        """Right [rows, columns] times the inverse of the damped moments."""
        solved = np.empty_like(right)
        solved[:, self.order] = (right[:, self.order] @ self.factor.T) @ self.factor
        return solved


def gather_moments(products: Float, damping: float = DAMPING) -> Moments:
    """Moments of products float32 [columns, columns], the sum of x x^T over inputs x.

    Raises:
        CheckpointError: products that are not finite.
    """
    importance = np.maximum(products.diagonal(), 0).astype(np.float32)
    if not np.isfinite(importance).all():
        raise CheckpointError(
            "calibration met activations that are not finite; use --method rtn, or another text"
        )
    order = np.argsort(-importance, kind="stable")
    factor = _inverse_factor(products, order, damping)
    return Moments(importance=importance, order=order, factor=factor)


def round_compensated(weights: Float, moments: Moments, scheme: Scheme) -> QuantizedMatrix:
    """Codes and scales whose product with the inputs is near that of weights [rows, columns].

    Raises:
        SchemeError: weights that are too large to be weights.
    """
    require_within_range(weights, np.abs(weights).max(initial=0))
    rows, columns = weights.shape
    order, factor = moments.order, moments.factor
    scales = search_scales(weights, moments.importance, scheme)
    left = np.ascontiguousarray(weights.T[order])
    of_column = np.ascontiguousarray(np.repeat(scales.T, scheme.group_size, axis=0)[order])
    codes = np.empty((columns, rows), np.uint8)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block = slice(start, stop)
        errors = _round_block(
            left[block], of_column[block], factor[block, block], scheme, codes[block]
        )
        left[stop:] -= factor[block, stop:].T @ errors
    unordered = np.empty_like(codes)
    unordered[order] = codes
    return QuantizedMatrix(codes=np.ascontiguousarray(unordered.T), scales=scales, scheme=scheme)


def search_scales(weights: Float, importance: Float, scheme: Scheme) -> Float:
    """Scales float32 [rows, groups], bfloat16 numbers, of least importance-weighted squared error.

    Args:
        weights: float32 [rows, columns].
        importance: float32 [columns], not negative.
        scheme: bits and group size.
    """
    rows, columns = weights.shape
    groups = columns // scheme.group_size
    grouped = weights.reshape(rows, groups, scheme.group_size)
    # A column that no input touched still has a say, however small.
    weight_of = importance.reshape(groups, scheme.group_size)
    weight_of = weight_of / np.maximum(weight_of.mean(axis=1, keepdims=True), _SMALLEST) + 1e-3
    highest, lowest = grouped.max(axis=2), grouped.min(axis=2)
    extreme = np.where(highest > -lowest, highest, lowest)
    is_zero = np.abs(extreme) < _SMALLEST
    safe = np.where(is_zero, np.float32(1), extreme)
    best_gain = np.full(extreme.shape, -1, np.float32)
    best = np.zeros_like(extreme)
    end = scheme.zero_point
    for share in _REACHES[scheme.bits]:
        inverse = (-share * end / safe).astype(np.float32)
        rounded = np.rint(grouped * inverse[:, :, None])
        np.clip(rounded, -end, end - 1, out=rounded)
        weighted = rounded * weight_of
        product = np.einsum("rgi,rgi->rg", weighted, grouped)
        square = np.einsum("rgi,rgi->rg", weighted, rounded)
        scale = product / np.maximum(square, _SMALLEST)
        gain = product * scale
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best = np.where(better, scale, best)
    best[is_zero] = 0
    scales: Float = best.astype(bfloat16).astype(np.float32)
    return scales


def _round_block(left: Float, scales: Float, factor: Float, scheme: Scheme, codes: Codes) -> Float:
    """Rounds columns [block, rows], spreading errors in the block; gives errors [block, rows].

    ``left`` is changed, ``codes`` is filled.
    """
    end = scheme.zero_point
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    errors = np.empty_like(left)
    for index in range(len(left)):
        rounded = np.rint(left[index] * inverse[index])
        np.clip(rounded, -end, end - 1, out=rounded)
        codes[index] = (rounded + end).astype(np.uint8)
        errors[index] = (left[index] - rounded * scales[index]) / factor[index, index]
        left[index + 1 :] -= factor[index, index + 1 :, None] * errors[index]
    return errors


def _inverse_factor(moments: Float, order: NDArray[np.int64], damping: float) -> Float:
    """Upper triangular U with U^T U the inverse of the (ordered, damped) moments."""
    diagonal = np.maximum(moments.diagonal(), 0)
    # Columns that are never used keep a little of their own, and are rounded plainly.
    floor = 1e-6 * float(diagonal.mean()) or 1.0
    scale = 1 / np.sqrt(np.maximum(diagonal, floor), dtype=np.float64)[order]
    # Seen from behind: the inverse of its lower factor, turned round, is the factor sought.
    behind = order[::-1]
    correlation = moments[np.ix_(behind, behind)].astype(np.float64)
    correlation *= scale[::-1, None]
    correlation *= scale[::-1]
    upper = _inverse_of_factor(correlation, damping)[::-1, ::-1]
    return np.ascontiguousarray(upper * scale, np.float32)


def _inverse_of_factor(correlation: Double, damping: float) -> Double:
    """The inverse of the Cholesky factor, with as much damping as it takes."""
    diagonal = np.diag_indices_from(correlation)
    added = 0.0
    while True:
        correlation[diagonal] += damping - added
        added = damping
        try:
            return _factor_and_invert(correlation)
        except np.linalg.LinAlgError:
            if damping >= _MOST_DAMPING:
                raise
            damping = min(_MOST_DAMPING, 10 * damping)
            _log.warning("moments are not positive definite; damping raised to %g", damping)


def _factor_and_invert(matrix: Double) -> Double:
    """L^-1 for the Cholesky factor L of a matrix, by halves, so that nearly all is products.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    size = len(matrix)
    if size <= _SMALL_TRIANGLE:
        small: Double = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return small
    half = size // 2
    first = _factor_and_invert(matrix[:half, :half])
    below = matrix[half:, :half] @ first.T
    last = _factor_and_invert(matrix[half:, half:] - below @ below.T)
    inverse = np.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -last @ (below @ first)
    return inverse
