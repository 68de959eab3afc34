"""The KV cache of an ONNX session: one buffer that past and present share, or concatenated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from ml_dtypes import bfloat16

from qwen2x.runtimes.cache_file import CacheArrays
from qwen2x.runtimes.memory import require_memory
from qwen2x.runtimes.onnx_memory import free_bytes

STEP = 256
# A step is this part of the buffer, where that is more.
_STEPS = 16
# Parts are allocated together up to so many bytes: NumPy asks Linux for pages of 2 MB only where an
# array is large, and a step that reads the cache waits for addresses in pages of 4 KB.
_BLOCK = 64 << 20
_BFLOAT16 = 16
_ELEMENT_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": _BFLOAT16,
    "int8": np.int8,
}


class BindsCache(Protocol):
    """Binds keys and values of all layers to a run."""

    @property
    def capacity(self) -> int:
        """Positions of the buffers that past and present share; 0 where they do not."""
        ...

    def bind(self, binding: Any, past: int, total: int) -> None:
        """Binds past keys and values of ``past`` positions, and room for ``total``."""
        ...


class OnnxCache(BindsCache, Protocol):
    """Keys and values that stay from one run to the next."""

    def reserve(self, past: int, total: int) -> None:
        """Makes room for ``total`` positions, of which ``past`` are there.

        Raises:
            RequestError: it takes more memory than there is; nothing has changed.
        """
        ...

    def expect(self, total: int) -> None:
        """Told how long the cache may become; it grows towards that when it must.

        Raises:
            RequestError: it takes more memory than there is; nothing has changed.
        """
        ...

    def collect(self, binding: Any) -> None:
        """Takes over what the run wrote."""
        ...

    def truncate(self, length: int) -> None:
        """Keeps the first ``length`` positions."""
        ...

    def export(self, length: int) -> CacheArrays:
        """The first positions [heads, length, head size], by layer and part; views on the CPU."""
        ...

    def put(self, arrays: CacheArrays, length: int) -> None:
        """Takes over what ``export`` gave; there is room for it."""
        ...


def make_cache(facts: Mapping[str, Any], device: str, max_positions: int) -> OnnxCache:
    """The cache that a bundle's manifest describes."""
    if facts["layout"] == "shared":
        return SharedCache(facts, device, max_positions)
    return ConcatenatedCache(facts, device)


class _Layout:
    def __init__(self, facts: Mapping[str, Any], device: str) -> None:
        self._heads = int(facts["num_key_value_heads"])
        self._head_dim = int(facts["head_dim"])
        self._element_type = _ELEMENT_TYPES[facts["dtype"]]
        self._device = device
        self._parts = [
            f"{layer}.{part}" for layer in range(facts["layers"]) for part in ("key", "value")
        ]

    def _shape(self, length: int, batch: int = 1) -> list[int]:
        return [batch, self._heads, length, self._head_dim]


