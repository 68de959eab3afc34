"""The KV cache of an MLX runtime: buffers that grow in steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from qwen2x.exporters.mlx_model import DTYPES, Cache, FloatCache, Place
from qwen2x.quantize.errors import RequestError

# CUDA's fused decode kernel needs capacities that are a multiple of this.
STEP = 256


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a cache consists of.

    Attributes:
        layers: of the model.
        heads: of keys, and of values.
        parts: columns and type of the buffers [batch, heads, capacity, columns] of one layer.
    """

    layers: int
    heads: int
    parts: tuple[tuple[int, mx.Dtype], ...]

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
        layers=int(facts["layers"]), heads=int(facts["num_key_value_heads"]), parts=(part, part)
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
        self._require_memory(capacity)
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

    def clear(self) -> None:
        """Gives the memory back."""
        self.arrays, self.extras = [], []
        mx.clear_cache()

    def _require_memory(self, capacity: int) -> None:
        new = self._batch * self.layout.bytes_per_position * (capacity - self.capacity)
        free = free_bytes()
        if free is not None and new > free:
            raise RequestError(
                f"a KV cache for {capacity} positions needs {_gigabytes(new)} more memory, "
                f"{_gigabytes(free)} are free; shorten the prompt, ask for fewer tokens, "
                "or use an 8-bit cache"
            )


def free_bytes() -> int | None:
    """Memory that arrays on MLX's default device may still take; None where nobody says."""
    device = mx.default_device()
    if device.type == mx.cpu:
        return _free_host_bytes()
    info = mx.device_info(device)
    if "free_memory" in info:
        return int(info["free_memory"]) + mx.get_cache_memory()
    limit = info.get("max_recommended_working_set_size")
    return None if limit is None else max(0, int(limit) - mx.get_active_memory())


def _free_host_bytes() -> int | None:
    """What Linux calls available, within the control group's limit; else all of the memory."""
    found = [_meminfo_available(), _control_group_rest()]
    known = [value for value in found if value is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) << 10 if kilobytes else None


def _control_group_rest() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
