"""A KV cache in 8 bits that Qwen2's key biases do not spoil.

The bias of a key projection reaches hundreds on Qwen2 (transformers #35185), and codes of a group
that holds such a number tell its other numbers apart no more. Rotation is linear, so a key is
R(W x) + R(b): codes stand for the first term alone, and what the second adds to a score is computed
exactly. With query q (rotated) and halves 1 and 2 of its D columns, at position p with angles a,

    q . R_p b = (q1 b1 + q2 b2) . cos a + (q2 b1 - q1 b2) . sin a

which is one matrix product with a table of cosines and sines that all layers and heads share.
Axes as in ``exporters/mlx_model.py``; G query heads share a key head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from qwen2x.exporters.mlx_model import Place, Qwen2
from qwen2x.quantize.errors import BackendError
from qwen2x.runtimes.mlx_cache import BufferedCache, Buffers, Layout

BITS = 8
_GROUP_SIZES = (64, 32)
# Codes, scales and biases, of keys and of values.
_PARTS = 3


def int8_layout(facts: Mapping[str, Any]) -> Layout:
    """Buffers of a bundle's cache in 8 bits, with float32 scales, by its manifest's ``cache``.

    Raises:
        BackendError: no group size divides the head size.
    """
    head_dim = int(facts["head_dim"])
    group_size = next((size for size in _GROUP_SIZES if head_dim % size == 0), None)
    if group_size is None:
        raise BackendError(
            f"an 8-bit cache needs a head_dim that is a multiple of 32, got {head_dim}; "
            "leave out --kv-bits (kv_bits)"
        )
    scales = (head_dim // group_size, mx.float32)
    parts = ((head_dim * BITS // 32, mx.uint32), scales, scales)
    return Layout(
        layers=int(facts["layers"]),
        heads=int(facts["num_key_value_heads"]),
        parts=parts * 2,
        names=tuple(
            f"{part}.{kind}" for part in ("key", "value") for kind in ("codes", "scales", "biases")
        ),
    )


def take_key_biases(model: Qwen2) -> list[mx.array]:
    """Takes the biases out of a model's key projections: float32 [K, 1, D] per layer."""
    taken = []
    for layer in model.model.layers:
        bias: mx.array = layer.self_attn.k_proj.pop("bias")
        taken.append(bias.astype(mx.float32).reshape(layer.self_attn.key_value_heads, 1, -1))
    return taken


class Int8Buffers(Buffers):
    """Buffers of 8-bit keys and values, and the table of their positions.

    Args:
        layout: what ``int8_layout`` gave.
        key_biases: what ``take_key_biases`` gave.
        angles: gives cosines and sines of positions, as ``Qwen2.angles``.
        batch: see ``Buffers``.
        places: see ``Buffers``.
    """

    def __init__(
        self,
        layout: Layout,
        key_biases: Sequence[mx.array],
        angles: Callable[[mx.array], tuple[mx.array, mx.array]],
        *,
        batch: int = 1,
        places: mx.array | None = None,
    ) -> None:
        super().__init__(layout, batch=batch, places=places)
        self._key_biases = key_biases
        self._angles = angles

    def reserve(self, positions: int) -> None:
        """See ``Buffers``."""
        super().reserve(positions)
        places = mx.arange(self.capacity) if self._places is None else self._places
        if not self.extras or self.extras[0].shape[0] != places.size:
            self.extras = [mx.concatenate([*self._angles(places)], axis=-1)]
            mx.eval(self.extras)

    def cache(self, arrays: list[mx.array], extras: list[mx.array], place: Place) -> BufferedCache:
        """See ``Buffers``."""
        return Int8Cache(arrays, place, self._key_biases, extras[0])


class Int8Cache:
    """Keys without their bias, and values, in 8 bits; 6 buffers per layer as in ``int8_layout``.

    Args:
        buffers: of all layers.
        place: where new positions go.
        key_biases: what ``take_key_biases`` gave.
        table: float32 [C, D], cosines and sines of the cache's positions.
    """

    def __init__(
        self,
        buffers: list[mx.array],
        place: Place,
        key_biases: Sequence[mx.array],
        table: mx.array,
    ) -> None:
        self.buffers = buffers
        self._place = place
        self._key_biases = key_biases
        self._table = table

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """See ``Cache``; scores, softmax and sums are in float32."""
        batch, _, count, head_dim = queries.shape
        seen_keys = self._write(2 * layer, keys)
        seen_values = self._write(2 * layer + 1, values)
        scaled = queries.astype(mx.float32) * head_dim**-0.5
        # [B, K, G S, D]: heads of a group lie one after the other.
        grouped = scaled.reshape(batch, keys.shape[1], -1, head_dim)
        scores = _product(grouped, seen_keys, transpose=True)
        scores = scores + self._share_of_bias(layer, grouped, scores.shape[-1])
        scores = self._masked(scores, count)
        mixed = _product(mx.softmax(scores, axis=-1), seen_values, transpose=False)
        return mixed.reshape(queries.shape).astype(queries.dtype)

    def _write(self, index: int, new: mx.array) -> list[mx.array]:
        """Quantizes [B, K, S, D] into its place; gives codes, scales and biases to see."""
        group_size = new.shape[-1] // self.buffers[_PARTS * index + 1].shape[-1]
        parts = mx.quantize(new.astype(mx.float32), group_size=group_size, bits=BITS)
        return [
            self._place.write(self.buffers, _PARTS * index + part, values)
            for part, values in enumerate(parts)
        ]

    def _share_of_bias(self, layer: int, queries: mx.array, positions: int) -> mx.array:
        """What the bias in each key adds to the scores: [B, K, G S, positions]."""
        query_halves = mx.split(queries, 2, axis=-1)
        bias_halves = mx.split(self._key_biases[layer], 2, axis=-1)
        (q1, q2), (b1, b2) = query_halves, bias_halves
        factors = mx.concatenate([q1 * b1 + q2 * b2, q2 * b1 - q1 * b2], axis=-1)
        return factors @ self._table[:positions].T

    def _masked(self, scores: mx.array, count: int) -> mx.array:
        """Scores with those of positions behind a query's own at minus infinity."""
        mask, positions = self._place.mask(count), scores.shape[-1]
        if mask is None:
            return scores
        if isinstance(mask, str):
            mask = mx.arange(positions) <= mx.arange(positions - count, positions)[:, None]
        by_query = scores.reshape(*scores.shape[:2], -1, count, positions)
        return mx.where(mask, by_query, -mx.inf).reshape(scores.shape)


def _product(x: mx.array, quantized: list[mx.array], *, transpose: bool) -> mx.array:
    codes, scales, biases = quantized
    columns = codes.shape[-1] * 32 // BITS
    return mx.quantized_matmul(
        x,
        codes,
        scales,
        biases,
        transpose=transpose,
        group_size=columns // scales.shape[-1],
        bits=BITS,
    )
