"""Graphs of tiny checkpoints, by what a checkpoint and an export may look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo

from tests.tiny_checkpoint import EXAMPLE

KV8 = {"kv_bits": 8, "calibration": str(EXAMPLE.parent / "sample.txt")}
# Every row of the table of targets, float and quantized, and with an 8-bit cache.
TARGETS = {
    "cpu-float32": {"device": "cpu"},
    "cpu-int4": {"device": "cpu", "bits": 4, "method": "rtn"},
    "cpu-int8": {"device": "cpu", "bits": 8},
    "cuda-float32": {"device": "cuda", "dtype": "float32"},
    "cuda-float16": {"device": "cuda", "dtype": "float16"},
    "cuda-bfloat16": {"device": "cuda", "dtype": "bfloat16"},
    "cuda-float16-int4": {"device": "cuda", "dtype": "float16", "bits": 4, "method": "rtn"},
    "cuda-bfloat16-int8": {"device": "cuda", "dtype": "bfloat16", "bits": 8},
    "cpu-int8-cache": {"device": "cpu", **KV8},
    "cuda-float16-int8-cache": {"device": "cuda", "dtype": "float16", **KV8},
    "cuda-bfloat16-int4-int8-cache": {"device": "cuda", "dtype": "bfloat16", "bits": 4, **KV8},
}
# What a checkpoint may look like.
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"is_tied": False},
    "head-dim": {"head_dim": 64},
    "one-kv-head": {"num_key_value_heads": 1},
    "every-head-its-own": {"num_key_value_heads": 4},
    "sharded": {"max_shard_bytes": 200_000},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "one-layer": {"num_hidden_layers": 1},
    "rope-parameters": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "epsilon": {"rms_norm_eps": 1e-2},
    "yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    },
    "yarn-untruncated": {
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "truncate": False,
            "original_max_position_embeddings": 128, "attention_factor": 1.3,
        },
    },
}  # fmt: skip
Make = Callable[..., Path]


def source_of(bundle: Path) -> Path:
    return bundle.parent / "source"


def load_graph(bundle: Path) -> onnx.ModelProto:
    """The graph without its weights."""
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def external(model: onnx.ModelProto) -> dict[str, ExternalDataInfo]:
    return {
        item.name: ExternalDataInfo(item)
        for item in model.graph.initializer
        if item.data_location == TensorProto.EXTERNAL
    }
