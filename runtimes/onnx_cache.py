"""The KV cache of an ONNX session: one buffer that past and present share, or concatenated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

STEP = 256
_ELEMENT_TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": 16}


class OnnxCache(Protocol):
    """Binds keys and values of all layers to a run."""

    def bind(self, binding: Any, past: int, total: int) -> None:
        """Binds past keys and values of ``past`` positions, and room for ``total``."""
        ...

    def collect(self, binding: Any) -> None:
        """Takes over what the run wrote."""
        ...

    def truncate(self, length: int) -> None:
        """Keeps the first ``length`` positions."""
        ...


def make_cache(facts: Mapping[str, Any], device: str) -> OnnxCache:
    """The cache that a bundle's manifest describes."""
    if facts["layout"] == "shared":
        return SharedCache(facts, device)
    return ConcatenatedCache(facts, device)


class _Names:
    def __init__(self, facts: Mapping[str, Any], device: str) -> None:
        self._heads = int(facts["num_key_value_heads"])
        self._head_dim = int(facts["head_dim"])
        self._element_type = _ELEMENT_TYPES[facts["dtype"]]
        self._device = device
        self._parts = [
            f"{layer}.{part}" for layer in range(facts["layers"]) for part in ("key", "value")
        ]

    def _allocate(self, length: int, batch: int = 1) -> Any:
        shape = [batch, self._heads, length, self._head_dim]
        if self._device == "cpu" and self._element_type != 16:
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._element_type))
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, self._element_type, self._device, 0)

    def _upload(self, values: Any) -> Any:
        """Keys or values, as ``OrtValue.numpy`` gave them, back on the device."""
        values = np.ascontiguousarray(values)
        if self._element_type == 16:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), 16)
        return ort.OrtValue.ortvalue_from_numpy(values, self._device, 0)


class SharedCache(_Names):
    """One buffer per part that GroupQueryAttention appends to in place; it grows in steps.

    A step is 256 positions or a quarter of the buffer, whichever is more, so that the copies cost
    a constant share of the work. On CUDA a copy goes through the host.
    """

    def __init__(self, facts: Mapping[str, Any], device: str) -> None:
        super().__init__(facts, device)
        self._buffers: dict[str, Any] = {}
        self.capacity = 0

    def bind(self, binding: Any, past: int, total: int) -> None:
        """See ``OnnxCache``."""
        if total > self.capacity:
            self._grow(past, total)
        for part, buffer in self._buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{part}", buffer)
            binding.bind_ortvalue_output(f"present.{part}", buffer)

    def collect(self, binding: Any) -> None:
        """Nothing to do: the run wrote into the buffers."""

    def truncate(self, length: int) -> None:
        """Nothing to do: later positions are overwritten. An empty cache gives its memory back."""
        if length == 0:
            self._buffers.clear()
            self.capacity = 0

    def _grow(self, past: int, total: int) -> None:
        step = max(STEP, self.capacity // 4)
        self.capacity = -(-max(total, self.capacity + step) // STEP) * STEP
        for part in self._parts:
            old, new = self._buffers.get(part), self._allocate(self.capacity)
            if old is not None and past:
                values = new.numpy()
                values[:, :, :past] = old.numpy()[:, :, :past]
                new = self._upload(values)
            self._buffers[part] = new


class ConcatenatedCache(_Names):
    """Each run gives new, longer keys and values, which are the next run's past."""

    def __init__(self, facts: Mapping[str, Any], device: str, batch: int = 1) -> None:
        super().__init__(facts, device)
        self._values: dict[str, Any] = {part: self._allocate(0, batch) for part in self._parts}

    def bind(self, binding: Any, past: int, total: int) -> None:
        """See ``OnnxCache``."""
        for part, value in self._values.items():
            binding.bind_ortvalue_input(f"past_key_values.{part}", value)
            binding.bind_output(f"present.{part}", self._device)

    def collect(self, binding: Any) -> None:
        """See ``OnnxCache``."""
        outputs = binding.get_outputs()
        names = [f"present.{part}" for part in self._parts]
        # Outputs come in the order of binding, logits first.
        for name, value in zip(names, outputs[-len(names) :], strict=True):
            self._values[name.removeprefix("present.")] = value

    def truncate(self, length: int) -> None:
        """See ``OnnxCache``."""
        for part, value in self._values.items():
            self._values[part] = self._upload(value.numpy()[:, :, :length])
