"""The Qwen2 decoder as an ONNX graph.

Inputs
    input_ids                        [batch, sequence]                              int64
    attention_mask                   [batch, total]                                 int64
    position_ids                     [batch, sequence]                              int64
    past_key_values.{i}.{key,value}  [batch, key_value_heads, past, head_dim]       float or int8
    num_logits_to_keep (optional)    []  0: all rows, n: the last n                 int64
    rope_index (optional)            [1 or batch]  which YaRN factor, if several    int64
Outputs
    logits                           [batch, sequence (or kept), vocab_size]        float32
    present.{i}.{key,value}          [batch, key_value_heads, total, head_dim]      float or int8

Operators: ``docs/ContribOperators.md`` of onnxruntime 1.31 for com.microsoft, opset 23 otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.onnx_attention import AttentionBuilder, B, S, T
from qwen2x.exporters.onnx_builder import MICROSOFT, GraphBuilder, Shape, int64, place_of
from qwen2x.exporters.onnx_target import Target
from qwen2x.exporters.onnx_weights import WeightLayout
from qwen2x.exporters.rope import Rope
from qwen2x.exporters.weights import Weight
from qwen2x.quantize.cache_ranges import CacheRanges
from qwen2x.quantize.plan import BitPlan

KEPT = "kept"
# Modules by their path within a layer, and their outputs.
Parts = list[tuple[str, int]]
_TO_END = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a graph.

    ``bit_plan`` gives every matrix its scheme. ``ropes`` are one per YaRN factor, the first for who
    does not choose. ``max_context`` is the number of positions that the rotary tables cover.
    ``orders`` are int32 [columns], by module path, of matrices that are stored with their columns
    in that order. ``cache_ranges`` are the scales of a KV cache in 8 bits; None is one in the float
    type.
    """

    config: Qwen2Config
    target: Target
    bit_plan: BitPlan
    ropes: tuple[Rope, ...]
    max_context: int
    orders: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)
    cache_ranges: CacheRanges | None = None


def build_graph(recipe: Recipe) -> tuple[ModelProto, WeightLayout]:
    """The model, whose weights are references into the data file, and the layout of that file.

    Raises:
        SchemeError: the group size does not divide a matrix's columns.
    """
    decoder = Decoder(recipe, WeightLayout())
    decoder.build()
    target = recipe.target
    description = f"Qwen2 decoder for {target.device}, {target.dtype}"
    return decoder.graph.model(opset=target.opset, description=description), decoder.layout


