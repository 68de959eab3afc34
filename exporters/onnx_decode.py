"""A bundle's graph that can attend by matrix products where each row has one new token.

GroupQueryAttention on the CPU reads the cache once for every query head. The query heads of one key
head are rows of one product: queries times keys, a softmax, times values, and the cache is read
once. That is faster behind a thousand positions and more (docs/performance.md); for shorter
caches, and for several new tokens, the one operator is better. So each layer's becomes an ``If``.

The graph alone is read, changed in memory and handed out as bytes; its weights stay on disk.

Input that is added
    attend_by_products  bool, scalar; false unless given. True asks that each row has one new token,
                        and that past keys and values are buffers with room for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qwen2x.exporters.onnx_builder import MICROSOFT, int64

ATTEND_BY_PRODUCTS = "attend_by_products"
_OPERATOR = "GroupQueryAttention"


def graph_with_products(path: Path) -> bytes | None:
    """The graph as bytes with the input above; None where its attention is another.

    So it is where the file is damaged, which is for the session to say.

    Args:
        path: ``model.onnx``.
    """
    try:
        model = onnx.load_model(path, load_external_data=False)
    except DecodeError:
        return None
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    nodes = list(graph.node)
    first = next((node for node in nodes if node.op_type == _OPERATOR), None)
    if first is None or not _is_plain(first, types):
        return None
    choice = numpy_helper.from_array(np.array(False), ATTEND_BY_PRODUCTS)
    graph.initializer.append(choice)
    graph.input.append(helper.make_tensor_value_info(ATTEND_BY_PRODUCTS, TensorProto.BOOL, ()))
    before = _Once(graph, first)
    del graph.node[:]
    is_placed = False
    for node in nodes:
        if node.op_type == _OPERATOR:
            if not is_placed:
                graph.node.extend(before.nodes)
                is_placed = True
            node = _as_choice(node, before)
        graph.node.append(node)
    data: bytes = model.SerializeToString()
    return data


def _is_plain(node: onnx.NodeProto, types: Mapping[str, int]) -> bool:
    """Whether an operator rotates packed float32 queries, keys and values, without codes."""
    rotates = any(each.name == "do_rotary" and each.i for each in node.attribute)
    is_packed = not node.input[1] and not node.input[2]
    return rotates and is_packed and types[node.input[3]] == TensorProto.FLOAT


class _Nodes:
    """Writes nodes below one place."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.nodes: list[onnx.NodeProto] = []

    def op(
        self, name: str, inputs: list[str], output: str = "", *, domain: str = "", **options: Any
    ) -> str:
        """One node with one output. The operator is the last part of its name."""
        return self.several(name, inputs, 1, [output] if output else None, domain, **options)[0]

    def several(
        self,
        name: str,
        inputs: list[str],
        count: int,
        outputs: list[str] | None = None,
        domain: str = "",
        **options: Any,
    ) -> list[str]:
        """One node with so many outputs."""
        place = f"{self.place}/{name}"
        outputs = outputs or [f"{place}/output_{index}" for index in range(count)]
        operator = name.rsplit("/", 1)[-1]
        node = helper.make_node(operator, inputs, outputs, name=place, domain=domain, **options)
        self.nodes.append(node)
        return outputs


