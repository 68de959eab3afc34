"""Codes out of the 32-bit words of GPTQ and AWQ checkpoints, whose matrices are [inputs, outputs].

A word holds 32 / bits codes. GPTQ packs a matrix along its inputs and zero points along the
outputs, low bits first; AWQ packs both along the outputs, in an order of its own.

Sources: ``QuantLinear.pack`` in AutoGPTQ 0.7.1 (``nn_modules/qlinear/qlinear_cuda_old.py``),
``WQLinear_GEMM.from_linear`` in AutoAWQ 0.2.9 (``awq/modules/linear/gemm.py``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.packing import unpack_bytes

Codes = NDArray[np.uint8]
Words = NDArray[np.int32]

# The output whose code lies in each place of an AWQ word, low bits first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES = np.argsort(AWQ_ORDER)


def unpack_inputs(words: Words, bits: int) -> Codes:
    """Codes uint8 [outputs, inputs] of words [inputs*bits/32, outputs]."""
    # Turned around, the words are the bytes that pack_bytes writes.
    return unpack_bytes(_bytes(words.T), bits)


def unpack_outputs(words: Words, bits: int) -> Codes:
    """Codes uint8 [outputs, n] of words [n, outputs*bits/32]; n are inputs or groups."""
    return np.ascontiguousarray(unpack_bytes(_bytes(words), bits).T)


def unpack_awq(words: Words) -> Codes:
    """Codes uint8 [outputs, n] of 4 bits, of words [n, outputs/8] in AWQ's order."""
    placed = unpack_outputs(words, 4)
    outputs, n = placed.shape
    by_word = placed.reshape(outputs // len(AWQ_ORDER), len(AWQ_ORDER), n)
    return by_word[:, _AWQ_PLACES].reshape(outputs, n)


def _bytes(words: Words) -> Codes:
    """Uint8 [rows, 4 * columns], whatever the order of bytes here."""
    return np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
