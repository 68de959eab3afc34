"""One token's run, bound once: what differs between two steps is written in place.

Letters: S new tokens, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qwen2x.exporters.onnx_candidates import IDS, LOGITS
from qwen2x.runtimes.onnx_cache import SharedCache
from qwen2x.runtimes.runtime import Logits, TokenIds

# Execute(binding, run options).
Execute = Callable[[Any, Any], None]
# The entry of the run's options that names a captured graph, and what forbids a capture.
_GRAPH_ID, _NO_GRAPH = "gpu_graph_id", "-1"
# Inputs of one number each, which go before the mask; the last one is for bundles with factors.
_NUMBERS = ("input_ids", "position_ids", "rope_index")
_ID_BYTES, _LOGIT_BYTES = 8, 4


def no_capture() -> Any:
    """Options of a run that is not captured, in a session that captures."""
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, _NO_GRAPH)
    return options


class DecodeStep:
    """Runs tokens behind a cache; a single one with inputs and outputs at fixed addresses.

    The mask of a single token covers the whole capacity, so its shapes stay the same until the
    cache grows. Then everything is bound anew, and a session that captures captures a new graph.
    """

    def __init__(
        self,
        new_binding: Callable[[], Any],
        device: str,
        *,
        vocab_size: int,
        count: int,
        has_ropes: bool,
    ) -> None:
        self._numbers = _NUMBERS if has_ropes else _NUMBERS[:-1]
        self._new_binding = new_binding
        self._device = device
        self._count = count
        self._logits = self._empty([1, 1, vocab_size], np.float32)
        # Ids int64 [K], then logits float32 [K]: one copy brings both.
        self._candidates = self._empty([count * (_ID_BYTES + _LOGIT_BYTES)], np.uint8)
        self._keep_one = ort.OrtValue.ortvalue_from_numpy(np.array(1, np.int64))
        self._generation = 0
        self._binding: Any = None
        self._inputs: Any = None
        self._values = np.empty(0, np.int64)
        self._options: Any = None

    def run(
        self, token_id: int, past: int, cache: SharedCache, execute: Execute, rope_index: int
    ) -> None:
        """Runs one token behind ``past`` positions."""
        cache.reserve(past, past + 1)
        if cache.generation != self._generation:
            self._bind_to(cache.capacity)
            self._options = ort.RunOptions()
            self._options.add_run_config_entry(_GRAPH_ID, str(cache.generation))
            self._generation = cache.generation
        values = self._values
        head = len(self._numbers)
        values[:head] = (token_id, past, rope_index)[:head]
        values[head : head + past + 1] = 1
        values[head + past + 1 :] = 0
        self._inputs.update_inplace(values)
        cache.bind(self._binding, past, past + 1)
        execute(self._binding, self._options)

    def run_prompt(
        self, inputs: dict[str, Any], past: int, total: int, cache: SharedCache, execute: Execute
    ) -> None:
        """Runs tokens that ``inputs`` describes; what is kept of them is the last row."""
        binding = self._new_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        self._bind_outputs(binding)
        cache.bind(binding, past, total)
        execute(binding, no_capture())

    def candidates(self) -> tuple[TokenIds, Logits]:
        """Ids int64 [K], rising, and logits float32 [K] of the likeliest tokens of the last run."""
        found: NDArray[np.uint8] = self._candidates.numpy()
        cut = self._count * _ID_BYTES
        ids, logits = found[:cut].view(np.int64), found[cut:].view(np.float32)
        order = np.argsort(ids)
        return ids[order], logits[order]

    def logits(self) -> Logits:
        """All logits float32 [1, V] of the last run."""
        row: Logits = self._logits.numpy()[0]
        return row.copy()

    def close(self) -> None:
        """Gives the memory back."""
        self._binding = self._inputs = self._logits = self._candidates = None

    def _bind_to(self, capacity: int) -> None:
        self._binding = self._new_binding()
        self._values = np.zeros(len(self._numbers) + capacity, np.int64)
        self._inputs = self._empty([len(self._values)], np.int64)
        address = self._inputs.data_ptr()
        shapes = {name: [1, 1] for name in self._numbers} | {"attention_mask": [1, capacity]}
        shapes |= {name: [1] for name in self._numbers if name == "rope_index"}
        for name, shape in shapes.items():
            self._binding.bind_input(name, self._device, 0, np.int64, shape, address)
            address += shape[-1] * _ID_BYTES
        self._binding.bind_ortvalue_input("num_logits_to_keep", self._keep_one)
        self._bind_outputs(self._binding)

    def _bind_outputs(self, binding: Any) -> None:
        address = self._candidates.data_ptr()
        shape = [1, self._count]
        binding.bind_ortvalue_output("logits", self._logits)
        binding.bind_output(IDS, self._device, 0, np.int64, shape, address)
        address += self._count * _ID_BYTES
        binding.bind_output(LOGITS, self._device, 0, np.float32, shape, address)

    def _empty(self, shape: list[int], element_type: Any) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type, self._device, 0)