class SharedCache(_Layout):
    """One buffer per part that GroupQueryAttention appends to in place; it grows in steps.

    A step is 256 positions or a sixteenth of the buffer, whichever is more, so that the copies cost
    a constant share of the work; no step goes beyond what is expected. Steps are small since a
    single token attends to all of the buffer (``onnx_decode``). On CUDA a copy goes through the
    host. Buffers are bound by their address, since NumPy has no bfloat16: they hold it
    as uint16, which can be copied.
    """

    _is_in_blocks = True

    def __init__(
        self,
        facts: Mapping[str, Any],
        device: str,
        max_positions: int,
        *,
        is_kept: bool = False,
    ) -> None:
        super().__init__(facts, device)
        is_bfloat16 = self._element_type == _BFLOAT16
        self._host_type: Any = np.uint16 if is_bfloat16 else self._element_type
        self._max_positions = max_positions
        self._buffers: dict[str, Any] = {}
        self._bound_to: Any = None
        self._is_kept = is_kept
        self._expected = 0
        self._capacity = 0
        # Counts up when buffers move: whoever holds their addresses binds anew.
        self.generation = 0

    @property
    def capacity(self) -> int:
        """See ``BindsCache``."""
        return self._capacity

    def reserve(self, past: int, total: int) -> None:
        """See ``OnnxCache``. What is reserved at once is never copied."""
        if total > self.capacity:
            self._bound_to = None
            self._grow(past, total)

    def expect(self, total: int) -> None:
        """See ``OnnxCache``."""
        self._require_memory(self._rounded(total))
        self._expected = total

    def bind(self, binding: Any, past: int, total: int) -> None:
        """See ``OnnxCache``."""
        self.reserve(past, total)
        if self._bound_to is binding:
            return
        for part, buffer in self._buffers.items():
            place = (self._device, 0, self._element_type, buffer.shape(), buffer.data_ptr())
            binding.bind_input(f"past_key_values.{part}", *place)
            binding.bind_output(f"present.{part}", *place)
        self._bound_to = binding

    def collect(self, binding: Any) -> None:
        """Nothing to do: the run wrote into the buffers."""

    def truncate(self, length: int) -> None:
        """Nothing to do: later positions are overwritten. An empty cache gives its memory back.

        One that ``is_kept`` does not: a captured step goes on to use its addresses.
        """
        if length == 0 and not self._is_kept:
            self._bound_to = None
            self._buffers.clear()
            self._capacity = 0

    def export(self, length: int) -> CacheArrays:
        """See ``OnnxCache``."""
        if length == 0:
            empty = self._typed(np.empty(self._shape(0)[1:], self._host_type))
            return dict.fromkeys(self._parts, empty)
        return {
            part: self._typed(buffer.numpy()[0, :, :length])
            for part, buffer in self._buffers.items()
        }

    def put(self, arrays: CacheArrays, length: int) -> None:
        """See ``OnnxCache``."""
        for part, buffer in self._buffers.items():
            values = buffer.numpy()
            self._typed(values)[0, :, :length] = arrays[part][:, :length]
            if self._device != "cpu":
                buffer.update_inplace(values)

    def _typed(self, values: Any) -> Any:
        return values.view(bfloat16) if self._element_type == _BFLOAT16 else values

    def _grow(self, past: int, total: int) -> None:
        self.generation += 1
        step = max(STEP, self.capacity // _STEPS)
        wanted = max(total, self.capacity + step)
        if total <= self._expected:
            # An end that is as near as a step is gone to at once.
            is_near = self._expected <= total + total // _STEPS
            wanted = self._expected if is_near else min(wanted, self._expected)
        capacity = self._rounded(wanted)
        self._require_memory(capacity)
        shape = self._shape(capacity)
        size = math.prod(shape) * np.dtype(self._host_type).itemsize
        together = max(1, _BLOCK // size) if self._is_in_blocks else 1
        for first in range(0, len(self._parts), together):
            parts = self._parts[first : first + together]
            block = self._zeros([len(parts), *shape])
            for part, values in zip(parts, block, strict=True):
                if past:
                    # A view of the old buffer's memory, which lives while the buffer does.
                    values[:, :, :past] = self._buffers[part].numpy()[:, :, :past]
                # On the CPU the OrtValue stands on this very array and keeps it alive.
                self._buffers[part] = ort.OrtValue.ortvalue_from_numpy(values, self._device, 0)
        # Last: after an interruption some buffers are larger, and the next call grows all again.
        self._capacity = capacity

    def _rounded(self, positions: int) -> int:
        return min(-(-positions // STEP) * STEP, self._max_positions)

    def _require_memory(self, positions: int) -> None:
        size = math.prod(self._shape(1)) * np.dtype(self._host_type).itemsize
        require_memory(
            positions,
            taken=self.capacity,
            bytes_per_position=len(self._parts) * size,
            free=free_bytes(self._device),
        )

    def _zeros(self, shape: list[int]) -> Any:
        return np.zeros(shape, self._host_type)


class ConcatenatedCache(_Layout):
    """Each run gives new, longer keys and values, which are the next run's past."""

    def __init__(self, facts: Mapping[str, Any], device: str, batch: int = 1) -> None:
        super().__init__(facts, device)
        shape = self._shape(0, batch)
        self._values: dict[str, Any] = {
            part: ort.OrtValue.ortvalue_from_shape_and_type(shape, self._element_type, device, 0)
            for part in self._parts
        }

    @property
    def capacity(self) -> int:
        """See ``BindsCache``: nothing is shared."""
        return 0

    def reserve(self, past: int, total: int) -> None:
        """Nothing to do: a run makes its room."""

    def expect(self, total: int) -> None:
        """Nothing to do."""

    def bind(self, binding: Any, past: int, total: int) -> None:
        """See ``OnnxCache``."""
        for part, value in self._values.items():
            binding.bind_ortvalue_input(f"past_key_values.{part}", value)
            binding.bind_output(f"present.{part}", self._device)

    def collect(self, binding: Any) -> None:
        """See ``OnnxCache``."""
        # Outputs come in the order of binding, logits first.
        outputs = binding.get_outputs()[-len(self._parts) :]
        self._values = dict(zip(self._parts, outputs, strict=True))

    def truncate(self, length: int) -> None:
        """See ``OnnxCache``."""
        self._values = {part: self._cut(value, length) for part, value in self._values.items()}

    def export(self, length: int) -> CacheArrays:
        """See ``OnnxCache``."""
        return {part: value.numpy()[0, :, :length] for part, value in self._values.items()}

    def put(self, arrays: CacheArrays, length: int) -> None:
        """See ``OnnxCache``."""
        self._values = {
            part: ort.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(arrays[part][None, :, :length]), self._device, 0
            )
            for part in self._parts
        }

    def _cut(self, value: Any, length: int) -> Any:
        # A copy: the old memory goes with its OrtValue.
        values = value.numpy()[:, :, :length].copy()
        return ort.OrtValue.ortvalue_from_numpy(values, self._device, 0)
