"""``export --to mlx``: the folder that mlx-lm and its like load, written without mlx."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2x.exporters.bundle_writer import cache_facts, write_json
from qwen2x.exporters.checkpoint import INDEX
from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.mlx_config import mlx_config, unread_by_mlx_lm
from qwen2x.exporters.mlx_weights import MlxLayout, lay_out
from qwen2x.exporters.options import Options
from qwen2x.exporters.weights import FLOAT_TYPES, DataFile, Weight
from qwen2x.quantize.cache_ranges import CacheRanges
from qwen2x.quantize.errors import BackendError
from qwen2x.quantize.plan import BitPlan


@dataclass(frozen=True, kw_only=True)
class MlxPlan:
    """See ``Plan``: safetensors files, their index, and a config."""

    options: Options
    config: Qwen2Config
    dtype: str
    bit_plan: BitPlan
    layout: MlxLayout

    @property
    def weights(self) -> Sequence[Weight]:
        """See ``Plan``."""
        return self.layout.weights

    @property
    def prefill_weights(self) -> Sequence[Weight]:
        """See ``Plan``."""
        return ()

    @property
    def data_files(self) -> Sequence[DataFile]:
        """See ``Plan``."""
        return self.layout.files

    @property
    def structure_files(self) -> Mapping[str, int]:
        """See ``Plan``."""
        return {INDEX: len(_to_text(self._index()))}

    def write_structure(self, staging: Path, cache_ranges: CacheRanges | None) -> dict[str, Any]:
        """See ``Plan``: index, config, and the graph if it is wanted. The cache has no ranges."""
        (staging / INDEX).write_text(_to_text(self._index()), encoding="utf-8")
        text = json.dumps(self._config(), indent=4, ensure_ascii=False)
        (staging / "config.json").write_text(text + "\n", encoding="utf-8")
        if not (staging / "generation_config.json").is_file() and self.config.eos_token_ids:
            eos = list(self.config.eos_token_ids)
            write_json(staging / "generation_config.json", {"eos_token_id": eos})
        added: dict[str, Any] = {"notes": unread_by_mlx_lm(self.config)}
        if self.options.graph:
            added["graph"] = self._write_graph(staging)
        return added

    def _write_graph(self, staging: Path) -> dict[str, Any]:
        graph = _graph_module()
        facts: dict[str, Any] = graph.write_graph(
            staging / graph.GRAPH_FILE,
            self.config,
            self._config().get("quantization"),
            self.dtype,
            self.options.context_of(self.config),
            has_rope_inputs=len(self.options.ropes_of(self.config)) > 1,
        )
        return facts

    def manifest(self) -> dict[str, Any]:
        """See ``Plan``."""
        return {
            "device": "any",
            "dtype": self.dtype,
            "quantization": self._config().get("quantization"),
            "inputs": [],
            "optional_inputs": [],
            "outputs": [],
            "cache": cache_facts(self.config, self.dtype, "stepped"),
            "versions": {},
        }

    def _config(self) -> dict[str, Any]:
        schemes = {
            weight.name.removesuffix(".weight"): weight.scheme
            for weight in self.weights
            if weight.columns > 1
        }
        return mlx_config(self.config, self.dtype, self.bit_plan.layers, schemes)

    def _index(self) -> dict[str, Any]:
        size = sum(weight.bytes for weight in self.weights)
        return {
            "metadata": {"total_size": size, "total_parameters": self.config.parameters},
            "weight_map": dict(sorted(self.layout.weight_map.items())),
        }


def plan_mlx(config: Qwen2Config, options: Options, bit_plan: BitPlan) -> MlxPlan:
    """The folder's layout, without reading a weight.

    Raises:
        SchemeError, BackendError, ConfigError: options that do not fit the model or each other.
    """
    if options.device is not None:
        raise BackendError(
            f"an MLX folder is for every device, got --device {options.device}; leave it out"
        )
    options.context_of(config)
    if options.graph:
        _graph_module()
    dtype = options.dtype or _stored_dtype(config.raw)
    if dtype not in FLOAT_TYPES:
        raise BackendError(f"no MLX folder for --dtype {dtype}; choose {' or '.join(FLOAT_TYPES)}")

    layout = lay_out(config.expected_tensors(), FLOAT_TYPES[dtype], bit_plan.scheme_of)
    return MlxPlan(options=options, config=config, dtype=dtype, bit_plan=bit_plan, layout=layout)


def _graph_module() -> Any:
    """The only part of an export that needs mlx.

    Raises:
        BackendError: mlx is not installed, or does not load.
    """
    try:
        return importlib.import_module("qwen2x.exporters.mlx_graph")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("mlx"):
            raise
        raise BackendError(
            f'--graph needs mlx ({error}); pip install "qwen2x[mlx]", or leave out --graph'
        ) from None


def _stored_dtype(raw: Mapping[str, Any]) -> str:
    """The float type that the checkpoint says it has, else bfloat16, as every released one."""
    named = raw.get("torch_dtype") or raw.get("dtype")
    return named if isinstance(named, str) and named in FLOAT_TYPES else "bfloat16"


def _to_text(index: Mapping[str, Any]) -> str:
    return json.dumps(index, indent=4) + "\n"
