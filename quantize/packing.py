"""Codes to bytes and back, in the layouts of ONNX Runtime and of MLX.

Both put code 0 into the low bits and go up, so for 4 and 8 bits they are the same byte stream on
little-endian machines; only the array's type and shape differ. MatMulNBits knows no 6 bits: such
codes are two planes there, code = 4 * high + low, of 4 and of 2 bits.

Sources: ``com.microsoft::MatMulNBits`` in onnxruntime 1.31 (B uint8 [N, K/block, block*bits/8], low
nibble first); ``mx.quantize`` in mlx 0.32 (uint32 [rows, columns*bits/32], low bits first).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.scheme import Scheme

Codes = NDArray[np.uint8]


def pack_bytes(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """Bytes uint8 [rows, columns*bits/8] of codes uint8 [rows, columns]."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if bits == 6:
        return _pack_six(codes)
    packed = np.left_shift(codes[:, 1::2], np.uint8(4))
    packed |= codes[:, 0::2]
    return packed


def unpack_bytes(packed: NDArray[np.uint8], bits: int) -> Codes:
    """The inverse of ``pack_bytes``."""
    if bits == 8:
        return packed.copy()
    if bits == 6:
        return _unpack_six(packed)
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2] = packed & 0x0F
    codes[:, 1::2] = packed >> 4
    return codes


def _pack_six(codes: Codes) -> NDArray[np.uint8]:
    """Four codes in three bytes."""
    first, second, third, fourth = (codes[:, index::4] for index in range(4))
    packed = np.empty((len(codes), codes.shape[1] // 4, 3), np.uint8)
    packed[:, :, 0] = first | second << 6
    packed[:, :, 1] = second >> 2 | third << 4
    packed[:, :, 2] = third >> 4 | fourth << 2
    return packed.reshape(len(codes), -1)


def _unpack_six(packed: NDArray[np.uint8]) -> Codes:
    first, second, third = (packed[:, index::3] for index in range(3))
    codes = np.empty((len(packed), first.shape[1], 4), np.uint8)
    codes[:, :, 0] = first & 63
    codes[:, :, 1] = (first >> 6 | second << 2) & 63
    codes[:, :, 2] = (second >> 4 | third << 4) & 63
    codes[:, :, 3] = third >> 2
    return codes.reshape(len(packed), -1)


def pack_planes(codes: Codes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Of codes of 6 bits the upper 4, uint8 [rows, columns/2], and the lower 2, [rows, columns/4].

    Both as MatMulNBits packs them, the first code into the low bits.
    """
    low = codes & np.uint8(3)
    packed = np.zeros((len(codes), codes.shape[1] // 4), np.uint8)
    for index in range(4):
        packed |= np.left_shift(low[:, index::4], np.uint8(2 * index))
    return pack_bytes(np.right_shift(codes, np.uint8(2)), 4), packed


def pack_zero_points(zero_points: Codes, bits: int) -> NDArray[np.uint8]:
    """Bytes uint8 [rows, ceil(groups*bits/8)], each row's last half filled up with 0."""
    padding = zero_points.shape[1] * bits % 8 // bits
    return pack_bytes(np.pad(zero_points, ((0, 0), (0, padding))), bits)


def unpack_zero_points(packed: NDArray[np.uint8], groups: int, bits: int) -> Codes:
    """The inverse of ``pack_zero_points``."""
    return unpack_bytes(packed, bits)[:, :groups]


def zero_points_shape(rows: int, columns: int, scheme: Scheme) -> tuple[int, int]:
    """The shape of MatMulNBits' input zero_points."""
    return rows, -(-(columns // scheme.group_size) * scheme.bits // 8)


def matmul_nbits_shape(
    rows: int, columns: int, scheme: Scheme, bits: int | None = None
) -> tuple[int, int, int]:
    """The shape of MatMulNBits' input B, [rows, groups, bytes per group]; ``bits``: of a plane."""
    return rows, columns // scheme.group_size, scheme.group_size * (bits or scheme.bits) // 8


def pack_mlx_words(codes: Codes, bits: int) -> NDArray[np.uint32]:
    """Words uint32 [rows, columns*bits/32] as ``mx.quantize`` lays them out."""
    return pack_bytes(codes, bits).view("<u4")
