"""A bundle's graph changed to look into it: layers as outputs, or one rotary table alone.

The graph alone is read, changed in memory and handed out as bytes; its weights stay on disk. And a
graph of its own, which looks into the processor.
"""

from __future__ import annotations

import re
from operator import itemgetter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

from qwen2x.quantize.errors import BundleError

# What the first layer takes, and the sum that each later norm takes, by the names of onnx_graph.
_EMBEDDED = re.compile(r"/model/embed_tokens/(Gather|GatherBlockQuantized)/output_0")
_SUM = re.compile(
    r"/model/(?:layers\.(\d+)/input_layernorm|norm)"
    r"/(?:SkipSimplifiedLayerNormalization/output_3|Add/output_0)"
)


# Of codes of 8 bits in activations, and of int8 weights.
LARGEST_CODE, LARGEST_WEIGHT = 255, 127


def largest_sums(rows: int, columns: int) -> bytes:
    """A graph that multiplies uint8 codes [rows, columns] by the largest weights, in int32."""
    weights = np.full((columns, rows), LARGEST_WEIGHT, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["codes", "weights"], ["sums"])],
        "sums",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, [rows, columns])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [rows, rows])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def plain_graph(path: Path) -> bytes:
    """The graph with its first rotary table alone, as if there were no YaRN factor to choose.

    Nodes that nothing needs any more are left to the session.
    """
    model = onnx.load_model(path, load_external_data=False)
    plain = {"/rope/positions/Add/output_0": "position_ids"}
    for node in model.graph.node:
        if node.name in ("/rope/cos/Concat", "/rope/sin/Concat"):
            plain[node.output[0]] = node.input[-1]
        elif node.name.endswith("/query/Mul"):
            plain[node.output[0]] = node.input[0]
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = plain.get(name, name)
    return bytes(model.SerializeToString())


def probed_graph(path: Path, layers: int) -> tuple[bytes, list[str]]:
    """The graph as bytes, and the outputs [batch, sequence, hidden] in order.

    The first is the embedding, the others are the residual stream after layer 0, 1, ... The last
    layer has only the rows whose logits are kept.

    Args:
        path: ``model.onnx``.
        layers: how many there are.

    Raises:
        BundleError: the graph does not have them.
    """
    model = onnx.load_model(path, load_external_data=False)
    found: list[tuple[int, ValueInfoProto]] = []
    for value in model.graph.value_info:
        if _EMBEDDED.fullmatch(value.name):
            found.append((0, value))
        elif match := _SUM.fullmatch(value.name):
            found.append((int(match[1] or layers), value))
    found.sort(key=itemgetter(0))
    if [index for index, _ in found] != list(range(layers + 1)):
        raise BundleError(
            f"{path} names no residual stream for {layers} layers; export the bundle again"
        )
    outputs = [value for _, value in found]
    model.graph.output.extend(outputs)
    return model.SerializeToString(), [value.name for value in outputs]
