"""A bundle's graph that also gives the likeliest tokens, so that a device keeps the other logits.

The graph alone is read, changed in memory and handed out as bytes; its weights stay on disk.

Outputs that are added, in falling order of the logits of the last row
    candidate_logits  [batch, count]  float32
    candidate_ids     [batch, count]  int64
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qwen2x.exporters.onnx_builder import int64

LOGITS, IDS = "candidate_logits", "candidate_ids"
# A row of logits is searched in pieces: one long TopK keeps a single block of a GPU busy.
_PIECE = 64


def graph_with_candidates(path: Path, vocab_size: int, count: int) -> bytes:
    """The graph as bytes, with the two outputs at the end.

    Args:
        path: ``model.onnx``.
        vocab_size: columns of its logits.
        count: tokens to give, at most ``vocab_size``.
    """
    model = onnx.load_model(path, load_external_data=False)
    search = _Search(model)
    pieces = vocab_size // _PIECE
    row = search.op("Gather", ["logits", search.constant("last", np.array(-1))], axis=1)
    if vocab_size % _PIECE or pieces <= count:
        search.top(row, count, (LOGITS, IDS))
    else:
        search.top_in_pieces(row, pieces, count)
    shape = ("batch", count)
    model.graph.output.extend(
        [
            helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, shape),
            helper.make_tensor_value_info(IDS, TensorProto.INT64, shape),
        ]
    )
    data: bytes = model.SerializeToString()
    return data


class _Search:
    """Writes the nodes behind the logits."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph

    def constant(self, name: str, value: np.ndarray) -> str:
        name = f"/candidates/{name}"
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def op(self, operator: str, inputs: list[str], output: str = "", **attributes: int) -> str:
        place = f"/candidates/{len(self._graph.node)}/{operator}"
        output = output or f"{place}/output_0"
        self._graph.node.append(
            helper.make_node(operator, inputs, [output], name=place, **attributes)
        )
        return output

    def top(self, values: str, count: int, names: tuple[str, str]) -> None:
        """The largest of the last axis and their places, under these names."""
        inputs = [values, self.constant(f"{names[1]}/count", int64(count))]
        place = f"/candidates/{names[1]}/TopK"
        self._graph.node.append(helper.make_node("TopK", inputs, list(names), name=place))

    def top_in_pieces(self, row: str, pieces: int, count: int) -> None:
        """The largest lie in those pieces whose largest are the largest.

        Args:
            row: float32 [batch, vocabulary].
            pieces: that the row falls into.
            count: of the largest; fewer than pieces.
        """
        shape = self.constant("pieces", int64(-1, pieces, _PIECE))
        cut = self.op("Reshape", [row, shape])
        self.top(cut, 1, ("/candidates/best", "/candidates/best_place"))
        flat = self.op("Reshape", ["/candidates/best", self.constant("row", int64(-1, pieces))])
        self.top(flat, count, ("/candidates/chosen_best", "/candidates/chosen"))
        last_axis = self.constant("last_axis", int64(-1))
        indices = self.op("Unsqueeze", ["/candidates/chosen", last_axis])
        cut = self.op("GatherND", [cut, indices], batch_dims=1)
        shape = self.constant("chosen_row", int64(-1, count * _PIECE))
        self.top(self.op("Reshape", [cut, shape]), count, (LOGITS, "/candidates/places"))
        piece = self.constant("piece", np.array(_PIECE))
        which = self.op("Div", ["/candidates/places", piece])
        within = self.op("Mod", ["/candidates/places", piece])
        which = self.op("GatherElements", ["/candidates/chosen", which], axis=1)
        self.op("Add", [self.op("Mul", [which, piece]), within], IDS)
