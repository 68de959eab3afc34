"""A second graph that reads prompts: integer products of whole rows, and the cache as its outputs.

Its inputs are those of ``onnx_graph`` but ``num_logits_to_keep``. There is no head, and of the last
layer nothing but keys and values: the prompt's last token is left to the other graph, which gives
its logits.

Products of int8 are several times as fast as MatMulNBits where there are many rows, but they want
one scale for a row of weights, and one for a row of activations. The latter alone would lose much,
since a few columns of Qwen2's activations are far larger than the others. So a row x is taken in
two parts, ``largest / 127 * (first + second / 254)`` with codes of 8 bits in both: what the first
leaves over is rounded once more, as finely again. Rows do not depend on each other.

Where the other graph has a matrix in 4 bits, which loses far more by those, the first part alone is
taken; but for down_proj, whose inputs have the largest outliers.

Operators: MatMulIntegerToFloat of ``docs/ContribOperators.md`` of onnxruntime 1.32.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto

from qwen2x.exporters.onnx_builder import MICROSOFT, Shape, int64
from qwen2x.exporters.onnx_graph import Decoder, Recipe
from qwen2x.exporters.onnx_weights import PrefillLayout, WeightLayout
from qwen2x.exporters.weights import Weight
from qwen2x.quantize.rows import LARGEST_CODE

_FLOAT, _CODE = TensorProto.FLOAT, TensorProto.UINT8
# The code that stands for 0 in activations.
_ZERO = 128
# Of the two parts of a row whose largest number is 1. Half the first step is 127 of the second.
_STEPS = {"first": 1 / LARGEST_CODE, "second": 1 / LARGEST_CODE / (2 * LARGEST_CODE)}
_COARSE_BITS, _WITH_OUTLIERS = 4, "down_proj"
# What a row of zeros is divided by.
_LEAST = 1e-30


def build_prefill_graph(recipe: Recipe, shared: WeightLayout) -> tuple[ModelProto, PrefillLayout]:
    """The model, and the weights that it adds to those of the other graph."""
    layout = PrefillLayout(shared=shared)
    decoder = _PrefillDecoder(recipe, layout)
    decoder.build()
    description = "Qwen2 decoder that fills the cache, by products of int8"
    return decoder.graph.model(opset=recipe.target.opset, description=description), layout


class _PrefillDecoder(Decoder):
    """See ``Decoder``; the layers' matrices are int8."""

    layout: PrefillLayout

    def __init__(self, recipe: Recipe, layout: PrefillLayout) -> None:
        super().__init__(recipe, layout)
        # By name of a weight, the parts that its activations are taken in.
        self._parts: dict[str, tuple[str, ...]] = {}

    def build(self) -> None:
        last = self.config.num_hidden_layers - 1
        normed, residual = self._begin(self._table("model.embed_tokens"))
        for layer in range(last):
            normed, residual = self._layer(layer, normed, residual)
        self._attend(last, normed)

    def _declare_logits(self) -> None:
        """There are none."""

    def _place_matrix(self, unit: str, sources: list[tuple[str, int]], columns: int) -> Weight:
        weight = self.layout.int8_rows(f"{unit}.int8", sources, columns)
        scheme = self.recipe.bit_plan.scheme_of(unit)
        is_coarse = scheme is not None and scheme.bits <= _COARSE_BITS
        is_simple = is_coarse and not unit.endswith(_WITH_OUTLIERS)
        self._parts[weight.name] = tuple(_STEPS)[: 1 if is_simple else 2]
        return weight

    def _linear(self, place: str, x: str, weight: Weight, leading: Shape, bias: str = "") -> str:
        graph, shape = self.graph, (*leading, weight.rows)
        largest = self._largest(place, x, weight.columns, leading)
        x = graph.op(f"{place}/Div", [x, largest], _FLOAT, (*leading, weight.columns))
        products = []
        parts = self._parts[weight.name]
        for part in parts:
            inputs = [self._step(part), self._zero()]
            at = f"{place}/{part}"
            columns: Shape = (*leading, weight.columns)
            codes = graph.op(f"{at}/QuantizeLinear", [x, *inputs], _CODE, columns)
            products.append(self._product(at, codes, weight, shape, part))
            if part != parts[-1]:
                taken = graph.op(f"{at}/DequantizeLinear", [codes, *inputs], _FLOAT, columns)
                x = graph.op(f"{at}/Sub", [x, taken], _FLOAT, columns)
        total = products[0]
        if len(products) > 1:
            total = graph.op(f"{place}/Add", products, _FLOAT, shape)
        total = graph.op(f"{place}/Mul", [total, largest], _FLOAT, shape)
        return graph.op(f"{place}/bias/Add", [total, bias], _FLOAT, shape) if bias else total

    def _largest(self, place: str, x: str, columns: int, leading: Shape) -> str:
        """Of each row [..., 1], by size."""
        graph = self.graph
        sizes = graph.op(f"{place}/Abs", [x], _FLOAT, (*leading, columns))
        axes = graph.constant("/int8/axes", int64(-1))
        largest = graph.op(f"{place}/ReduceMax", [sizes, axes], _FLOAT, (*leading, 1), keepdims=1)
        least = graph.constant("/int8/least", np.array(_LEAST, np.float32))
        return graph.op(f"{place}/Max", [largest, least], _FLOAT, (*leading, 1))

    def _product(self, place: str, codes: str, weight: Weight, shape: Shape, part: str) -> str:
        """Codes of activations times the weights [rows, columns], which the session turns."""
        assert weight.scales is not None
        graph = self.graph
        turned = f"/int8/{weight.name}/Transpose/output_0"
        if part == "first":
            stored = graph.external(weight.name, weight.values)
            size: Shape = (weight.columns, weight.rows)
            node = f"/int8/{weight.name}/Transpose"
            graph.op(node, [stored], TensorProto.INT8, size, perm=[1, 0])
        scales = graph.external(f"{weight.name}_scales", weight.scales)
        inputs = [codes, turned, self._step(part), scales, self._zero()]
        node = f"{place}/MatMulIntegerToFloat"
        return graph.op(node, inputs, _FLOAT, shape, domain=MICROSOFT)

    def _step(self, part: str) -> str:
        return self.graph.constant(f"/int8/step_{part}", np.array(_STEPS[part], np.float32))

    def _zero(self) -> str:
        return self.graph.constant("/int8/zero", np.array(_ZERO, np.uint8))
