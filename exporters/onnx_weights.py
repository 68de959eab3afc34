"""Where every weight of a graph will lie in ``model.onnx_data``, decided before a byte is read.

Exact shapes of codes and scales follow from the config, so offsets are known at once: the graph
can be written first and the weights streamed afterwards, in any order, row chunk by row chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from qwen2x.exporters.onnx_target import NUMPY_TYPES
from qwen2x.quantize.packing import matmul_nbits_shape
from qwen2x.quantize.scheme import Scheme

DATA_FILE = "model.onnx_data"
ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True)
class Region:
    """A byte range of the data file that one or more initializers name."""

    element_type: int
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.item_bytes

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return int(np.dtype(NUMPY_TYPES[self.element_type]).itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.bytes // self.shape[0]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A vector or matrix: rows of checkpoint tensors one below the other, float or quantized.

    Attributes:
        name: initializer name; quantized ones add ``_codes`` and ``_scales``.
        sources: (checkpoint name, rows) in order.
        columns: input dimension; 1 for vectors.
        values: where the floats, or the packed codes, lie.
        scales: where the scales lie; with ``scheme`` only.
    """

    name: str
    sources: tuple[tuple[str, int], ...]
    columns: int
    values: Region
    scheme: Scheme | None = None
    scales: Region | None = None

    @property
    def rows(self) -> int:
        """Output dimension."""
        return sum(rows for _, rows in self.sources)

    @property
    def bytes(self) -> int:
        """Stored bytes, scales included."""
        return self.values.bytes + (self.scales.bytes if self.scales else 0)


@dataclass
class WeightLayout:
    """Hands out regions of the data file in order of asking."""

    end: int = 0
    weights: list[Weight] = field(default_factory=list)

    def vector(self, name: str, sources: list[tuple[str, int]], element_type: int) -> Weight:
        """A norm weight or a bias, stored in a float type."""
        rows = sum(count for _, count in sources)
        region = self._region(element_type, (rows,))
        return self._add(Weight(name=name, sources=tuple(sources), columns=1, values=region))

    def matrix(
        self,
        name: str,
        sources: list[tuple[str, int]],
        columns: int,
        element_type: int,
        scheme: Scheme | None,
    ) -> Weight:
        """A matrix [rows, columns] in a float type, or as codes with scales of that type.

        Raises:
            SchemeError: the group size does not divide the columns.
        """
        rows = sum(count for _, count in sources)
        if scheme is None:
            values = self._region(element_type, (rows, columns))
            return self._add(
                Weight(name=name, sources=tuple(sources), columns=columns, values=values)
            )
        scheme.require_divides(columns, sources[0][0].removesuffix(".weight"))
        shape = matmul_nbits_shape(rows, columns, scheme)
        return self._add(
            Weight(
                name=name,
                sources=tuple(sources),
                columns=columns,
                values=self._region(TensorProto.UINT8, shape),
                scheme=scheme,
                scales=self._region(element_type, shape[:2]),
            )
        )

    def _add(self, weight: Weight) -> Weight:
        self.weights.append(weight)
        return weight

    def _region(self, element_type: int, shape: tuple[int, ...]) -> Region:
        start = -(-self.end // ALIGNMENT) * ALIGNMENT
        region = Region(element_type=element_type, shape=shape, offset=start)
        self.end = start + region.bytes
        return region
