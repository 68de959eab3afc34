"""Rounding that makes up for its own errors: GPTQ (https://arxiv.org/abs/2210.17323).

Columns are rounded one after another, and what a column loses is spread over those that are still
to be rounded, as the inputs' second moments say. The order is by falling moment, so that the
columns that matter most are rounded first, while groups stay the neighbours that they are: every
group's scale is chosen beforehand, so the format is that of plain rounding.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import Codes, Float, QuantizedMatrix, require_within_range
from qwen2x.quantize.scheme import Scheme
from qwen2x.quantize.search import Grid, search_grid

Double = NDArray[np.float64]

_log = logging.getLogger(__name__)

# Added to the diagonal of the moments, as a share of it; raised where the factorization fails.
# Little text tells little of thousands of columns: with 24,576 tokens, the error on other text is
# least with some 0.1 for the 896 columns of the 0.5B checkpoint and 0.6 for 4,864.
LEAST_DAMPING = 0.1
_DAMPING_PER_COLUMN = 3.0
_MOST_DAMPING = 1.0
_BLOCK = 32
_WIDEST_IN_DOUBLE = 8192
# Up to this size LAPACK factors and inverts, larger matrices by products of their parts.
_SMALL_TRIANGLE = 128


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


def damping_for(columns: int, tokens: int) -> float:
    """A share of the moments' diagonal, more for fewer tokens per column."""
    return min(_MOST_DAMPING, max(LEAST_DAMPING, _DAMPING_PER_COLUMN * columns / tokens))


def moments_memory(columns: int) -> int:
    """An estimate of the bytes that it takes to gather moments."""
    # Products, the matrix that becomes a factor, half as much beside it, and the factor.
    return (14 if columns > _WIDEST_IN_DOUBLE else 24) * columns**2


def gather_moments(products: Float, damping: float = LEAST_DAMPING) -> Moments:
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
    grid = search_grid(weights, moments.importance, scheme)
    group_of = order // scheme.group_size
    left = np.ascontiguousarray(weights.T[order])
    codes = np.empty((columns, rows), np.uint8)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block = slice(start, stop)
        part = _Columns(grid, group_of[block], scheme)
        errors = _round_block(left[block], part, factor[block, block], codes[block])
        left[stop:] -= factor[block, stop:].T @ errors
    unordered = np.empty_like(codes)
    unordered[order] = codes
    zero_points = grid.zero_points
    return QuantizedMatrix(
        codes=np.ascontiguousarray(unordered.T),
        scales=grid.scales,
        scheme=scheme,
        zero_points=None if zero_points is None else zero_points.astype(np.uint8),
    )


class _Columns:
    """Of some columns [block] their scales and codes' ends, each [block, rows] or one number."""

    def __init__(self, grid: Grid, group_of: NDArray[np.int64], scheme: Scheme) -> None:
        self.scales = np.ascontiguousarray(grid.scales.T[group_of])
        self.inverse = np.divide(
            1, self.scales, out=np.zeros_like(self.scales), where=self.scales != 0
        )
        zero_points = (
            np.full((1, 1), scheme.zero_point, np.float32)
            if grid.zero_points is None
            else grid.zero_points.T[group_of]
        )
        self.zero_points = np.broadcast_to(zero_points, self.scales.shape)
        self.lowest = -self.zero_points
        self.highest = scheme.max_code - self.zero_points


def _round_block(left: Float, columns: _Columns, factor: Float, codes: Codes) -> Float:
    """Rounds columns [block, rows], spreading errors in the block; gives errors [block, rows].

    ``left`` is changed, ``codes`` is filled.
    """
    errors = np.empty_like(left)
    for index in range(len(left)):
        rounded = np.rint(left[index] * columns.inverse[index])
        np.clip(rounded, columns.lowest[index], columns.highest[index], out=rounded)
        codes[index] = (rounded + columns.zero_points[index]).astype(np.uint8)
        errors[index] = (left[index] - rounded * columns.scales[index]) / factor[index, index]
        left[index + 1 :] -= factor[index, index + 1 :, None] * errors[index]
    return errors


def _inverse_factor(moments: Float, order: NDArray[np.int64], damping: float) -> Float:
    """Upper triangular U with U^T U the inverse of the (ordered, damped) moments."""
    diagonal = np.maximum(moments.diagonal(), 0)
    # Columns that are never used keep a little of their own, and are rounded plainly.
    floor = 1e-6 * float(diagonal.mean()) or 1.0
    scale = 1 / np.sqrt(np.maximum(diagonal, floor), dtype=np.float64)[order]
    # Seen from behind: the inverse of its lower factor, turned round, is the factor sought.
    scale = scale[::-1]
    while True:
        correlation = _correlation(moments, order[::-1], scale)
        correlation[np.diag_indices_from(correlation)] += damping
        try:
            _factor_and_invert(correlation)
            break
        except np.linalg.LinAlgError:
            if damping >= _MOST_DAMPING:
                raise
            damping = min(_MOST_DAMPING, 10 * damping)
            _log.warning("moments are not positive definite; damping raised to %g", damping)
    correlation *= scale
    return np.ascontiguousarray(correlation[::-1, ::-1], np.float32)


def _correlation(
    moments: Float, order: NDArray[np.int64], scale: Double
) -> NDArray[np.floating[Any]]:
    """Moments in an order, each row and column times its scale.

    In float64, but wide matrices in float32, for their size: they are damped the more.
    """
    is_wide = len(moments) > _WIDEST_IN_DOUBLE
    correlation: NDArray[np.floating[Any]] = moments[np.ix_(order, order)].astype(
        np.float32 if is_wide else np.float64
    )
    correlation *= scale[:, None]
    correlation *= scale
    return correlation


def _factor_and_invert(matrix: NDArray[np.floating[Any]]) -> None:
    """Puts L^-1 in the place of a matrix with the Cholesky factor L.

    By halves, so that nearly all is products, and little beside the matrix is in memory.

    Raises:
        LinAlgError: the matrix is not positive definite, and now is not what it was.
    """
    size = len(matrix)
    if size <= _SMALL_TRIANGLE:
        matrix[:] = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return
    half = size // 2
    first, last = matrix[:half, :half], matrix[half:, half:]
    _factor_and_invert(first)
    below = matrix[half:, :half] @ first.T
    last -= below @ below.T
    _factor_and_invert(last)
    matrix[half:, :half] = -last @ (below @ first)
    matrix[:half, half:] = 0
