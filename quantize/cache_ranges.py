"""What the keys and values of a Qwen2 layer range over: the scales of a KV cache in 8 bits.

Codes are stored for keys after rotation, one scale per channel. The bias of a key projection
reaches hundreds on Qwen2, in those pairs of columns that hardly turn within the context: there it
is nearly the same at every position. A softmax does not see what is added to all its inputs, and
q . (k - c) is q . k less the same q . c for every key, so a constant c may be taken out of all
cached keys, exactly. With c in the middle of a channel's range, codes tell apart the keys, not the
bias. Axes: N tokens, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qwen2x.quantize.decoder import Shape, activate, attend, norm
from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import Float

# The largest code, and how much farther than the calibration text other text may reach.
_CODES, _MARGIN = 127, 1.25
# A channel that the text left silent has a range of this share of its head's mean.
_LEAST_SHARE = 0.01
# Angles at which a pair is looked at; the range between two is at most 0.5 % wider.
_ANGLES = 33
# Windows that go through a layer's MLP at once.
_WINDOWS = 4

Tensor = Callable[[str], Float]


@dataclass(frozen=True, kw_only=True)
class CacheRanges:
    """Of all layers, float32 [layers, K*D]: a cached code times its scale is k - centre, or v."""

    key_centres: Float
    key_scales: Float
    value_scales: Float


def measure_layer(
    prefix: str, tensor: Tensor, shape: Shape, states: Float, positions: int
) -> CacheRanges:
    """One layer's ranges [1, K*D]; moves the states behind the layer.

    Args:
        prefix: of the layer's names, such as ``model.layers.0.``.
        tensor: gives a tensor of the checkpoint by its name.
        shape: of the layer.
        states: float32 [windows, tokens, hidden] before the layer; changed.
        positions: of the context; every key is taken to come at any of them.

    Raises:
        CheckpointError: activations that are not finite.
    """
    projected = _project(prefix, tensor, shape, states)
    _, keys, values = projected
    if not all(np.isfinite(part).all() for part in projected):
        raise CheckpointError(
            f"{prefix}self_attn: activations of the calibration text are not finite; the "
            "checkpoint is damaged, or export without --kv-bits"
        )
    heads = (-1, shape.num_key_value_heads, shape.head_dim)
    low, high = rotated_range(keys.reshape(heads), shape, positions)
    most = np.abs(values.reshape(heads)).max(axis=0)
    states += attend(projected, shape) @ tensor(f"{prefix}self_attn.o_proj.weight").T
    _add_mlp(prefix, tensor, shape, states)
    half = np.float32(0.5)
    return CacheRanges(
        key_centres=(half * (low + high)).reshape(1, -1),
        key_scales=_scales(half * (high - low)),
        value_scales=_scales(most),
    )


def rotated_range(keys: Float, shape: Shape, positions: int) -> tuple[Float, Float]:
    """Lowest and highest [K, D] that keys [N, K, D] reach, rotated to any position below a limit.

    A pair that turns fully ranges as far as its longest key, both ways.
    """
    halves = keys.reshape(len(keys), keys.shape[1], 2, -1)
    low = np.empty(halves.shape[1:], np.float32)
    high = np.empty_like(low)
    for pair, frequency in enumerate(shape.inverse_frequencies):
        angles = np.linspace(0, min(2 * np.pi, float(frequency) * (positions - 1)), _ANGLES)
        cosines, sines = np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
        first, second = halves[:, :, 0, pair, None], halves[:, :, 1, pair, None]
        for half, turned in enumerate(
            (first * cosines - second * sines, second * cosines + first * sines)
        ):
            low[:, half, pair] = turned.min(axis=(0, 2))
            high[:, half, pair] = turned.max(axis=(0, 2))
    factor = np.float32(shape.attention_factor)
    return low.reshape(keys.shape[1:]) * factor, high.reshape(keys.shape[1:]) * factor


def join(layers: list[CacheRanges]) -> CacheRanges:
    """Ranges of layers one after the other."""
    return CacheRanges(
        key_centres=np.concatenate([layer.key_centres for layer in layers]),
        key_scales=np.concatenate([layer.key_scales for layer in layers]),
        value_scales=np.concatenate([layer.value_scales for layer in layers]),
    )


def _scales(reach: Float) -> Float:
    """Positive scales [1, K*D] of channels [K, D] that reach so far."""
    least = np.maximum(_LEAST_SHARE * reach.mean(axis=-1, keepdims=True), 1e-6)
    scales: Float = np.maximum(reach, least) * np.float32(_MARGIN / _CODES)
    return scales.reshape(1, -1)


# What overflows is met, and refused, at the next layer or behind the last.
@np.errstate(over="ignore", invalid="ignore")
def _project(prefix: str, tensor: Tensor, shape: Shape, states: Float) -> list[Float]:
    """Queries, keys and values, not rotated."""
    weight = tensor(f"{prefix}input_layernorm.weight")
    normed = norm(states, weight, shape.rms_norm_eps)
    modules = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
    return [normed @ tensor(f"{name}.weight").T + tensor(f"{name}.bias") for name in modules]


@np.errstate(over="ignore", invalid="ignore")
def _add_mlp(prefix: str, tensor: Tensor, shape: Shape, states: Float) -> None:
    weight = tensor(f"{prefix}post_attention_layernorm.weight")
    matrices = [tensor(f"{prefix}mlp.{part}_proj.weight").T for part in ("gate", "up", "down")]
    gate, up, down = matrices
    for start in range(0, len(states), _WINDOWS):
        part = states[start : start + _WINDOWS]
        normed = norm(part, weight, shape.rms_norm_eps)
        part += activate(normed @ gate, normed @ up) @ down
