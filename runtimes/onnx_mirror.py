"""Rows of a batch that share one KV cache, so that guesses are run as single tokens are.

GroupQueryAttention sums otherwise for several new tokens of one row than for one. Run as a batch in
which each row has one new token, guesses meet the kernel of a decode step; but a row must see the
keys of those before it. So the pages of the cache are mapped several times, one behind the other,
and what looks like the caches of several rows is the same memory. The operator first appends the
new keys and values of all rows, and only then attends: ``ApplyAttentionFlash`` and
``ApplyAttentionQuantizedFlash`` in onnxruntime's contrib_ops/cpu/bert/gqa_attention_base.h (1.32).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.onnx_cache import STEP, SharedCache

_MAP_FIXED = 0x10
_DTYPES = ("float32", "int8")
# Without its tiled kernels the operator appends and attends row by row.
_UNFIT = "ORT_GQA_DISABLE_FLASH_ATTENTION"


def can_mirror(facts: Mapping[str, Any], device: str, max_positions: int) -> bool:
    """Whether a bundle's cache, by its manifest, can be mapped several times here."""
    if device != "cpu" or facts["layout"] != "shared" or facts["dtype"] not in _DTYPES:
        return False
    if not hasattr(os, "memfd_create") or _UNFIT in os.environ:
        return False
    elements = int(facts["num_key_value_heads"]) * int(facts["head_dim"])
    position = elements * np.dtype(facts["dtype"]).itemsize
    return all(count * position % mmap.PAGESIZE == 0 for count in (STEP, max_positions))


class MirroredCache(SharedCache):
    """A ``SharedCache`` whose buffers can also be bound as those of several rows.

    Args:
        cache: what it takes over; that one must not be used any more.
        facts: see ``make_cache``.
        max_positions: see ``make_cache``.
        past: positions of the cache that are in use.
        rows: at most.
    """

    # Each part's pages are mapped anew.
    _is_in_blocks = False

    def __init__(
        self, cache: SharedCache, facts: Mapping[str, Any], max_positions: int, past: int, rows: int
    ) -> None:
        super().__init__(facts, "cpu", max_positions)
        self._rows = rows
        self._buffers = dict(cache._buffers)
        self._expected = cache._expected
        self._grow(past, max(1, cache.capacity))

    def bind_rows(self, binding: Any, rows: int, past: int, total: int) -> None:
        """Binds the buffers as those of so many rows, which are all the same memory."""
        if total > self.capacity:
            self._bound_to = None
            self._grow(past, total)
        for part, buffer in self._buffers.items():
            shape = [rows, *buffer.shape()[1:]]
            place = ("cpu", 0, self._element_type, shape, buffer.data_ptr())
            binding.bind_input(f"past_key_values.{part}", *place)
            binding.bind_output(f"present.{part}", *place)

    def _zeros(self, shape: list[int]) -> Any:
        # A block of one part.
        return _mirrored_zeros(shape, np.dtype(self._host_type), self._rows)


def _mirrored_zeros(shape: list[int], dtype: np.dtype[Any], times: int) -> Any:
    """An array behind whose end the same memory follows again, so many times in all."""
    size = prod(shape) * dtype.itemsize
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def mapped(address: int | None, length: int, protection: int, flags: int, file: int) -> int:
        place = libc.mmap(address, length, protection, flags, file, 0)
        if place is None or place == ctypes.c_void_p(-1).value:
            reason = os.strerror(ctypes.get_errno())
            raise RequestError(
                f"{length} bytes for the KV cache cannot be mapped ({reason}); shorten the prompt, "
                "or do not guess ahead"
            )
        return int(place)

    file = os.memfd_create("qwen2x-kv-cache")
    try:
        os.ftruncate(file, size)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = mapped(None, size * times, 0, private, -1)
        for place in range(start, start + size * times, size):
            fixed = mmap.MAP_SHARED | _MAP_FIXED
            mapped(place, size, mmap.PROT_READ | mmap.PROT_WRITE, fixed, file)
    finally:
        os.close(file)
    memory = (ctypes.c_byte * size).from_address(start)
    weakref.finalize(memory, libc.munmap, start, size * times)
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)
