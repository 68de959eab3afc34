"""Where every weight of a graph will lie: in ``model.onnx_data``, or in ``prefill.onnx_data``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto

from qwen2x.exporters.bundle import PREFILL_DATA_FILE
from qwen2x.exporters.onnx_target import NUMPY_TYPES
from qwen2x.exporters.weights import FLOAT_TYPES, DataFile, Region, Weight
from qwen2x.quantize.packing import matmul_nbits_shape, zero_points_shape
from qwen2x.quantize.scheme import Scheme

DATA_FILE = "model.onnx_data"
ALIGNMENT = 4096
# Bits of codes that are stored as a plane of 4 and one of 2, which MatMulNBits knows.
_PLANES = 6


@dataclass
class WeightLayout:
    """Hands out regions of the data file in order of asking."""

    file: str = DATA_FILE
    end: int = 0
    weights: list[Weight] = field(default_factory=list)

    @property
    def files(self) -> list[DataFile]:
        """The data file."""
        return [DataFile(name=self.file, size=self.end)]

    def vector(self, name: str, sources: list[tuple[str, int]], element_type: int) -> Weight:
        """A norm weight or a bias, stored in a float type."""
        rows = sum(count for _, count in sources)
        region = self._region(NUMPY_TYPES[element_type], (rows,))
        return self._add(Weight(name=name, sources=tuple(sources), columns=1, values=region))

    def matrix(
        self,
        name: str,
        sources: list[tuple[str, int]],
        columns: int,
        element_type: int,
        scheme: Scheme | None,
    ) -> Weight:
        """A matrix [rows, columns] in a float type, or as codes with scales.

        Scales are stored in their scheme's type where the float type is wider.

        Raises:
            SchemeError: the group size does not divide the columns.
        """
        rows = sum(count for _, count in sources)
        float_type = NUMPY_TYPES[element_type]
        if scheme is None:
            values = self._region(float_type, (rows, columns))
            return self._add(
                Weight(name=name, sources=tuple(sources), columns=columns, values=values)
            )
        scheme.require_divides(columns, sources[0][0].removesuffix(".weight"))
        has_planes = scheme.bits == _PLANES
        shape = matmul_nbits_shape(rows, columns, scheme, 4 if has_planes else None)
        is_wide = element_type == TensorProto.FLOAT
        scale_type = FLOAT_TYPES[scheme.scale_type] if is_wide else float_type
        return self._add(
            Weight(
                name=name,
                sources=tuple(sources),
                columns=columns,
                values=self._region(np.uint8, shape),
                low_values=(
                    self._region(np.uint8, matmul_nbits_shape(rows, columns, scheme, 2))
                    if has_planes
                    else None
                ),
                scheme=scheme,
                scales=self._region(scale_type, shape[:2]),
                zero_points=self._zero_points(rows, columns, scheme),
            )
        )

    def _zero_points(self, rows: int, columns: int, scheme: Scheme) -> Region | None:
        if scheme.is_symmetric:
            return None
        return self._region(np.uint8, zero_points_shape(rows, columns, scheme))

    def _add(self, weight: Weight) -> Weight:
        self.weights.append(weight)
        return weight

    def _region(self, dtype: Any, shape: tuple[int, ...]) -> Region:
        start = -(-self.end // ALIGNMENT) * ALIGNMENT
        region = Region(file=self.file, dtype=np.dtype(dtype), shape=shape, offset=start)
        self.end = start + region.bytes
        return region


@dataclass
class PrefillLayout(WeightLayout):
    """Layers' matrices as int8 with a scale for each row; all else lies where ``shared`` has it."""

    file: str = PREFILL_DATA_FILE
    shared: WeightLayout = field(default_factory=WeightLayout)

    def vector(self, name: str, sources: list[tuple[str, int]], element_type: int) -> Weight:
        """See ``WeightLayout``: the one that is there."""
        return self._shared(name)

    def matrix(
        self,
        name: str,
        sources: list[tuple[str, int]],
        columns: int,
        element_type: int,
        scheme: Scheme | None,
    ) -> Weight:
        """See ``WeightLayout``: the embedding that is there."""
        return self._shared(name)

    def int8_rows(self, name: str, sources: list[tuple[str, int]], columns: int) -> Weight:
        """A matrix [rows, columns] in int8, with scales float32 [rows]."""
        rows = sum(count for _, count in sources)
        return self._add(
            Weight(
                name=name,
                sources=tuple(sources),
                columns=columns,
                values=self._region(np.int8, (rows, columns)),
                scales=self._region(np.float32, (rows,)),
            )
        )

    def _shared(self, name: str) -> Weight:
        return next(weight for weight in self.shared.weights if weight.name == name)
