"""Scales, and zero points where groups have their own, of least weighted squared error.

Trials place a group's largest weight, or its range, on more or fewer codes than plain rounding
does. For the codes of a trial the best scale is ``sum(i*w*q) / sum(i*q*q)`` with importance i, and
the gain over a group of zeros is ``sum(i*w*q)**2 / sum(i*q*q)``; the trial of most gain is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qwen2x.quantize.scheme import Scheme

Float = NDArray[np.float32]

# Where trials place a group's largest weight, in codes from zero, as shares of the far end.
_REACHES = {
    4: np.arange(0.80, 1.42, 0.04),
    6: np.arange(0.94, 1.12, 0.015),
    8: np.arange(0.97, 1.04, 0.01),
}
# How much of a group's range the codes span, and how far the zero point is from the plain one.
_SPANS = {4: (0.72, 0.78, 0.84, 0.90, 0.96, 1.02), 8: (0.96, 0.98, 1.0)}
_SHIFTS = (-1, 0, 1)
_SMALLEST = 2.0**-56
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where a matrix's weights may lie: ``scales * n``, ``lowest <= n <= lowest + max_code``.

    Attributes:
        scales: float32 [rows, groups], bfloat16 numbers.
        zero_points: float32 [rows, groups], whole numbers; None is the scheme's.
    """

    scales: Float
    zero_points: Float | None


def search_grid(weights: Float, importance: Float, scheme: Scheme) -> Grid:
    """The grid of least importance-weighted squared error among the trials.

    Args:
        weights: float32 [rows, columns].
        importance: float32 [columns], not negative.
        scheme: bits and groups.
    """
    rows, columns = weights.shape
    groups = columns // scheme.group_size
    # A column that no input touched still has a say, however small.
    weight_of = importance.reshape(groups, scheme.group_size)
    weight_of = weight_of / np.maximum(weight_of.mean(axis=1, keepdims=True), _SMALLEST) + 1e-3
    weight_of = weight_of.astype(np.float32)
    scales = np.empty((rows, groups), np.float32)
    zero_points = None if scheme.is_symmetric else np.empty((rows, groups), np.float32)
    step = max(1, _BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        grouped = weights[block].reshape(-1, groups, scheme.group_size)
        best = _search(grouped, weight_of, scheme)
        scales[block] = best.scales.astype(bfloat16)
        if zero_points is not None:
            assert best.zero_points is not None
            zero_points[block] = best.zero_points
    return Grid(scales=scales, zero_points=zero_points)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """Factors that turn weights into codes from zero, float32 [rows, groups], and their ends."""

    factors: Float
    lowest: Float | float
    highest: Float | float


def _search(grouped: Float, weight_of: Float, scheme: Scheme) -> Grid:
    """The best trial's scales and zero points [rows, groups] of [rows, groups, group_size]."""
    gain = np.full(grouped.shape[:2], -1, np.float32)
    scales = np.zeros_like(gain)
    zero_points = None if scheme.is_symmetric else np.full_like(gain, scheme.zero_point)
    weighted, rounded = grouped * weight_of, np.empty_like(grouped)
    for trial in _trials(grouped, scheme):
        np.multiply(grouped, trial.factors[:, :, None], out=rounded)
        np.rint(rounded, out=rounded)
        lowest, highest = _inner(trial.lowest), _inner(trial.highest)
        np.minimum(np.maximum(rounded, lowest, out=rounded), highest, out=rounded)
        product = np.einsum("rgi,rgi->rg", weighted, rounded)
        square = np.einsum("rgi,rgi,gi->rg", rounded, rounded, weight_of)
        scale = product / np.maximum(square, _SMALLEST)
        better = product * scale > gain
        np.copyto(gain, product * scale, where=better)
        np.copyto(scales, scale, where=better)
        if zero_points is not None:
            np.copyto(zero_points, np.negative(trial.lowest), where=better)
    return Grid(scales=scales, zero_points=zero_points)


def _inner(end: Float | float) -> Float | float:
    return end if isinstance(end, float) else end[:, :, None]


def _trials(grouped: Float, scheme: Scheme) -> Iterator[_Trial]:
    highest, lowest = grouped.max(axis=2), grouped.min(axis=2)
    if scheme.is_symmetric:
        extreme = np.where(highest > -lowest, highest, lowest)
        end = scheme.zero_point
        inverse = _inverse(-extreme) * end
        for share in _REACHES[scheme.bits].astype(np.float32):
            yield _Trial(factors=share * inverse, lowest=float(-end), highest=float(end - 1))
        return
    lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
    most = np.float32(scheme.max_code)
    inverse = _inverse(highest - lowest) * most
    plain = np.rint(-lowest * inverse)
    for shift in _SHIFTS:
        zero_points = np.clip(plain + np.float32(shift), 0, most)
        for span in _SPANS[scheme.bits]:
            yield _Trial(
                factors=inverse / np.float32(span), lowest=-zero_points, highest=most - zero_points
            )


def _inverse(values: Float) -> Float:
    """One over values, and 0 for those that count as zero."""
    inverse: Float = np.divide(
        np.float32(1), values, out=np.zeros_like(values), where=np.abs(values) >= _SMALLEST
    )
    return inverse
