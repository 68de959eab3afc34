"""Float matrices to integer codes and scales, and back: one arithmetic for every target.

For a fixed rounding the scale of least squared error is ``sum(w*q) / sum(q*q)``, and its error is
``sum(w*w) - sum(w*q)**2 / sum(q*q)``. So a few trial scales decide the rounding, the best trial is
the one with the largest ``sum(w*q)**2 / sum(q*q)``, and its scale follows in closed form. (The idea
is that of ``make_qx_quants`` in llama.cpp's ``ggml-quants.c``; here without importance weights.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qwen2x.quantize.errors import SchemeError
from qwen2x.quantize.scheme import Scheme

Float = NDArray[np.float32]
Codes = NDArray[np.uint8]

# Where the group's largest weight is placed by each trial, in codes from zero. The far end of the
# signed range is 2**(bits-1); less leaves room, more clips the largest weight for the others' sake.
# At 8 bits nothing is clipped, so that every weight is within half a step.
TRIALS = {
    4: (7.0, 7.5, 8.0, 8.6, 9.3),
    8: (127.0,),
}
_GROUPS_PER_BLOCK = 2048
# Squares of sums stay within float32 between these; a group below counts as zero.
_SMALLEST, _LARGEST = 2.0**-56, 2.0**48


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """Rows of a matrix as codes uint8 [rows, columns] and scales float32 [rows, groups]."""

    codes: Codes
    scales: Float
    scheme: Scheme


def quantize(values: Float, scheme: Scheme) -> QuantizedMatrix:
    """Codes and scales of least squared error among the trials.

    Args:
        values: float32 [rows, columns], finite; columns a multiple of the group size.
        scheme: bits and group size.

    Raises:
        SchemeError: weights that are too large to be weights.
    """
    rows, columns = values.shape
    groups = columns // scheme.group_size
    grouped = values.reshape(rows * groups, scheme.group_size)
    codes = np.empty(grouped.shape, np.uint8)
    scales = np.empty(len(grouped), np.float32)
    for start in range(0, len(grouped), _GROUPS_PER_BLOCK):
        block = slice(start, start + _GROUPS_PER_BLOCK)
        weights = np.ascontiguousarray(grouped[block].T)
        scales[block] = _best_scales(weights, scheme)
        codes[block] = _round(weights, scales[block], scheme).T
    return QuantizedMatrix(
        codes=codes.reshape(rows, columns), scales=scales.reshape(rows, groups), scheme=scheme
    )


def dequantize(matrix: QuantizedMatrix) -> Float:
    """Float32 [rows, columns]: scale * (code - zero point)."""
    rows, groups = matrix.scales.shape
    centred = matrix.codes.astype(np.float32) - np.float32(matrix.scheme.zero_point)
    grouped = centred.reshape(rows, groups, -1) * matrix.scales[:, :, None]
    return grouped.reshape(matrix.codes.shape)


def _best_scales(weights: Float, scheme: Scheme) -> Float:
    """Scales float32 [groups], bfloat16 numbers, for weights [group_size, groups]."""
    highest, lowest = weights.max(axis=0), weights.min(axis=0)
    extreme = np.where(highest > -lowest, highest, lowest)
    if not np.abs(extreme).max(initial=0) <= _LARGEST:
        raise SchemeError(
            f"weights must be finite and within 2**48, got {extreme[np.abs(extreme).argmax()]}; "
            "export without --bits"
        )
    is_zero = np.abs(extreme) < _SMALLEST
    safe = np.where(is_zero, np.float32(1), extreme)
    best_gain = np.full(extreme.shape, -1, np.float32)
    best_scale = np.zeros_like(extreme)
    rounded, product = np.empty_like(weights), np.empty_like(weights)
    for reach in TRIALS[scheme.bits]:
        # The extreme weight goes to the negative end, which has one code more than the positive.
        inverse = (-reach / safe).astype(np.float32)
        _round_to_signed(weights, inverse, scheme, rounded)
        np.multiply(weights, rounded, out=product)
        weight_code = product.sum(axis=0)
        np.multiply(rounded, rounded, out=product)
        code_code = product.sum(axis=0)
        # An all-zero group has no codes but 0; its scale is set to 0 below.
        scale = weight_code / np.maximum(code_code, np.float32(1))
        gain = weight_code * scale
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, scale, where=better)
    best_scale[is_zero] = 0
    scales: Float = best_scale.astype(bfloat16).astype(np.float32)
    return scales


def _round(weights: Float, scales: Float, scheme: Scheme) -> Codes:
    """Codes uint8 [group_size, groups] for weights of the same shape and scales [groups]."""
    # A scale of 0, of an all-zero group, gives the zero code.
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    rounded = np.empty_like(weights)
    _round_to_signed(weights, inverse, scheme, rounded)
    rounded += scheme.zero_point
    return rounded.astype(np.uint8)


def _round_to_signed(weights: Float, inverse: Float, scheme: Scheme, out: Float) -> None:
    np.multiply(weights, inverse, out=out)
    np.rint(out, out=out)
    np.clip(out, -scheme.zero_point, scheme.zero_point - 1, out=out)
