"""Matrices in int8 with one scale for each row: the form that integer products of whole rows want.

The same on a row's activations is what ``exporters/onnx_prefill.py`` has the graph do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.groups import Float, require_within_range

LARGEST_CODE = 127


def quantize_rows(weights: Float) -> tuple[NDArray[np.int8], Float]:
    """Codes int8 [rows, columns] in -127..127 and scales float32 [rows] of float32 weights.

    The largest of a row keeps its value: of 8 bits, outliers of a row need the ends.

    Raises:
        SchemeError: weights that are too large to be weights.
    """
    largest = np.abs(weights).max(axis=1, initial=0)
    require_within_range(weights, largest.max(initial=0))
    scales = (largest / LARGEST_CODE).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(weights * inverse[:, None]).clip(-LARGEST_CODE, LARGEST_CODE)
    return codes.astype(np.int8), scales
