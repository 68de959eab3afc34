"""Weights as a target lays them out on disk, decided before a byte of them is read.

Exact shapes of codes and scales follow from the config, so offsets are known at once: a graph or a
header can be written first and the weights streamed afterwards, in any order, by chunks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from qwen2x.quantize.scheme import Scheme

FLOAT_TYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(bfloat16),
}


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of weights and its size in bytes; ``head`` are the bytes that it begins with."""

    name: str
    size: int
    head: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Region:
    """An array's place: byte offset in a data file. The bytes are little-endian, rows in order."""

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.bytes // self.shape[0]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A vector or matrix: rows of checkpoint tensors one below the other, float or quantized.

    Attributes:
        name: unique in its layout.
        sources: (checkpoint name, rows) in order.
        columns: input dimension; 1 for vectors.
        values: where the floats, the packed codes (of planes the upper 4 bits), or int8 with a
            scale for each row, lie.
        low_values: where the lower 2 bits lie, for targets that store codes of 6 bits in planes.
        scales: where the scales lie; with ``scheme`` those of its groups, without it of rows.
        biases: where minus zero point times scale lies, for targets that store it.
        zero_points: where they lie packed, for targets that store them and groups that have them.
    """

    name: str
    sources: tuple[tuple[str, int], ...]
    columns: int
    values: Region
    scheme: Scheme | None = None
    scales: Region | None = None
    biases: Region | None = None
    zero_points: Region | None = None
    low_values: Region | None = None

    @property
    def rows(self) -> int:
        """Output dimension."""
        return sum(rows for _, rows in self.sources)

    @property
    def bytes(self) -> int:
        """Stored bytes, scales included."""
        regions = (self.values, self.low_values, self.scales, self.biases, self.zero_points)
        return sum(region.bytes for region in regions if region is not None)


def bits_per_weight(weights: Sequence[Weight]) -> float:
    """Every stored byte of the matrices over their parameters."""
    matrices = [weight for weight in weights if weight.columns > 1]
    parameters = sum(weight.rows * weight.columns for weight in matrices)
    return 8 * sum(weight.bytes for weight in matrices) / parameters


# Which part of a model a weight belongs to, by a piece of its name; the first that fits.
_KINDS = (
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("norm", "norms"),
    (".bias", "biases"),
    ("self_attn", "attention"),
    ("mlp", "mlp"),
)


def kind_of(name: str) -> str:
    """``embedding``, ``head``, ``norms``, ``biases``, ``attention`` or ``mlp``."""
    return next(kind for piece, kind in _KINDS if piece in name)


def by_kind(weights: Sequence[Weight]) -> dict[str, dict[str, float]]:
    """Parameters, bytes and bits per weight of each part."""
    parts: dict[str, dict[str, float]] = {}
    for weight in weights:
        part = parts.setdefault(kind_of(weight.name), {"parameters": 0, "bytes": 0})
        part["parameters"] += weight.rows * weight.columns
        part["bytes"] += weight.bytes
        part["bits_per_weight"] = round(8 * part["bytes"] / part["parameters"], 4)
    return parts
