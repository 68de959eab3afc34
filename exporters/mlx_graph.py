"""``decode.mlxfn``: a model's forward pass as static MLX traces, to be run without its source.

Inputs, in this order
    token_ids   [1, S]                  int32   S is 1 (decode) or the chunk (prefill)
    positions   [S]                     int32   of the tokens, for the rotation
    offset      [1]                     int32   places that the cache holds already
    row         [1]                     int32   which of the S rows' logits are wanted
    frequencies [D/2]                   float32 } of a YaRN factor, where there are several;
    magnitude   [1]                     float32 } else both are in the graph
    buffers     [1, K, C, D] each       float   keys and values of layer 0, of layer 1, ...
and by name every tensor of ``model*.safetensors``.

Outputs
    logits      [1, V]                  float32
    buffers     as above, with the new keys and values from offset on

There is one trace for each S and each capacity C. A chunk that is not full is padded on the right:
what the padding leaves in the cache is not seen, since a token sees no place behind its own.
(mlx 0.32, ``mx.exporter``: files are bound to the version of MLX and to the kind of device, which
here is ``cpu``, ``metal`` or ``cuda``.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.mlx_model import DTYPES, FloatCache, Qwen2, Whole, build_model

GRAPH_FILE = "decode.mlxfn"
CHUNK = 128
SMALLEST_CAPACITY = 256
# Of the inputs, those before frequencies and magnitude.
_PLACE_INPUTS = 4


def capacities_of(max_context: int, chunk: int = CHUNK) -> list[int]:
    """Cache sizes that are traced: doubling, the last one holds the context and a padded chunk."""
    needed = -(-(max_context + chunk) // SMALLEST_CAPACITY) * SMALLEST_CAPACITY
    sizes = [SMALLEST_CAPACITY]
    while sizes[-1] < needed:
        sizes.append(min(2 * sizes[-1], needed))
    return sizes


def write_graph(
    path: Path,
    config: Qwen2Config,
    quantization: Mapping[str, Any] | None,
    dtype: str,
    max_context: int,
    *,
    has_rope_inputs: bool = False,
) -> dict[str, Any]:
    """Traces the model on the default device and gives the facts that a runtime must match.

    Args:
        path: the file; no weights are read, and none are stored in it.
        config: the model.
        quantization: the folder's settings, None for floats.
        dtype: float type of activations and cache.
        max_context: positions that the largest trace must hold.
        has_rope_inputs: take frequencies and magnitude instead of the config's own.
    """
    model = build_model(config, quantization, dtype)
    weights = dict(tree_flatten(model.parameters()))
    facts = {
        "mlx": version("mlx"),
        "device": _default_device(),
        "dtype": dtype,
        "chunk": CHUNK,
        "capacities": capacities_of(max_context),
        "has_rope_inputs": has_rope_inputs,
    }
    rope = [mx.zeros((config.head_dim // 2,)), mx.ones((1,))] if has_rope_inputs else []

    def run(*inputs: mx.array, **weights: mx.array) -> list[mx.array]:
        if has_rope_inputs:
            frequencies, magnitude = inputs[_PLACE_INPUTS : _PLACE_INPUTS + 2]
            model.use_rope(frequencies, magnitude)
            inputs = (*inputs[:_PLACE_INPUTS], *inputs[_PLACE_INPUTS + 2 :])
        return traced_step(model, inputs, weights)

    with mx.exporter(str(path), run, metadata=json.dumps(facts)) as exporter:
        for capacity in capacities_of(max_context):
            shape = (1, config.num_key_value_heads, capacity, config.head_dim)
            buffers = [mx.zeros(shape, DTYPES[dtype])] * (2 * config.num_hidden_layers)
            for count in (1, CHUNK):
                ids = mx.zeros((1, count), mx.int32)
                places = mx.arange(count, dtype=mx.int32)
                zero = mx.zeros((1,), mx.int32)
                exporter(ids, places, zero, zero, *rope, *buffers, **weights)
    return facts


def _default_device() -> str:
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def traced_step(
    model: Qwen2, inputs: Sequence[mx.array], weights: Mapping[str, mx.array]
) -> list[mx.array]:
    """One run as a pure function of the module's inputs; gives the module's outputs."""
    token_ids, positions, offset, row, *buffers = inputs
    model.update(tree_unflatten(list(weights.items())))
    cache = FloatCache(buffers, Whole(offset, token_ids.shape[1], buffers[0].shape[2]))
    logits = model(token_ids, positions, cache, keep=row)
    return [logits[:, -1], *cache.buffers]
