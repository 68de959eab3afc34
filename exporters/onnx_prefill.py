"""A second graph that reads prompts: integer products of whole rows, and the cache as its outputs.

Its inputs are those of ``onnx_graph`` but ``num_logits_to_keep``. There is no head, and of the last
layer nothing but keys and values: the prompt's last token is left to the other graph, which gives
its logits.

Products of int8 are several times as fast as MatMulNBits where there are many rows, but they want
one scale for a row of weights, and one for a row of activations. The latter alone would lose much,
since a few columns of Qwen2's activations are far larger than the others. So a row x is taken in
two parts, ``scale * (first + second / 254)`` with codes of 8 bits in both, where ``scale`` is the
row's largest number over 127: the first is the whole number below, and what is left over, which is
from 0 to 1, is rounded as finely again. Rows do not depend on each other.

Rows are divided by their scales first, since rounding to one step for all numbers uses all threads,
and to one for each row does not, nor does DequantizeLinear (onnxruntime 1.32).

Where there are many rows, passes over the wide arrays between the products take as long as these.
So gate and up are two products of the same codes, which spares a split, and up stays in units of
its row's scale: what is left of it comes back behind down_proj, where rows are scaled anyway.

Where the other graph has a matrix in 4 bits, which loses far more by those, the first part alone is
taken; but for down_proj, whose inputs have the largest outliers.

Operators: MatMulIntegerToFloat of ``docs/ContribOperators.md`` of onnxruntime 1.32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from onnx import ModelProto, TensorProto

from qwen2x.exporters.onnx_builder import MICROSOFT, Shape, int64
from qwen2x.exporters.onnx_graph import Decoder, Recipe
from qwen2x.exporters.onnx_weights import PrefillLayout, WeightLayout
from qwen2x.exporters.weights import Weight
from qwen2x.quantize.rows import LARGEST_CODE

_FLOAT, _CODE = TensorProto.FLOAT, TensorProto.UINT8
# Of the two parts, in units of the row's scale; and the codes that stand for 0.
_STEPS = {"first": 1.0, "second": 1 / (2 * LARGEST_CODE)}
_ZEROS = {"first": 128, "second": 1}
_COARSE_BITS, _WITH_OUTLIERS = 4, "down_proj"
# The largest number of a row of zeros.
_LEAST = 1e-30
# Of all sequences, one below the other.
_ROWS = "rows"


class _Coded(NamedTuple):
    """Rows as codes uint8 [rows, columns], by part, times the scales float32 [rows, 1]."""

    codes: dict[str, str]
    scales: str


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
    # Nothing else.
    reads_prompts = True

    def __init__(self, recipe: Recipe, layout: PrefillLayout) -> None:
        super().__init__(recipe, layout)
        # By name of a weight, the parts that its activations are taken in.
        self._parts: dict[str, tuple[str, ...]] = {}
        # Values that all layers share, and that are there.
        self._shared: set[str] = set()

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
        coded = self._coded(place, x, weight)
        x = self._product(place, coded, weight)
        x = self.graph.op(f"{place}/Mul", [x, coded.scales], _FLOAT, (_ROWS, weight.rows))
        x = self._as_sequences(place, x, weight.rows, leading)
        shape: Shape = (*leading, weight.rows)
        return self.graph.op(f"{place}/bias/Add", [x, bias], _FLOAT, shape) if bias else x

    def _mlp(self, layer: int, x: str, leading: Shape) -> str:
        graph, config = self.graph, self.config
        inner, place = config.intermediate_size, f"/model/layers.{layer}/mlp"
        gate, up = (
            self._matrix(layer, name, [(name, inner)]) for name in ("mlp.gate_proj", "mlp.up_proj")
        )
        down = self._matrix(layer, "mlp.down_proj", [("mlp.down_proj", config.hidden_size)])
        wide: Shape = (_ROWS, inner)
        coded = self._coded(f"{place}/gate_proj", x, gate)
        gated = self._product(f"{place}/gate_proj", coded, gate)
        gated = graph.op(f"{place}/gate_proj/Mul", [gated, coded.scales], _FLOAT, wide)
        sigmoid = graph.op(f"{place}/act/Sigmoid", [gated], _FLOAT, wide)
        silu = graph.op(f"{place}/act/Mul", [gated, sigmoid], _FLOAT, wide)
        x = graph.op(
            f"{place}/Mul", [silu, self._product(f"{place}/up_proj", coded, up)], _FLOAT, wide
        )
        of_up, coded = coded.scales, self._coded(f"{place}/down_proj", x, down)
        x = self._product(f"{place}/down_proj", coded, down)
        scales = [coded.scales, of_up]
        both = graph.op(f"{place}/down_proj/both_scales/Mul", scales, _FLOAT, (_ROWS, 1))
        shape: Shape = (_ROWS, down.rows)
        x = graph.op(f"{place}/down_proj/Mul", [x, both], _FLOAT, shape)
        return self._as_sequences(f"{place}/down_proj", x, down.rows, leading)

    def _coded(self, place: str, x: str, weight: Weight) -> _Coded:
        """Rows of any leading shape, as the products with this weight take them."""
        graph, size = self.graph, (_ROWS, weight.columns)
        shape = graph.constant(f"/int8/flat_{weight.columns}", int64(-1, weight.columns))
        x = graph.op(f"{place}/Reshape", [x, shape], _FLOAT, size)
        scales = self._row_scales(place, x)
        x = graph.op(f"{place}/Div", [x, scales], _FLOAT, size)
        parts = self._parts[weight.name]
        values = {parts[0]: x}
        if len(parts) > 1:
            below = graph.op(f"{place}/Floor", [x], _FLOAT, size)
            rest = graph.op(f"{place}/second/Sub", [x, below], _FLOAT, size)
            values = dict(zip(parts, (below, rest), strict=True))
        codes = {
            part: graph.op(
                f"{place}/{part}/QuantizeLinear",
                [value, self._step(part), self._zero(part)],
                _CODE,
                size,
            )
            for part, value in values.items()
        }
        return _Coded(codes=codes, scales=scales)

    def _row_scales(self, place: str, x: str) -> str:
        """The largest number of each row by size, over 127: [rows, 1]."""
        graph, shape = self.graph, (_ROWS, 1)
        axes = graph.constant("/int8/axes", int64(-1))
        ends = [
            graph.op(f"{place}/{operator}", [x, axes], _FLOAT, shape, keepdims=1)
            for operator in ("ReduceMax", "ReduceMin")
        ]
        ends[1] = graph.op(f"{place}/Neg", [ends[1]], _FLOAT, shape)
        least = graph.constant("/int8/least", np.array(_LEAST, np.float32))
        largest = graph.op(f"{place}/Max", [*ends, least], _FLOAT, shape)
        share = graph.constant("/int8/share", np.array(1 / LARGEST_CODE, np.float32))
        return graph.op(f"{place}/scales/Mul", [largest, share], _FLOAT, shape)

    def _product(self, place: str, coded: _Coded, weight: Weight) -> str:
        """Float32 [rows, rows of the weight], in units of the rows' scales."""
        assert weight.scales is not None
        graph, shape = self.graph, (_ROWS, weight.rows)
        # Turned by the session.
        stored = graph.external(weight.name, weight.values)
        node = f"/int8/{weight.name}/Transpose"
        size: Shape = (weight.columns, weight.rows)
        turned = graph.op(node, [stored], TensorProto.INT8, size, perm=[1, 0])
        scales = graph.external(f"{weight.name}_scales", weight.scales)
        products = [
            graph.op(
                f"{place}/{part}/MatMulIntegerToFloat",
                [codes, turned, self._step(part), scales, self._zero(part)],
                _FLOAT,
                shape,
                domain=MICROSOFT,
            )
            for part, codes in coded.codes.items()
        ]
        if len(products) == 1:
            return products[0]
        return graph.op(f"{place}/Add", products, _FLOAT, shape)

    def _as_sequences(self, place: str, x: str, columns: int, leading: Shape) -> str:
        """[rows, columns] as [batch, sequence, columns]."""
        graph, whole = self.graph, TensorProto.INT64
        name = f"/int8/sequences_{columns}"
        shape = f"{name}/Concat/output_0"
        if shape not in self._shared:
            self._shared.add(shape)
            ids = graph.op(f"{name}/Shape", ["input_ids"], whole, (2,))
            width = graph.constant(f"{name}/columns", int64(columns))
            graph.op(f"{name}/Concat", [ids, width], whole, (3,), axis=0)
        return graph.op(f"{place}/sequences/Reshape", [x, shape], _FLOAT, (*leading, columns))

    def _step(self, part: str) -> str:
        return self.graph.constant(f"/int8/step_{part}", np.array(_STEPS[part], np.float32))

    def _zero(self, part: str) -> str:
        return self.graph.constant(f"/int8/zero_{part}", np.array(_ZEROS[part], np.uint8))