class _Once(_Nodes):
    """What all layers share: constants, the mask, and where new keys and values go.

    Letters: B batch, N query heads, K key heads, D head size, T positions of the buffers.

    Attributes:
        mask: float32 [B, 1, 1, T], 0 up to the new token and -inf behind it.
        places: int64 [B, K, 1, D], the new token's position.
        scale: of scores.
    """

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        super().__init__("/decode")
        self._graph = graph
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
        self.size = int(shapes[node.input[3]][3].dim_value)
        self.heads, self.key_heads = attributes["num_heads"], attributes["kv_num_heads"]
        self.scale = attributes["scale"]
        past, last = node.input[3], node.input[5]
        self.mask = self._mask(past, last)
        self.places = self._places(last)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initializer of all layers."""
        name = f"/decode/{name}"
        if name not in {each.name for each in self._graph.initializer}:
            self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _mask(self, past: str, last: str) -> str:
        shape = self.op("positions/Shape", [past])
        third = self.constant("third", np.array(2))
        count = self.op("positions/Gather", [shape, third])
        count = self.op("positions/Cast", [count], to=TensorProto.INT32)
        limits = [self.constant("zero", np.array(0, np.int32)), count]
        one = self.constant("one", np.array(1, np.int32))
        keys = self.op("positions/Range", [*limits, one])
        axes = self.constant("inner_axes", int64(1, 2, 3))
        last = self.op("last/Unsqueeze", [last, axes])
        is_there = self.op("mask/LessOrEqual", [keys, last])
        values = [
            self.constant("seen", np.array(0, np.float32)),
            self.constant("unseen", np.array(-np.inf, np.float32)),
        ]
        return self.op("mask/Where", [is_there, *values])

    def _places(self, last: str) -> str:
        batch = self.op("batch/Shape", [last])
        rest = self.constant("new_shape", int64(self.key_heads, 1, self.size))
        shape = self.op("places/Concat", [batch, rest], axis=0)
        wide = self.op(
            "places/Cast", [f"{self.place}/last/Unsqueeze/output_0"], to=TensorProto.INT64
        )
        return self.op("places/Expand", [wide, shape])


@dataclass(frozen=True)
class _Wanted:
    """Names of the outputs of one branch."""

    attended: str
    key: str
    value: str

    @classmethod
    def of(cls, place: str) -> _Wanted:
        return cls(*(f"{place}/{name}" for name in ("attended", "key", "value")))

    @property
    def names(self) -> list[str]:
        return [self.attended, self.key, self.value]


def _as_choice(node: onnx.NodeProto, once: _Once) -> onnx.NodeProto:
    """The operator, or products."""
    place = node.name.rsplit("/", 1)[0]
    outputs = list(node.output)
    whole, parts = _Wanted.of(f"{place}/whole"), _Wanted.of(f"{place}/products")
    del node.output[:]
    node.output.extend(whole.names)
    return helper.make_node(
        "If",
        [ATTEND_BY_PRODUCTS],
        outputs,
        name=f"{place}/If",
        then_branch=_branch("products", _products(node, once, place, parts), parts),
        else_branch=_branch("whole", [node], whole),
    )


def _branch(name: str, nodes: list[onnx.NodeProto], wanted: _Wanted) -> onnx.GraphProto:
    outputs = [
        helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in wanted.names
    ]
    return helper.make_graph(nodes, name, [], outputs)


def _products(
    node: onnx.NodeProto, once: _Once, place: str, wanted: _Wanted
) -> list[onnx.NodeProto]:
    """Attention of one new token in each row."""
    packed, past_key, past_value = node.input[0], node.input[3], node.input[4]
    cos, sin, positions = node.input[7:10]
    heads, key_heads, size = once.heads, once.key_heads, once.size
    write = _Nodes(place)
    shape = once.constant("packed_shape", int64(0, heads + 2 * key_heads, 1, size))
    cut = once.constant("cut", int64(heads + key_heads, key_heads))
    cut_rotated = once.constant("cut_rotated", int64(heads, key_heads))
    queries_shape = once.constant("queries_shape", int64(0, key_heads, heads // key_heads, size))
    output_shape = once.constant("output_shape", int64(0, 1, heads * size))
    every = write.op("split/Reshape", [packed, shape])
    turning, value = write.several("split/Split", [every, cut], 2, axis=1)
    turned = write.op(
        "rotate/RotaryEmbedding", [turning, positions, cos, sin], domain=MICROSOFT, interleaved=0
    )
    query, key = write.several("rotate/Split", [turned, cut_rotated], 2, axis=1)
    query = write.op("query/Reshape", [query, queries_shape])
    for name, past, new, output in (
        ("key", past_key, key, wanted.key),
        ("value", past_value, value, wanted.value),
    ):
        write.op(f"{name}/ScatterElements", [past, once.places, new], output, axis=2)
    scores = write.op(
        "scores/FusedMatMul",
        [query, wanted.key],
        domain=MICROSOFT,
        transB=1,
        alpha=once.scale,
    )
    scores = write.op("scores/Add", [scores, once.mask])
    weights = write.op("scores/Softmax", [scores], axis=-1)
    attended = write.op("attended/MatMul", [weights, wanted.value])
    write.op("attended/Reshape", [attended, output_shape], wanted.attended)
    return write.nodes
