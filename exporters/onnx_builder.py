"""A small hand for writing an ONNX graph node by node, with the shape of every value on record."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from qwen2x.exporters.weights import Region

Dimension = int | str
Shape = tuple[Dimension, ...]
MICROSOFT = "com.microsoft"
IR_VERSION = 11


class GraphBuilder:
    """Collects nodes, values and initializers of one graph."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._values: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, element_type: int, shape: Shape) -> str:
        """Declares a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def output(self, name: str, element_type: int, shape: Shape) -> str:
        """Declares a graph output; a node must write it with ``op(..., name_output=name)``."""
        self._outputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def optional_input(self, name: str, default: NDArray[Any], shape: Shape) -> str:
        """An input that other runtimes do not see, since an initializer of its name exists."""
        tensor = numpy_helper.from_array(default, name)
        self._initializers[name] = tensor
        return self.input(name, tensor.data_type, shape)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A small initializer inside the graph file."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def external(self, name: str, region: Region, shape: tuple[int, ...] | None = None) -> str:
        """An initializer whose bytes lie in a data file, under a shape of its own if given."""
        if name not in self._initializers:
            tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(region.dtype))
            tensor.dims.extend(shape or region.shape)
            tensor.data_location = TensorProto.EXTERNAL
            entries = {"location": region.file, "offset": region.offset, "length": region.bytes}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
        return name

    def op(
        self,
        name: str,
        inputs: list[str],
        element_type: int,
        shape: Shape,
        *,
        domain: str = "",
        name_output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node with one output. The operator is the last part of the node's name.

        The type and shape are recorded for readers and for shape inference.
        """
        output = name_output or f"{name}/output_0"
        self.node(name, inputs, [output], domain=domain, **attributes)
        if name_output is None:
            self.value(output, element_type, shape)
        return output

    def node(
        self,
        name: str,
        inputs: list[str],
        outputs: list[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Adds a node with any outputs; ``value`` records their shapes."""
        operator = name.rsplit("/", 1)[-1]
        self._nodes.append(
            helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes)
        )

    def value(self, name: str, element_type: int, shape: Shape) -> str:
        """Records type and shape of an intermediate value."""
        self._values.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def model(self, *, opset: int, description: str) -> ModelProto:
        """The finished model."""
        graph: GraphProto = helper.make_graph(
            self._nodes,
            "qwen2",
            self._inputs,
            self._outputs,
            initializer=list(self._initializers.values()),
            value_info=self._values,
            doc_string=description,
        )
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qwen2x"
        )


def int64(*values: int) -> NDArray[np.int64]:
    """A one-dimensional int64 array."""
    return np.array(values, np.int64)


def place_of(module: str) -> str:
    """Where a module's nodes stand: model.layers.3.mlp becomes /model/layers.3/mlp."""
    return "/" + re.sub(r"\.(?!\d)", "/", module)
