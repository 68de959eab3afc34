"""Tables of cosines and sines for every YaRN factor, and where a call's positions lie in them.

With one factor a table's row is a position. With several, their tables stand one behind the other,
and ``rope_index`` says for each row of a batch which of them its positions mean. The first factor's
table comes last: a runtime that knows only that one and runs past it leaves the table, which is an
error, and does not land among another factor's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from qwen2x.exporters.onnx_builder import GraphBuilder, Shape, int64
from qwen2x.exporters.rope import Rope

B, S = "batch", "sequence"
# 1, or the batch.
ROWS = "rope_rows"
_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64


class RopeTables:
    """Declares ``rope_index`` if there is a choice, and computes tables that the session folds.

    Args:
        graph: to write into.
        ropes: one per factor.
        element_type: of the tables.
        max_context: positions of the largest factor's table; another's ends where its range does.
        is_even: keep the ropes' attention factors out of the tables; queries get their squares
            instead, which gives the same scores and leaves keys the size that they have without.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        ropes: Sequence[Rope],
        element_type: int,
        max_context: int,
        *,
        is_even: bool,
    ) -> None:
        self._graph = graph
        self._ropes = ropes
        self._element_type = element_type
        self._is_even = is_even and len(ropes) > 1
        self._rows = [min(max_context, rope.max_positions) for rope in ropes]
        self._half = ropes[0].head_dim // 2
        self.positions = "position_ids"
        if len(ropes) == 1:
            self.tables = self._tables_of(ropes[0], "/rope", self._rows[0])
            return
        graph.optional_input("rope_index", int64(0), (ROWS,))
        self.positions = self._shifted_positions()
        self.tables = self._stacked()

    def key_rows(self) -> list[str]:
        """Cos and sin [batch, sequence, head_dim/2]; Gather refuses what lies beyond the table."""
        shape: Shape = (B, S, self._half)
        return [
            self._graph.op(
                f"{_place_of(table)}/Gather", [table, self.positions], self._element_type, shape
            )
            for table in self.tables
        ]

    def query_rows(self, key_rows: list[str]) -> list[str]:
        """The same for queries."""
        if not self._is_even:
            return key_rows
        graph, element_type = self._graph, self._element_type
        squares = np.array([rope.attention_factor**2 for rope in self._ropes], np.float32)
        graph.constant("/rope/squares", squares)
        graph.constant("/rope/inner_axes", int64(1, 2))
        inputs = ["/rope/squares", "rope_index"]
        square = graph.op("/rope/square/Gather", inputs, _FLOAT, (ROWS,))
        inputs = [square, "/rope/inner_axes"]
        square = graph.op("/rope/square/Unsqueeze", inputs, _FLOAT, (ROWS, 1, 1))
        if element_type != _FLOAT:
            shape: Shape = (ROWS, 1, 1)
            square = graph.op("/rope/square/Cast", [square], element_type, shape, to=element_type)
        return [
            graph.op(
                f"{_place_of(rows)}/query/Mul", [rows, square], element_type, (B, S, self._half)
            )
            for rows in key_rows
        ]

    def _shifted_positions(self) -> str:
        """Rows of the stacked tables [batch, sequence]: positions behind their table's start."""
        graph = self._graph
        *stretched, _ = np.cumsum([0, *self._rows[1:]])
        graph.constant("/rope/starts", int64(sum(self._rows[1:]), *stretched))
        graph.constant("/rope/last_axis", int64(1))
        start = graph.op("/rope/start/Gather", ["/rope/starts", "rope_index"], _INT64, (ROWS,))
        inputs = [start, "/rope/last_axis"]
        start = graph.op("/rope/start/Unsqueeze", inputs, _INT64, (ROWS, 1))
        return graph.op("/rope/positions/Add", ["position_ids", start], _INT64, (B, S))

    def _stacked(self) -> tuple[str, str]:
        """Each table is made apart, so that the first is, bit for bit, that of a single factor."""
        parts = [
            self._tables_of(rope, f"/rope/{index}", rows)
            for index, (rope, rows) in enumerate(zip(self._ropes, self._rows, strict=True))
        ]
        first, *others = parts
        shape: Shape = (sum(self._rows), self._half)
        cos, sin = (
            self._graph.op(f"/rope/{wave}/Concat", list(names), self._element_type, shape, axis=0)
            for wave, names in zip(("cos", "sin"), zip(*others, first, strict=True), strict=True)
        )
        return cos, sin

    def _tables_of(self, rope: Rope, place: str, rows: int) -> tuple[str, str]:
        """Cos and sin [rows, head_dim/2], from small constants."""
        graph = self._graph
        graph.constant("/rope/start", np.array(0, np.int64))
        graph.constant(f"{place}/rows", np.array(rows, np.int64))
        graph.constant("/rope/step", np.array(1, np.int64))
        graph.constant("/rope/last_axis", int64(1))
        graph.constant(f"{place}/inv_freq", rope.inverse_frequencies()[None, :])
        limits = ["/rope/start", f"{place}/rows", "/rope/step"]
        x = graph.op(f"{place}/Range", limits, _INT64, (rows,))
        x = graph.op(f"{place}/Cast", [x], _FLOAT, (rows,), to=_FLOAT)
        x = graph.op(f"{place}/Unsqueeze", [x, "/rope/last_axis"], _FLOAT, (rows, 1))
        shape: Shape = (rows, self._half)
        angles = graph.op(f"{place}/Mul", [x, f"{place}/inv_freq"], _FLOAT, shape)
        factor = 1.0 if self._is_even else rope.attention_factor
        cos, sin = (self._wave(place, name, angles, shape, factor) for name in ("Cos", "Sin"))
        return cos, sin

    def _wave(self, place: str, function: str, angles: str, shape: Shape, factor: float) -> str:
        """The function of all angles times YaRN's attention factor, in the cache's float type."""
        graph, element_type = self._graph, self._element_type
        inner = f"{place}/{function.lower()}"
        table = graph.op(f"{inner}/{function}", [angles], _FLOAT, shape)
        if factor != 1:
            name = graph.constant(f"{place}/attention_factor", np.array(factor, np.float32))
            table = graph.op(f"{inner}/Mul", [table, name], _FLOAT, shape)
        if element_type != _FLOAT:
            table = graph.op(f"{inner}/Cast", [table], element_type, shape, to=element_type)
        return table


def _place_of(value: str) -> str:
    """Where the node stands that makes a value."""
    return value.rsplit("/", 2)[0]
