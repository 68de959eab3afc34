"""The KV cache of an MLX runtime: buffers that grow in steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qwen2x.exporters.mlx_model import DTYPES, Cache, FloatCache, Place
from qwen2x.runtimes.cache_file import CacheArrays
from qwen2x.runtimes.memory import free_host_bytes, require_memory

# CUDA's fused decode kernel needs capacities that are a multiple of this.
STEP = 256


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a cache consists of.

    Attributes:
        layers: of the model.
        heads: of keys, and of values.
        parts: columns and type of the buffers [batch, heads, capacity, columns] of one layer.
        names: of these parts.
    """

    layers: int
    heads: int
    parts: tuple[tuple[int, mx.Dtype], ...]
    names: tuple[str, ...]

    @property
    def bytes_per_position(self) -> int:
        """Of all layers, one sequence."""
        row = sum(columns * dtype.size for columns, dtype in self.parts)
        return self.layers * self.heads * row

    def zeros(self, batch: int, capacity: int) -> list[mx.array]:
        """Empty buffers: the parts of layer 0, those of layer 1, ..."""
        return [
            mx.zeros((batch, self.heads, capacity, columns), dtype)
            for _ in range(self.layers)
            for columns, dtype in self.parts
        ]


def float_layout(facts: Mapping[str, Any]) -> Layout:
    """Keys and values in the bundle's float type, by its manifest's ``cache``."""
    part = (int(facts["head_dim"]), DTYPES[facts["dtype"]])
    return Layout(
        layers=int(facts["layers"]),
        heads=int(facts["num_key_value_heads"]),
        parts=(part, part),
        names=("key", "value"),
    )


class BufferedCache(Cache, Protocol):
    """A cache whose arrays can be taken back after a run."""

    buffers: list[mx.array]


class Buffers:
    """The arrays of one cache. Whoever runs a traced step puts its outputs in place of ``arrays``.

    No other reference to the arrays may be kept: MLX writes in place only where it holds the last.
    ``extras`` are what else a cache reads, and does not change.

    Args:
        layout: what to make.
        batch: sequences.
        places: int32, positions of the columns where they are not 0, 1, ...
    """

    def __init__(self, layout: Layout, *, batch: int = 1, places: mx.array | None = None) -> None:
        self.layout = layout
        self._places = places
        self.arrays: list[mx.array] = []
        self.extras: list[mx.array] = []
        self._batch = batch

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return min((int(array.shape[2]) for array in self.arrays), default=0)

    def reserve(self, positions: int) -> None:
        """Makes room for positions in all; what is there stays.

        Raises:
            RequestError: it takes more memory than there is; nothing has changed.
        """
        if positions <= self.capacity:
            return
        capacity = -(-positions // STEP) * STEP
        self.require_memory(capacity)
        if not self.arrays:
            self.arrays = self.layout.zeros(self._batch, capacity)
            return
        # One after the other, so that no more than one of them is there twice.
        for index, array in enumerate(self.arrays):
            batch, heads, positions, columns = array.shape
            more = mx.zeros((batch, heads, capacity - positions, columns), array.dtype)
            self.arrays[index] = mx.concatenate([array, more], axis=2)
            del array
            mx.eval(self.arrays[index])
        # Buffers of the old size would only be kept, never used again.
        mx.clear_cache()

    def cache(self, arrays: list[mx.array], extras: list[mx.array], place: Place) -> BufferedCache:
        """What a model writes to and reads from, over these arrays or traced ones like them."""
        return FloatCache(arrays, place)

    def export(self, length: int) -> CacheArrays:
        """The first positions of the first sequence as NumPy sees them, by layer and part.

        They hold on to the buffers, and are to be let go of before the next step.
        """
        return {
            name: _to_numpy(array[0, :, :length])
            for name, array in zip(self._names(), self.arrays, strict=True)
        }

    def put(self, arrays: CacheArrays, length: int) -> None:
        """Takes over the first positions of the first sequence, one array after the other."""
        for index, name in enumerate(self._names()):
            buffer = self.arrays[index]
            new = _from_numpy(arrays[name][:, :length], buffer.dtype)
            buffer[:1, :, :length] = new[None]
            self.arrays[index] = buffer
            del buffer, new
            mx.eval(self.arrays[index])

    def _names(self) -> list[str]:
        return [
            f"{layer}.{part}" for layer in range(self.layout.layers) for part in self.layout.names
        ]

    def clear(self) -> None:
        """Gives the memory back."""
        self.arrays, self.extras = [], []
        mx.clear_cache()

    def require_memory(self, capacity: int) -> None:
        """Refuses what memory has no room for, with a RequestError."""
        require_memory(
            capacity,
            taken=self.capacity,
            bytes_per_position=self._batch * self.layout.bytes_per_position,
            free=free_bytes(),
        )


def _to_numpy(array: mx.array) -> NDArray[Any]:
    """Shares the memory; NumPy's own types lack bfloat16, which goes through its bits."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16), copy=False).view(bfloat16)
    return np.array(array, copy=False)


def _from_numpy(values: NDArray[Any], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bfloat16:
        return mx.array(np.ascontiguousarray(values).view(np.uint16)).view(mx.bfloat16)
    return mx.array(np.ascontiguousarray(values))


def free_bytes() -> int | None:
    """Memory that arrays on MLX's default device may still take; None where nobody says."""
    device = mx.default_device()
    if device.type == mx.cpu:
        return free_host_bytes()
    info = mx.device_info(device)
    if "free_memory" in info:
        return int(info["free_memory"]) + mx.get_cache_memory()
    limit = info.get("max_recommended_working_set_size")
    return None if limit is None else max(0, int(limit) - mx.get_active_memory())
