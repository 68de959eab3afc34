"""``export --to onnx``: what is written, and how it is described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from qwen2x.exporters.bundle import PREFILL_FILE
from qwen2x.exporters.bundle_writer import cache_facts, write_json
from qwen2x.exporters.cache_calibration import unknown_ranges
from qwen2x.exporters.config import Qwen2Config, read_json
from qwen2x.exporters.genai_config import genai_config
from qwen2x.exporters.onnx_graph import Recipe, build_graph
from qwen2x.exporters.onnx_prefill import build_prefill_graph
from qwen2x.exporters.onnx_target import find_target
from qwen2x.exporters.onnx_weights import PrefillLayout, WeightLayout
from qwen2x.exporters.options import Options
from qwen2x.exporters.packed_matrices import Order
from qwen2x.exporters.weights import DataFile, Weight
from qwen2x.quantize.cache_ranges import CacheRanges
from qwen2x.quantize.errors import SchemeError
from qwen2x.quantize.plan import BitPlan

GRAPH_FILE = "model.onnx"


@dataclass(frozen=True, kw_only=True)
class OnnxPlan:
    """See ``Plan``: a graph, and a data file that its initializers point into.

    ``prefill`` is the same of a second graph, which adds to the weights of the first.
    """

    options: Options
    recipe: Recipe
    model: onnx.ModelProto
    layout: WeightLayout
    prefill: tuple[onnx.ModelProto, PrefillLayout] | None = None

    @property
    def config(self) -> Qwen2Config:
        """See ``Plan``."""
        return self.recipe.config

    @property
    def bit_plan(self) -> BitPlan:
        """See ``Plan``."""
        return self.recipe.bit_plan

    @property
    def weights(self) -> Sequence[Weight]:
        """See ``Plan``."""
        return self.layout.weights

    @property
    def prefill_weights(self) -> Sequence[Weight]:
        """See ``Plan``."""
        return self.prefill[1].weights if self.prefill else ()

    @property
    def data_files(self) -> Sequence[DataFile]:
        """See ``Plan``."""
        return [*self.layout.files, *(self.prefill[1].files if self.prefill else ())]

    @property
    def structure_files(self) -> Mapping[str, int]:
        """See ``Plan``."""
        graphs = {GRAPH_FILE: self.model} | (
            {PREFILL_FILE: self.prefill[0]} if self.prefill else {}
        )
        return {name: int(model.ByteSize()) for name, model in graphs.items()}

    @property
    def _cache_dtype(self) -> str:
        return self.recipe.target.dtype if self.recipe.cache_ranges is None else "int8"

    def write_structure(self, staging: Path, cache_ranges: CacheRanges | None) -> dict[str, Any]:
        """See ``Plan``: the graph, the config, and onnxruntime-genai's config."""
        known = replace(self.recipe, cache_ranges=cache_ranges)
        model = self.model if cache_ranges is None else build_graph(known)[0]
        onnx.save_model(model, staging / GRAPH_FILE)
        if self.prefill is not None:
            onnx.save_model(build_prefill_graph(known, self.layout)[0], staging / PREFILL_FILE)
        generation = read_json(staging / "generation_config.json") or {}
        recipe = self.recipe
        # They know the first factor alone.
        context = min(recipe.max_context, recipe.ropes[0].max_positions)
        genai = genai_config(recipe.config, recipe.target, context, generation)
        write_json(staging / "config.json", recipe.config.raw)
        write_json(staging / "genai_config.json", genai)
        return {}

    def manifest(self) -> dict[str, Any]:
        """See ``Plan``."""
        target, graph = self.recipe.target, self.model.graph
        optional = {item.name for item in graph.initializer}
        return {
            "device": target.device,
            "dtype": target.dtype,
            "inputs": [item.name for item in graph.input if item.name not in optional],
            "optional_inputs": [item.name for item in graph.input if item.name in optional],
            "outputs": [item.name for item in graph.output],
            "cache": cache_facts(self.config, self._cache_dtype, target.cache_layout),
            "versions": {"onnx": onnx.__version__},
        } | ({"prefill": self._prefill_facts()} if self.prefill else {})

    def _prefill_facts(self) -> dict[str, Any]:
        return {
            "graph": PREFILL_FILE,
            "weight_bytes": sum(weight.bytes for weight in self.prefill_weights),
        }


def plan_onnx(
    config: Qwen2Config, options: Options, bit_plan: BitPlan, orders: Mapping[str, Order]
) -> OnnxPlan:
    """The graph and its data file's layout, without reading a weight.

    Modules in ``orders`` have their columns in another order than the checkpoint's float model.

    Raises:
        SchemeError, BackendError, ConfigError: options that do not fit the model or each other.
    """
    has_int8_cache = options.kv_bits is not None
    target = find_target(
        options.device or "cpu",
        options.dtype,
        is_quantized=any(bit_plan.schemes.values()),
        has_int8_cache=has_int8_cache,
    )
    recipe = Recipe(
        config=config,
        target=target,
        bit_plan=bit_plan,
        orders=orders,
        ropes=options.ropes_of(config),
        max_context=options.context_of(config),
        cache_ranges=unknown_ranges(config) if has_int8_cache else None,
    )
    if options.prefill_int8 and config.quantization is not None:
        raise SchemeError(
            f"--prefill-int8 needs float weights, got {config.quantization.method} codes; leave it "
            "out, or export the float checkpoint"
        )
    model, layout = build_graph(recipe)
    prefill = build_prefill_graph(recipe, layout) if options.prefill_int8 else None
    return OnnxPlan(options=options, recipe=recipe, model=model, layout=layout, prefill=prefill)
