"""Attention with rotary positions and KV cache, for the fused and for the standard operators.

Fused: com.microsoft::GroupQueryAttention takes packed q|k|v, rotates inside, and appends to a cache
that may be one buffer for past and present. Fused in 8 bits: the same with q and k rotated before,
since the centres of rotated keys are taken out of them (``quantize/cache_ranges.py``); also where
the kernel does not read the positions that choose a YaRN factor. Standard:
RotaryEmbedding-23 and Attention-23, whose present is past and new keys concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.onnx_builder import MICROSOFT, GraphBuilder, Shape, int64
from qwen2x.exporters.onnx_rope import RopeTables
from qwen2x.exporters.onnx_short_attention import ShortAttention
from qwen2x.exporters.onnx_target import Target
from qwen2x.exporters.rope import Rope
from qwen2x.quantize.cache_ranges import CacheRanges
from qwen2x.quantize.groups import Float

B, S, P, T = "batch", "sequence", "past", "total"


class AttentionBuilder:
    """Declares the cache, prepares tables and masks once, then attends layer by layer."""

    def __init__(
        self,
        graph: GraphBuilder,
        config: Qwen2Config,
        target: Target,
        *,
        ropes: Sequence[Rope],
        max_context: int,
        cache_ranges: CacheRanges | None,
        reads_prompts: bool = False,
    ) -> None:
        self._graph = graph
        self._config = config
        self._target = target
        self._float = target.float_type
        self._cache_ranges = cache_ranges
        for layer in range(config.num_hidden_layers):
            self._declare_cache(layer)
        # The scales of codes are those of the plain model's keys.
        has_codes = cache_ranges is not None
        self._rope = RopeTables(graph, ropes, self._float, max_context, is_even=has_codes)
        if target.is_fused:
            self._last_key, self._total = self._sequence_lengths()
        else:
            self._mask = self._causal_mask()
        is_chosen_unseen = len(ropes) > 1 and not target.reads_positions
        self._rotates_before = not target.is_fused or has_codes or is_chosen_unseen
        self._short: ShortAttention | None = None
        if reads_prompts and not has_codes and self._float == TensorProto.FLOAT:
            heads, past = config.num_attention_heads, self._past(0)[0]
            self._short = ShortAttention(graph, heads, past=past, total=self._total)
        if self._rotates_before:
            self._key_rows = self._rope.key_rows()
            self._query_rows = self._rope.query_rows(self._key_rows)

    def attend(self, layer: int, packed: str) -> str:
        """The heads' output [batch, sequence, query_size] for q|k|v packed in one value."""
        place = f"/model/layers.{layer}/self_attn"
        if self._cache_ranges is not None:
            return self._fused_int8(layer, place, packed, self._cache_ranges)
        if self._target.is_fused:
            return self._fused(layer, place, packed)
        return self._standard(layer, place, packed)

    def _declare_cache(self, layer: int) -> None:
        heads, size = self._config.num_key_value_heads, self._config.head_dim
        element_type = self._float if self._cache_ranges is None else TensorProto.INT8
        for past, present in zip(self._past(layer), self._present(layer), strict=True):
            self._graph.input(past, element_type, (B, heads, P, size))
            self._graph.output(present, element_type, (B, heads, T, size))

    def _past(self, layer: int) -> list[str]:
        return [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]

    def _present(self, layer: int) -> list[str]:
        return [f"present.{layer}.key", f"present.{layer}.value"]

    def _sequence_lengths(self) -> tuple[str, str]:
        """Valid keys per row minus one, and the total length, as GroupQueryAttention wants them."""
        graph, int32 = self._graph, TensorProto.INT32
        graph.constant("/mask/one", int64(1))
        count = graph.op(
            "/mask/ReduceSum", ["attention_mask", "/mask/one"], TensorProto.INT64, (B,), keepdims=0
        )
        last = graph.op("/mask/Sub", [count, "/mask/one"], TensorProto.INT64, (B,))
        last = graph.op("/mask/Cast", [last], int32, (B,), to=int32)
        total = self._length("/mask/total", "attention_mask")
        return last, graph.op("/mask/total/Cast", [total], int32, (), to=int32)

    def _length(self, place: str, value: str) -> str:
        """The second dimension of an input, int64 scalar."""
        graph = self._graph
        graph.constant("/mask/second", np.array(1, np.int64))
        shape = graph.op(f"{place}/Shape", [value], TensorProto.INT64, (2,))
        return graph.op(f"{place}/Gather", [shape, "/mask/second"], TensorProto.INT64, ())

    def _causal_mask(self) -> str:
        """Boolean [batch, 1, sequence, total]: keys up to the query's own place, no padding."""
        graph, whole = self._graph, TensorProto.INT64
        graph.constant("/mask/zero", np.array(0, np.int64))
        graph.constant("/mask/step", np.array(1, np.int64))
        graph.constant("/mask/query_axis", int64(1))
        graph.constant("/mask/inner_axes", int64(1, 2))
        total = self._length("/mask/total", "attention_mask")
        new = self._length("/mask/new", "input_ids")
        past = graph.op("/mask/past/Sub", [total, new], whole, ())
        keys = graph.op("/mask/keys/Range", ["/mask/zero", total, "/mask/step"], whole, (T,))
        query = graph.op("/mask/queries/Range", [past, total, "/mask/step"], whole, (S,))
        query = graph.op("/mask/queries/Unsqueeze", [query, "/mask/query_axis"], whole, (S, 1))
        causal = graph.op("/mask/LessOrEqual", [keys, query], TensorProto.BOOL, (S, T))
        boolean = TensorProto.BOOL
        valid = graph.op("/mask/valid/Cast", ["attention_mask"], boolean, (B, T), to=boolean)
        valid = graph.op(
            "/mask/valid/Unsqueeze", [valid, "/mask/inner_axes"], boolean, (B, 1, 1, T)
        )
        return graph.op("/mask/And", [causal, valid], boolean, (B, 1, S, T))

    def _fused(self, layer: int, place: str, packed: str) -> str:
        config, rope = self._config, self._rope
        node = f"{place}/GroupQueryAttention"
        new, rotation = [packed, "", ""], [*rope.tables, rope.positions]
        if self._rotates_before:
            new, rotation = list(self._rotated(place, packed).values()), []
        inputs = [*new, *self._past(layer), self._last_key, self._total, *rotation]
        outputs = [f"{node}/output_0", *self._present(layer)]
        options = {
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "scale": config.head_dim**-0.5,
            "do_rotary": 0 if self._rotates_before else 1,
            "rotary_interleaved": 0,
        }
        if self._short is None:
            self._graph.node(node, inputs, outputs, domain=MICROSOFT, **options)
        else:
            self._short.write(place, inputs, outputs, **options)
        return self._graph.value(f"{node}/output_0", self._float, (B, S, config.query_size))

    def _fused_int8(self, layer: int, place: str, packed: str, ranges: CacheRanges) -> str:
        graph, config = self._graph, self._config
        rotated = self._rotated(place, packed)
        centre = self._key_centre(place, ranges.key_centres[layer])
        shape: Shape = (B, S, config.key_value_size)
        key = graph.op(f"{place}/k/Sub", [rotated["k"], centre], self._float, shape)
        per_channel = (1, config.num_key_value_heads, 1, config.head_dim)
        scales = [
            graph.constant(f"{place}/{part}_scale", values[layer].reshape(per_channel))
            for part, values in (("k", ranges.key_scales), ("v", ranges.value_scales))
        ]
        node = f"{place}/GroupQueryAttention"
        new = [rotated["q"], key, rotated["v"]]
        # No tables, positions, attention_bias nor head_sink.
        unused = [""] * 5
        graph.node(
            node,
            [*new, *self._past(layer), self._last_key, self._total, *unused, *scales],
            [f"{node}/output_0", *self._present(layer)],
            domain=MICROSOFT,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=config.head_dim**-0.5,
            do_rotary=0,
            k_quant_type="PER_CHANNEL",
            v_quant_type="PER_CHANNEL",
            kv_cache_bit_width=8,
        )
        return graph.value(f"{node}/output_0", self._float, (B, S, config.query_size))

    def _key_centre(self, place: str, values: Float) -> str:
        """Of a layer's keys [key_value_size], in the cache's float type."""
        graph, shape = self._graph, values.shape
        name = graph.constant(f"{place}/key_centre", values)
        if self._float == TensorProto.FLOAT:
            return name
        return graph.op(f"{place}/key_centre/Cast", [name], self._float, shape, to=self._float)

    def _rotated(self, place: str, packed: str) -> dict[str, str]:
        """q, k and v [batch, sequence, width], the first two rotated to their positions."""
        graph, config = self._graph, self._config
        widths = {"q": config.query_size, "k": config.key_value_size, "v": config.key_value_size}
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        graph.constant("/attention/widths", int64(*widths.values()))
        names = {part: f"{place}/{part}/output_0" for part in widths}
        graph.node(f"{place}/Split", [packed, "/attention/widths"], list(names.values()), axis=-1)
        for part, width in widths.items():
            graph.value(names[part], self._float, (B, S, width))
        rows = {"q": self._query_rows, "k": self._key_rows}
        for part, count in heads.items():
            names[part] = graph.op(
                f"{place}/{part}/RotaryEmbedding",
                [names[part], *rows[part]],
                self._float,
                (B, S, widths[part]),
                num_heads=count,
            )
        return names

    def _standard(self, layer: int, place: str, packed: str) -> str:
        graph, config = self._graph, self._config
        names = self._rotated(place, packed)
        node = f"{place}/Attention"
        graph.node(
            node,
            [*names.values(), self._mask, *self._past(layer)],
            [f"{node}/output_0", *self._present(layer)],
            q_num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=config.head_dim**-0.5,
        )
        return graph.value(f"{node}/output_0", self._float, (B, S, config.query_size))
