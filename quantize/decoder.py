"""What calibration needs of a Qwen2 layer's forward pass, in NumPy.

Axes: W windows of text, S tokens in each, H heads, K key-value heads, D head size. Arithmetic
follows transformers (``modeling_qwen2.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from qwen2x.quantize.groups import Float

# Queries that meet all keys before them at once; later keys are left out.
_QUERIES = 128


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers that a layer is computed with.

    Attributes:
        num_attention_heads: H; head_dim: D; num_key_value_heads: K.
        rms_norm_eps: of the norms.
        inverse_frequencies: float32 [D/2], radians per position.
        attention_factor: YaRN's magnitude, 1 without.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    inverse_frequencies: Float
    attention_factor: float


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a layer's matrices are multiplied with, float32 [W, S, columns].

    Attributes:
        normed: of q, k and v; mixed: of o; normed_again: of gate and up; inner: of down.
    """

    normed: Float
    mixed: Float
    normed_again: Float
    inner: Float


def run_layer(x: Float, layer: Mapping[str, Float], shape: Shape) -> tuple[Float, Inputs]:
    """Hidden states [W, S, hidden] behind a layer, and what its matrices met.

    Args:
        x: hidden states before it.
        layer: its tensors by their names within the layer.
        shape: of the layer.
    """
    epsilon = shape.rms_norm_eps
    normed = norm(x, layer["input_layernorm.weight"], epsilon)
    projected = [
        normed @ layer[f"self_attn.{name}_proj.weight"].T + layer[f"self_attn.{name}_proj.bias"]
        for name in "qkv"
    ]
    mixed = attend(projected, shape)
    x = x + mixed @ layer["self_attn.o_proj.weight"].T
    normed_again = norm(x, layer["post_attention_layernorm.weight"], epsilon)
    gate, up = (normed_again @ layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    inner = activate(gate, up)
    x += inner @ layer["mlp.down_proj.weight"].T
    return x, Inputs(normed=normed, mixed=mixed, normed_again=normed_again, inner=inner)


def norm(x: Float, weight: Float, epsilon: float) -> Float:
    """RMS norm over the last axis."""
    mean = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    normed: Float = x * (1 / np.sqrt(mean + np.float32(epsilon))) * weight
    return normed


def activate(gate: Float, up: Float) -> Float:
    """silu(gate) * up, in the place of ``gate``."""

    def work(index: int) -> None:
        part = gate[index]
        with np.errstate(over="ignore"):
            divisor = np.exp(-part)
        divisor += 1
        part /= divisor
        part *= up[index]

    _side_by_side(work, len(gate))
    return gate


def attend(projected: Sequence[Float], shape: Shape) -> Float:
    """Causal attention [W, S, H*D] within each window.

    Args:
        projected: queries [W, S, H*D], keys and values [W, S, K*D], not rotated yet.
        shape: of the layer.
    """
    queries, keys, values = projected
    mixed = np.empty_like(queries)
    count = queries.shape[1]
    angles = np.arange(count, dtype=np.float32)[:, None] * shape.inverse_frequencies
    factor = np.float32(shape.attention_factor)
    cosines, sines = np.cos(angles) * factor, np.sin(angles) * factor
    groups = shape.num_attention_heads // shape.num_key_value_heads
    room = np.empty(groups * min(_QUERIES, count) * count, np.float32)
    # One after another: the products inside use all cores, and would fight for them.
    for index in range(len(queries)):
        _attend_window(
            _heads(queries[index], shape.num_attention_heads, cosines, sines),
            _heads(keys[index], shape.num_key_value_heads, cosines, sines),
            values[index].reshape(-1, shape.num_key_value_heads, shape.head_dim),
            mixed[index].reshape(-1, shape.num_attention_heads, shape.head_dim),
            room,
        )
    return mixed


def _heads(x: Float, heads: int, cosines: Float, sines: Float) -> Float:
    """Rotated [heads, S, D] of [S, heads*D]."""
    split = x.reshape(len(x), heads, 2, -1)
    first, second = split[:, :, 0], split[:, :, 1]
    turned = np.empty_like(split)
    cosines, sines = cosines[:, None], sines[:, None]
    turned[:, :, 0] = first * cosines - second * sines
    turned[:, :, 1] = second * cosines + first * sines
    return turned.reshape(len(x), heads, -1).transpose(1, 0, 2)


def _attend_window(queries: Float, keys: Float, values: Float, mixed: Float, room: Float) -> None:
    """Fills mixed [S, H, D] from queries [H, S, D], keys [K, S, D] and values [S, K, D]."""
    heads, count, size = queries.shape
    groups = heads // len(keys)
    queries = queries * np.float32(size**-0.5)
    future = np.triu(np.full((_QUERIES, _QUERIES), -np.inf, np.float32), 1)
    for head in range(len(keys)):
        asking = slice(head * groups, (head + 1) * groups)
        for start in range(0, count, _QUERIES):
            stop = min(start + _QUERIES, count)
            rows = groups * (stop - start)
            asked = queries[asking, start:stop].reshape(rows, size)
            scores = np.matmul(
                asked, keys[head, :stop].T, out=room[: rows * stop].reshape(rows, -1)
            )
            own = scores.reshape(groups, -1, stop)[:, :, start:]
            own += future[: stop - start, : stop - start]
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            given = (scores @ values[:stop, head]).reshape(groups, -1, size)
            mixed[start:stop, asking] = given.transpose(1, 0, 2)


def _side_by_side(work: Callable[[int], None], count: int) -> None:
    """Windows on all cores: NumPy lets other threads run while it computes."""
    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        for _ in pool.map(work, range(count)):
            pass