class Decoder:
    """Writes the nodes in the order in which a token meets them."""

    reads_prompts = False

    def __init__(self, recipe: Recipe, layout: WeightLayout) -> None:
        self.recipe = recipe
        self.config = recipe.config
        self.target = recipe.target
        self.float = recipe.target.float_type
        self.residual_type = recipe.target.residual_type
        self.layout = layout
        self.cast_scales: dict[str, str] = {}
        self.zeros: set[str] = set()
        self.graph = GraphBuilder()
        self.graph.input("input_ids", TensorProto.INT64, (B, S))
        self.graph.input("attention_mask", TensorProto.INT64, (B, T))
        self.graph.input("position_ids", TensorProto.INT64, (B, S))
        self._declare_logits()
        self.attention = AttentionBuilder(
            self.graph,
            recipe.config,
            recipe.target,
            ropes=recipe.ropes,
            max_context=recipe.max_context,
            cache_ranges=recipe.cache_ranges,
            reads_prompts=self.reads_prompts,
        )

    def build(self) -> None:
        """Writes all nodes."""
        self.first_row = self._first_kept_row()
        table = self._table("model.embed_tokens")
        normed, residual = self._begin(table)
        for layer in range(self.config.num_hidden_layers):
            normed, residual = self._layer(layer, normed, residual)
        head = table if self.config.is_tied else self._table("lm_head")
        self._head(head, normed)

    def _declare_logits(self) -> None:
        # With the axis name of the inputs: optimum derives output shapes from it.
        self.graph.output("logits", TensorProto.FLOAT, (B, S, self.config.vocab_size))

    def _begin(self, table: Weight) -> tuple[str, str]:
        """What the first layer takes: normed, and as it is."""
        hidden = self._embed(table)
        residual = self._cast("/model/embed_tokens", hidden, self.residual_type, (B, S))
        return self._first_norm(residual), residual

    def _layer(self, layer: int, normed: str, residual: str) -> tuple[str, str]:
        config = self.config
        is_last = layer == config.num_hidden_layers - 1
        x = self._attend(layer, normed)
        leading: Shape = (B, S)
        if is_last:
            # Only these rows reach the logits; the rest of the last layer is spared the others.
            x = self._keep_rows("/model/attention_rows", x, self.float, config.query_size)
            residual = self._keep_rows(
                "/model/residual_rows", residual, self.residual_type, config.hidden_size
            )
            leading = (B, KEPT)
        parts = [("self_attn.o_proj", config.hidden_size)]
        x = self._project(layer, "self_attn.o_proj", parts, x, leading)
        norm = f"model.layers.{layer}.post_attention_layernorm"
        normed, residual = self._add_and_norm(norm, x, residual, leading)
        x = self._mlp(layer, normed, leading)
        norm = "model.norm" if is_last else f"model.layers.{layer + 1}.input_layernorm"
        return self._add_and_norm(norm, x, residual, leading)

    def _attend(self, layer: int, normed: str) -> str:
        config = self.config
        parts = [
            ("self_attn.q_proj", config.query_size),
            ("self_attn.k_proj", config.key_value_size),
            ("self_attn.v_proj", config.key_value_size),
        ]
        packed = self._project(layer, "self_attn.qkv_proj", parts, normed, (B, S), has_bias=True)
        return self.attention.attend(layer, packed)

    def _mlp(self, layer: int, x: str, leading: Shape) -> str:
        graph, inner = self.graph, self.config.intermediate_size
        place = f"/model/layers.{layer}/mlp"
        parts = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)]
        both = self._project(layer, "mlp.gate_up_proj", parts, x, leading)
        shape: Shape = (*leading, inner)
        gate, up = f"{place}/gate/output_0", f"{place}/up/output_0"
        graph.node(f"{place}/Split", [both], [gate, up], axis=-1, num_outputs=2)
        graph.value(gate, self.float, shape)
        graph.value(up, self.float, shape)
        sigmoid = graph.op(f"{place}/act/Sigmoid", [gate], self.float, shape)
        silu = graph.op(f"{place}/act/Mul", [gate, sigmoid], self.float, shape)
        x = graph.op(f"{place}/Mul", [silu, up], self.float, shape)
        parts = [("mlp.down_proj", self.config.hidden_size)]
        return self._project(layer, "mlp.down_proj", parts, x, leading)

    def _project(
        self, layer: int, name: str, parts: Parts, x: str, leading: Shape, *, has_bias: bool = False
    ) -> str:
        """X through the modules of a unit, whose outputs come out side by side."""
        place = place_of(f"model.layers.{layer}.{name}")
        orders = [self.recipe.orders.get(f"model.layers.{layer}.{part}") for part, _ in parts]
        if len({None if order is None else order.tobytes() for order in orders}) > 1:
            outputs = [
                self._project(layer, part, [(part, rows)], x, leading, has_bias=has_bias)
                for part, rows in parts
            ]
            shape: Shape = (*leading, sum(rows for _, rows in parts))
            return self.graph.op(f"{place}/Concat", outputs, self.float, shape, axis=-1)
        weight = self._matrix(layer, name, parts)
        if orders[0] is not None:
            inputs = [x, self.graph.constant(f"{place}/order", orders[0])]
            shape = (*leading, weight.columns)
            x = self.graph.op(f"{place}/Gather", inputs, self.float, shape, axis=-1)
        bias = self._bias(layer, name, parts) if has_bias else ""
        return self._linear(place, x, weight, leading, bias)

    # Weights

    def _table(self, name: str) -> Weight:
        source = f"{name}.weight"
        sources = [(source, self.config.vocab_size)]
        scheme = self.recipe.bit_plan.scheme_of(name)
        return self.layout.matrix(source, sources, self.config.hidden_size, self.float, scheme)

    def _matrix(self, layer: int, name: str, parts: Parts) -> Weight:
        """A unit of the plan, or one of its modules: modules one below the other."""
        config, unit = self.config, f"model.layers.{layer}.{name}"
        widths = {"self_attn.o_proj": config.query_size, "mlp.down_proj": config.intermediate_size}
        columns = widths.get(name, config.hidden_size)
        sources = [(f"model.layers.{layer}.{part}.weight", rows) for part, rows in parts]
        return self._place_matrix(unit, sources, columns)

    def _place_matrix(self, unit: str, sources: list[tuple[str, int]], columns: int) -> Weight:
        scheme = self.recipe.bit_plan.scheme_of(unit)
        return self.layout.matrix(f"{unit}.weight", sources, columns, self.float, scheme)

    def _bias(self, layer: int, name: str, parts: Parts) -> str:
        prefix = f"model.layers.{layer}"
        sources = [(f"{prefix}.{part}.bias", rows) for part, rows in parts]
        name = f"{prefix}.{name}.bias"
        return self.graph.external(name, self.layout.vector(name, sources, self.float).values)

    def _norm_weight(self, name: str) -> str:
        weight = self.layout.vector(name, [(name, self.config.hidden_size)], self.residual_type)
        return self.graph.external(name, weight.values)

    # Operators

    def _embed(self, table: Weight) -> str:
        graph, place = self.graph, "/model/embed_tokens"
        shape: Shape = (B, S, self.config.hidden_size)
        if table.scheme is None or table.scales is None:
            name = graph.external(table.name, table.values)
            return graph.op(f"{place}/Gather", [name, "input_ids"], self.float, shape)
        # The head's bytes once more, under the flat shape that this operator wants.
        flat = (table.rows, table.values.row_bytes)
        codes = graph.external(f"{table.name}_table", table.values, flat)
        return graph.op(
            f"{place}/GatherBlockQuantized",
            [codes, "input_ids", self._scales(table), *self._zero_points(table)],
            self.float,
            shape,
            domain=MICROSOFT,
            bits=table.scheme.bits,
            block_size=table.scheme.group_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def _linear(self, place: str, x: str, weight: Weight, leading: Shape, bias: str = "") -> str:
        """X times the transposed weight [rows, columns], plus a bias [rows]."""
        shape: Shape = (*leading, weight.rows)
        if weight.scheme is not None:
            inside = bias if self.target.has_bias_in_matmul else ""
            x = self._quantized_matmul(place, x, weight, shape, inside)
            bias = "" if inside else bias
        else:
            x = self._float_matmul(place, x, weight, shape)
        return self.graph.op(f"{place}/Add", [x, bias], self.float, shape) if bias else x

    def _quantized_matmul(self, place: str, x: str, weight: Weight, shape: Shape, bias: str) -> str:
        assert weight.scheme is not None
        codes = self.graph.external(f"{weight.name}_codes", weight.values)
        if weight.low_values is not None:
            return self._matmul_of_planes(place, x, weight, shape, bias)
        inputs = [x, codes, self._scales(weight), *self._zero_points(weight)]
        return self._matmul_nbits(place, inputs, weight, shape, weight.scheme.bits, bias)

    def _matmul_of_planes(self, place: str, x: str, weight: Weight, shape: Shape, bias: str) -> str:
        """Scale * (code - 32) is 4 scale * (high - 8), and scale * low."""
        assert weight.low_values is not None
        assert weight.scales is not None
        graph, scales = self.graph, self._scales(weight)
        four = graph.constant(
            "/scales/four", np.array(4, helper.tensor_dtype_to_np_dtype(self.float))
        )
        coarse = graph.op(
            f"/scales/{weight.name}/Mul", [scales, four], self.float, weight.scales.shape
        )
        high = graph.external(f"{weight.name}_codes", weight.values)
        low = graph.external(f"{weight.name}_low_codes", weight.low_values)
        parts = [
            self._matmul_nbits(f"{place}/high", [x, high, coarse], weight, shape, 4, bias),
            self._matmul_nbits(
                f"{place}/low", [x, low, scales, self._zeros(weight)], weight, shape, 2
            ),
        ]
        return graph.op(f"{place}/planes/Add", parts, self.float, shape)

    def _matmul_nbits(
        self,
        place: str,
        inputs: list[str],
        weight: Weight,
        shape: Shape,
        bits: int,
        bias: str = "",
    ) -> str:
        assert weight.scheme is not None
        if bias:
            inputs = [*inputs, *[""] * (5 - len(inputs)), bias]
        return self.graph.op(
            f"{place}/MatMulNBits",
            inputs,
            self.float,
            shape,
            domain=MICROSOFT,
            K=weight.columns,
            N=weight.rows,
            bits=bits,
            block_size=weight.scheme.group_size,
            accuracy_level=self.target.accuracy_level,
        )

    def _zeros(self, weight: Weight) -> str:
        """Zero points of a plane of 2 bits, which the session folds."""
        assert weight.scheme is not None
        groups = weight.columns // weight.scheme.group_size
        size = weight.rows, -(-groups * 2 // 8)
        place = f"/zero_points/{size[0]}x{size[1]}"
        name = f"{place}/ConstantOfShape/output_0"
        if name not in self.zeros:
            self.zeros.add(name)
            self.graph.constant(f"{place}/shape", int64(*size))
            value = helper.make_tensor("value", TensorProto.UINT8, (1,), [0])
            self.graph.op(
                f"{place}/ConstantOfShape", [f"{place}/shape"], TensorProto.UINT8, size, value=value
            )
        return name

    def _scales(self, weight: Weight) -> str:
        """Scales [rows, groups] in the matrices' type, from theirs, which the session folds."""
        assert weight.scales is not None
        name = self.graph.external(f"{weight.name}_scales", weight.scales)
        if helper.np_dtype_to_tensor_dtype(weight.scales.dtype) == self.float:
            return name
        if name not in self.cast_scales:
            place = f"/scales/{weight.name}/Cast"
            shape: Shape = weight.scales.shape
            self.cast_scales[name] = self.graph.op(place, [name], self.float, shape, to=self.float)
        return self.cast_scales[name]

    def _zero_points(self, weight: Weight) -> list[str]:
        """One name, or none for symmetric groups."""
        if weight.zero_points is None:
            return []
        return [self.graph.external(f"{weight.name}_zero_points", weight.zero_points)]

    def _float_matmul(self, place: str, x: str, weight: Weight, shape: Shape) -> str:
        graph = self.graph
        name = graph.external(weight.name, weight.values)
        if self.target.is_fused:
            node = f"{place}/FusedMatMul"
            return graph.op(node, [x, name], self.float, shape, domain=MICROSOFT, transB=1)
        turned: Shape = (weight.columns, weight.rows)
        name = graph.op(f"{place}/Transpose", [name], self.float, turned, perm=[1, 0])
        return graph.op(f"{place}/MatMul", [x, name], self.float, shape)

    def _cast(self, place: str, x: str, element_type: int, leading: Shape) -> str:
        """Between the residual stream's type and the matrices' type, where they differ."""
        if self.float == self.residual_type:
            return x
        shape: Shape = (*leading, self.config.hidden_size)
        return self.graph.op(f"{place}/Cast", [x], element_type, shape, to=element_type)

    def _first_norm(self, residual: str) -> str:
        place = "/model/layers.0/input_layernorm"
        normed = self.graph.op(
            f"{place}/RMSNormalization",
            [residual, self._norm_weight("model.layers.0.input_layernorm.weight")],
            self.residual_type,
            (B, S, self.config.hidden_size),
            axis=-1,
            epsilon=self.config.rms_norm_eps,
        )
        return self._cast(place, normed, self.float, (B, S))

    def _add_and_norm(self, name: str, x: str, residual: str, leading: Shape) -> tuple[str, str]:
        """The sum of residual and x, normed and as it is."""
        graph, epsilon = self.graph, self.config.rms_norm_eps
        place = place_of(name)
        weight = self._norm_weight(f"{name}.weight")
        shape: Shape = (*leading, self.config.hidden_size)
        x = self._cast(f"{place}/residual", x, self.residual_type, leading)
        if self.target.is_fused:
            node = f"{place}/SkipSimplifiedLayerNormalization"
            normed, total = f"{node}/output_0", f"{node}/output_3"
            outputs = [normed, "", "", total]
            graph.node(node, [x, residual, weight], outputs, domain=MICROSOFT, epsilon=epsilon)
            graph.value(normed, self.residual_type, shape)
            graph.value(total, self.residual_type, shape)
        else:
            total = graph.op(f"{place}/Add", [x, residual], self.residual_type, shape)
            node = f"{place}/RMSNormalization"
            inputs = [total, weight]
            normed = graph.op(node, inputs, self.residual_type, shape, axis=-1, epsilon=epsilon)
        return self._cast(place, normed, self.float, leading), total

    def _first_kept_row(self) -> str:
        """Where a slice of the last ``num_logits_to_keep`` rows starts; 0 keeps all.

        It starts from a shape, so that CUDA leaves it to the host, where a slice wants it: a copy
        between the two would forbid the capture of a CUDA graph.
        """
        graph, whole = self.graph, TensorProto.INT64
        graph.optional_input("num_logits_to_keep", np.array(0, np.int64), ())
        graph.constant("/rows/one", int64(1))
        graph.constant("/rows/end", int64(_TO_END))
        rows = graph.op("/rows/Shape", ["input_ids"], whole, (1,), start=1, end=2)
        kept = graph.op("/rows/Min", [rows, "num_logits_to_keep"], whole, (1,))
        first = graph.op("/rows/Sub", [rows, kept], whole, (1,))
        return graph.op("/rows/Mod", [first, rows], whole, (1,))

    def _keep_rows(self, place: str, x: str, element_type: int, columns: int) -> str:
        inputs = [x, self.first_row, "/rows/end", "/rows/one"]
        return self.graph.op(f"{place}/Slice", inputs, element_type, (B, KEPT, columns))

    def _head(self, head: Weight, normed: str) -> None:
        """Logits in float32; the last node gives the output its name."""
        logits = self._linear("/lm_head", normed, head, (B, KEPT))
        float32 = TensorProto.FLOAT
        if self.float == float32:
            self.graph.op("/lm_head/Identity", [logits], float32, (), name_output="logits")
        else:
            node = "/lm_head/Cast"
            self.graph.op(node, [logits], float32, (), name_output="logits", to=float32)
