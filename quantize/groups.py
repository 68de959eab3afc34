"""Float matrices to integer codes and scales, and back: one arithmetic for every target.

Each group's scale is searched for the least squared error. A group is divided by the size of its
largest weight, which becomes -1; a trial multiplies by a factor and rounds.

4 bits: for a fixed rounding the scale of least squared error is ``sum(w*q) / sum(q*q)``, and its
error is ``sum(w*w) - sum(w*q)**2 / sum(q*q)``. So a few factors decide the rounding, the best trial
is the one with the largest ``sum(w*q)**2 / sum(q*q)``, and its scale follows in closed form. (The
idea is that of ``make_qx_quants`` in llama.cpp's ``ggml-quants.c``, without importance weights.)

6 bits: the same with factors of their own.

8 bits: neighbouring bfloat16 numbers differ by 0.4 to 0.8 %, which moves a code of 127 by up to 1.
A closed form would be rounded to a scale for which other codes are best, so the trials are the
bfloat16 numbers themselves, and the error of each is summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qwen2x.quantize.errors import SchemeError
from qwen2x.quantize.scheme import Scheme
from qwen2x.quantize.search import search_grid

Float = NDArray[np.float32]
Codes = NDArray[np.uint8]

# By bits: where each trial places the group's largest weight, in codes from zero. The far end of
# the signed range is 8 (32); less leaves room, more clips the largest weight for the others' sake.
# Plain rounding is to 7 or 8 (31 or 32).
REACHES = {4: (7.0, 7.4, 8.0, 8.3, 8.7, 9.2), 6: (31.0, 31.4, 32.0, 32.4, 33.0, 33.8)}
# 8 bits: bfloat16 numbers, counted from the one nearest to largest/127. The one below places the
# largest weight on 128.5 at most, so that it stays within half a step of the far end, 128.
NEIGHBOURS = (-1, 0, 1, 2, 3)
# Few long NumPy calls: threads that quantize side by side wait for the interpreter between calls.
_BLOCK_ELEMENTS = 1 << 18
# Far from both ends of float32, so that nothing here overflows; a group below counts as zero.
_SMALLEST, _LARGEST = 2.0**-56, 2.0**48


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """Rows of a matrix as codes uint8 [rows, columns] and scales float32 [rows, groups].

    ``zero_points`` are uint8 [rows, groups], where the scheme is not symmetric.
    """

    codes: Codes
    scales: Float
    scheme: Scheme
    zero_points: Codes | None = None


def quantize(values: Float, scheme: Scheme) -> QuantizedMatrix:
    """Codes and scales of least squared error among the trials.

    Args:
        values: float32 [rows, columns], finite; columns a multiple of the group size.
        scheme: bits and group size.

    Raises:
        SchemeError: weights that are too large to be weights.
    """
    if not scheme.is_symmetric:
        return _quantize_asymmetric(values, scheme)
    rows, columns = values.shape
    groups = columns // scheme.group_size
    grouped = values.reshape(rows * groups, scheme.group_size)
    codes = np.empty(grouped.shape, np.uint8)
    scales = np.empty(len(grouped), np.float32)
    step = _BLOCK_ELEMENTS // scheme.group_size
    for start in range(0, len(grouped), step):
        block = slice(start, start + step)
        scales[block], transposed = _quantize_block(grouped[block], scheme)
        codes[block] = transposed.T
    return QuantizedMatrix(
        codes=codes.reshape(rows, columns), scales=scales.reshape(rows, groups), scheme=scheme
    )


def require_within_range(weights: Float, largest: float) -> None:
    """Raises SchemeError for weights whose ``largest`` size is too large, or not finite."""
    if not largest <= _LARGEST:
        raise SchemeError(
            "weights must be finite and within 2**48, got "
            f"{weights.flat[np.abs(weights).argmax()]}; export without --bits"
        )


def dequantize(matrix: QuantizedMatrix) -> Float:
    """Float32 [rows, columns]: scale * (code - zero point)."""
    rows, groups = matrix.scales.shape
    grouped = matrix.codes.reshape(rows, groups, -1).astype(np.float32)
    if matrix.zero_points is None:
        grouped -= np.float32(matrix.scheme.zero_point)
    else:
        grouped -= matrix.zero_points[:, :, None]
    grouped *= matrix.scales[:, :, None]
    return grouped.reshape(matrix.codes.shape)


def _quantize_asymmetric(values: Float, scheme: Scheme) -> QuantizedMatrix:
    """As ``quantize``, with a zero point for each group."""
    require_within_range(values, np.abs(values).max(initial=0))
    rows, columns = values.shape
    grid = search_grid(values, np.ones(columns, np.float32), scheme)
    assert grid.zero_points is not None
    grouped = values.reshape(*grid.scales.shape, scheme.group_size)
    inverse = np.divide(1, grid.scales, out=np.zeros_like(grid.scales), where=grid.scales != 0)
    codes = np.rint(grouped * inverse[:, :, None]) + grid.zero_points[:, :, None]
    np.clip(codes, 0, scheme.max_code, out=codes)
    return QuantizedMatrix(
        codes=codes.astype(np.uint8).reshape(rows, columns),
        scales=grid.scales,
        scheme=scheme,
        zero_points=grid.zero_points.astype(np.uint8),
    )


def _quantize_block(grouped: Float, scheme: Scheme) -> tuple[Float, Codes]:
    """Scales float32 [groups] and codes uint8 [group_size, groups] of [groups, group_size]."""
    weights = grouped.T.copy()
    largest = _largest(weights)
    is_zero = np.abs(largest) < _SMALLEST
    largest[is_zero] = 1
    # The largest weight goes to the negative end, which has one code more.
    weights *= -1 / largest
    search = _search_in_closed_form if scheme.bits in REACHES else _search_neighbours
    steps = search(weights, np.abs(largest), scheme)
    steps[is_zero] = 1
    factors = np.abs(largest) / steps
    weights *= factors
    _round_to_signed(weights, factors.max(initial=0), scheme, weights)
    weights += scheme.zero_point
    scales = np.copysign(steps, -largest)
    scales[is_zero] = 0
    return scales, weights.astype(np.uint8)


def _largest(weights: Float) -> Float:
    """The weight of each group that is farthest from 0 (of two the positive), float32 [groups]."""
    highest, lowest = weights.max(axis=0), weights.min(axis=0)
    sizes = np.maximum(highest, -lowest)
    require_within_range(weights, sizes.max(initial=0))
    largest: Float = np.copysign(sizes, highest + lowest)
    return largest


def _search_in_closed_form(weights: Float, sizes: Float, scheme: Scheme) -> Float:
    """The step of each group, its scale without sign.

    Args:
        weights: float32 [group_size, groups], each group divided by the size of its largest weight.
        sizes: float32 [groups], these sizes.
        scheme: bits and group size.

    Returns:
        float32 [groups], bfloat16 numbers.
    """
    reaches = REACHES[scheme.bits]
    weight_code = np.empty((len(reaches), len(sizes)), np.float32)
    code_code = np.empty_like(weight_code)
    rounded = np.empty_like(weights)
    for trial, reach in enumerate(reaches):
        np.multiply(weights, np.float32(reach), out=rounded)
        _round_to_signed(rounded, reach, scheme, rounded)
        np.einsum("ij,ij->j", weights, rounded, out=weight_code[trial])
        np.einsum("ij,ij->j", rounded, rounded, out=code_code[trial])
    # Only a group of zeros has no code but 0.
    np.maximum(code_code, 1, out=code_code)
    steps: Float = weight_code / code_code
    errors: Float = -weight_code * steps
    chosen: Float = (_choose(steps, errors) * sizes).astype(bfloat16).astype(np.float32)
    return chosen


def _search_neighbours(weights: Float, sizes: Float, scheme: Scheme) -> Float:
    """The step of each group, its scale without sign; arguments and result as for fewer bits."""
    nearest = (sizes / np.float32(127)).astype(bfloat16).astype(np.float32)
    # A bfloat16 number is the upper half of a float32.
    offsets = np.array(NEIGHBOURS, np.int32)[:, None] << 16
    steps = (nearest.view(np.int32) + offsets).view(np.float32)
    errors = np.empty_like(steps)
    scaled, rounded = np.empty_like(weights), np.empty_like(weights)
    for step, error in zip(steps, errors, strict=True):
        factors = sizes / step
        np.multiply(weights, factors, out=scaled)
        _round_to_signed(scaled, factors.max(initial=0), scheme, rounded)
        scaled -= rounded
        np.einsum("ij,ij->j", scaled, scaled, out=error)
        error /= factors
        error /= factors
    return _choose(steps, errors)


def _choose(steps: Float, errors: Float) -> Float:
    """The step [groups] of the trial with the least error, both [trials, groups]."""
    # A product and a maximum, since NumPy's masked copies take many times as long.
    chosen: Float = (steps * (errors == errors.min(axis=0))).max(axis=0)
    return chosen


def _round_to_signed(scaled: Float, largest: float, scheme: Scheme, out: Float) -> None:
    """Integers from ``-zero_point`` on, for numbers of at most ``largest`` in size."""
    np.rint(scaled, out=out)
    # Not quite half a code, as the largest was divided and multiplied in float32.
    if largest > scheme.zero_point - 0.501:
        np.clip(out, -scheme.zero_point, scheme.zero_point - 1, out=out)
