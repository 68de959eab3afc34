"""Attention of many new tokens behind a short cache: all scores of a head at once.

GroupQueryAttention on the CPU attends in tiles where there are several new tokens, so that memory
does not grow with the cache. Where the cache is short, that takes longer than all scores of a head
at once (docs/performance.md), which the operator still computes where heads have a sink. A sink
that weighs nothing leaves every number as it is, but for the order of sums.

Operator: GroupQueryAttention of ``docs/ContribOperators.md`` of onnxruntime 1.32, whose kernel for
float32 attends in tiles since 1.29, but not with ``head_sink``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from qwen2x.exporters.onnx_builder import MICROSOFT, GraphBuilder

# Positions, the new ones among them, up to which it is faster.
LONGEST = 1536
# Scores that are in memory together at most: 64 MiB.
_MOST_SCORES = 1 << 24
_SINK_INPUT = 11
# Of a softmax, nothing.
_NO_WEIGHT = -1e30


class ShortAttention:
    """Writes the operator in both ways, between which the lengths of a run choose."""

    def __init__(self, graph: GraphBuilder, heads: int, *, past: str, total: str) -> None:
        """Writes the choice.

        Args:
            graph: to write to.
            heads: of queries.
            past: any past keys [batch, key heads, positions, head size].
            total: positions with the new ones, int32 scalar.
        """
        self._graph = graph
        self._sink = graph.constant("/short/sink", np.full(heads, _NO_WEIGHT, np.float32))
        whole, flag = TensorProto.INT64, TensorProto.BOOL
        third = graph.constant("/short/third", np.array(2))
        capacity = graph.op("/short/Shape", [past], whole, (4,))
        capacity = graph.op("/short/Gather", [capacity, third], whole, ())
        rows = graph.op("/short/Size", ["input_ids"], whole, ())
        scores = graph.op("/short/Mul", [capacity, rows], whole, ())
        most = graph.constant("/short/most", np.array(_MOST_SCORES // heads))
        is_small = graph.op("/short/scores/LessOrEqual", [scores, most], flag, ())
        longest = graph.constant("/short/longest", np.array(LONGEST, np.int32))
        is_near = graph.op("/short/LessOrEqual", [total, longest], flag, ())
        self._is_short = graph.op("/short/And", [is_small, is_near], flag, ())

    def write(self, place: str, inputs: list[str], outputs: list[str], **options: Any) -> None:
        """One layer's operator, with the inputs and attributes that it has in tiles."""
        padding = [""] * (_SINK_INPUT - len(inputs))
        ways = {"tiles": inputs, "whole": [*inputs, *padding, self._sink]}
        tiles, whole = (
            _branch(f"{place}/{way}", its_inputs, len(outputs), options)
            for way, its_inputs in ways.items()
        )
        self._graph.node(
            f"{place}/If", [self._is_short], outputs, then_branch=whole, else_branch=tiles
        )


def _branch(place: str, inputs: list[str], count: int, options: dict[str, Any]) -> onnx.GraphProto:
    node = f"{place}/GroupQueryAttention"
    outputs = [f"{node}/output_{index}" for index in range(count)]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    operator = helper.make_node(
        "GroupQueryAttention", inputs, outputs, name=node, domain=MICROSOFT, **options
    )
    return helper.make_graph([operator], place.rsplit("/", 1)[-1], [], infos)
