"""``--kv-bits 8``: the walk through the layers that finds the scales of the KV cache.

Only one layer's weights and the activations of the text are in memory. What was found is on disk
beside the bundle that is being written, so that an interrupted export need not look again.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from qwen2x.exporters.calibration import (
    PREFIX,
    Calibration,
    OnLayer,
    embedding_rows,
    save_arrays,
    shape_of,
)
from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.packed_matrices import PackedMatrices
from qwen2x.exporters.rope import Rope
from qwen2x.quantize.cache_ranges import CacheRanges, Tensor, join, measure_layer
from qwen2x.quantize.groups import Float, dequantize
from qwen2x.quantize.plan import unit_of

_FILE = f"{PREFIX}cache.safetensors"
# Of the windows of 512 tokens that a calibration text has, so many are read, spread over it. Twice
# as many bring the 0.5B checkpoint from a KL divergence of 0.00045 to one of 0.00043.
_MOST_WINDOWS, _WINDOW = 8, 512


def cache_text(calibration: Calibration) -> Calibration:
    """The share of a calibration text that is read for a cache."""
    step = -(-len(calibration.windows) // _MOST_WINDOWS)
    return replace(calibration, windows=calibration.windows[::step])


def calibrate_cache(
    checkpoint: Checkpoint,
    calibration: Calibration,
    rope: Rope,
    positions: int,
    staging: Path,
    on_layer: OnLayer,
) -> CacheRanges:
    """Scales and centres of all layers, or those that an interrupted run left behind.

    Args:
        checkpoint: the float weights.
        calibration: the text, of which a share is read.
        rope: of the keys. YaRN's other factors leave them where they are: what turns less than once
            in the model's own context turns as far in a stretched one, and their attention factors
            are with the queries (``RopeTables``).
        positions: of its context, at any of which a key may come.
        staging: where they are kept.
        on_layer: told of layers that are done.

    Raises:
        CheckpointError: activations that are not finite.
    """
    path = staging / _FILE
    if path.is_file():
        return CacheRanges(**load_file(path))
    config = checkpoint.config
    shape = shape_of(config, rope)
    tensor = _float_tensors(checkpoint)
    rows, places = embedding_rows(checkpoint, cache_text(calibration).windows)
    states = rows[places]
    found = []
    on_layer("scanned", 0, config.num_hidden_layers)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        found.append(measure_layer(prefix, tensor, shape, states, positions))
        on_layer("scanned", layer + 1, config.num_hidden_layers)
    ranges = join(found)
    save_arrays(path, asdict(ranges))
    return ranges


def unknown_ranges(config: Qwen2Config) -> CacheRanges:
    """Of the right shapes, for a graph that is only planned."""
    shape = (config.num_hidden_layers, config.key_value_size)
    ones = np.ones(shape, np.float32)
    return CacheRanges(key_centres=np.zeros(shape, np.float32), key_scales=ones, value_scales=ones)


def cache_calibration_memory(config: Qwen2Config) -> int:
    """An estimate of the bytes that it holds at its peak, with the longest text."""
    widest = config.query_size + 2 * config.key_value_size
    tokens = _MOST_WINDOWS * _WINDOW
    activations = tokens * (3 * config.hidden_size + 2 * widest + config.intermediate_size)
    matrices = config.hidden_size * (2 * config.query_size + 3 * config.intermediate_size)
    return 4 * (activations + 2 * matrices)


def _float_tensors(checkpoint: Checkpoint) -> Tensor:
    """Gives a tensor by its name; of a quantized checkpoint, what its codes stand for."""
    config = checkpoint.config
    if config.quantization is None:
        return checkpoint.rows
    packed = PackedMatrices(checkpoint, config.quantization)
    schemes, shapes = packed.schemes(), config.expected_tensors()

    def tensor(name: str) -> Float:
        if name not in packed:
            return checkpoint.rows(name)
        module = name.removesuffix(".weight")
        stored = dequantize(packed.rows(name, 0, shapes[name][0], schemes[unit_of(module)]))
        if module not in packed.orders:
            return stored
        values = np.empty_like(stored)
        values[:, packed.orders[module]] = stored
        return values

    return tensor
