"""A batch in ONNX Runtime: slots are rows of one KV buffer that GroupQueryAttention appends to.

It takes a batch only where each row has one new token; then rows may have any lengths, told by a
mask padded on the right. So a prompt runs alone, on a view of its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.cache_bookkeeping import CacheBookkeeping
from qwen2x.runtimes.onnx_cache import STEP
from qwen2x.runtimes.onnx_runtime import OnnxRuntime
from qwen2x.runtimes.runtime import Logits, TokenIds


class OnnxBatch:
    """See ``Batch``. Slots in use are the first rows: where one is closed, the last moves in."""

    def __init__(self, runtime: OnnxRuntime, slots: int) -> None:
        self.runtime = runtime
        self._slots: list[OnnxSlot] = []
        self._most = slots
        facts = runtime.bundle.cache
        self._heads, self._head_dim = int(facts["num_key_value_heads"]), int(facts["head_dim"])
        self._dtype = np.dtype(facts["dtype"])
        self._parts = [
            f"{layer}.{part}" for layer in range(facts["layers"]) for part in ("key", "value")
        ]
        self._capacity = 0
        # By part: [slots, heads, capacity, head_dim].
        self._buffers: dict[str, NDArray[Any]] = {}

    def open_slot(self) -> OnnxSlot:
        """See ``Batch``."""
        if len(self._slots) == self._most:
            raise RequestError(f"all {self._most} slots are taken; close one first")
        slot = OnnxSlot(self)
        self._slots.append(slot)
        return slot

    def decode(self, tokens: Sequence[tuple[OnnxSlot, int]]) -> Logits:
        """See ``Batch``. Rows that lie side by side run together."""
        by_row: dict[int, int] = {}
        for slot, token in tokens:
            slot.require_fits(token)
            by_row[self._slots.index(slot)] = token
        if len(by_row) < len(tokens) or not tokens:
            raise RequestError(f"expected one token of each of several slots, got {len(tokens)}")
        self.reserve(1 + max(slot.cache_length for slot, _ in tokens))
        logits: dict[int, Logits] = {}
        for first, stop in _stretches(sorted(by_row)):
            rows = range(first, stop)
            ids = np.array([[by_row[row]] for row in rows], np.int64)
            past = np.array([[self._slots[row].cache_length] for row in rows], np.int64)
            mask = np.arange(past.max() + 1)[None] <= past
            found = self.runtime.run_rows(self._view(first, stop), ids, mask, past, 1)
            logits |= dict(zip(rows, found[:, 0], strict=True))
            for row in rows:
                self._slots[row].cached_ids.append(by_row[row])
        return np.stack([logits[self._slots.index(slot)] for slot, _ in tokens])

    def close(self) -> None:
        """See ``Batch``."""
        self._slots, self._capacity = [], 0
        self._buffers = {}

    def run_alone(self, slot: OnnxSlot, token_ids: TokenIds, keep: int) -> Logits:
        """Runs tokens int64 [1, S] of one slot; logits float32 [keep, vocab]."""
        return self.runtime.run_row(self._row_of(slot), token_ids, slot.cache_length, keep)

    def fill_alone(self, slot: OnnxSlot, token_ids: TokenIds) -> bool:
        """Puts tokens int64 [1, S] into the slot, where there is a graph that reads prompts."""
        return self.runtime.fill_row(self._row_of(slot), token_ids, slot.cache_length)

    def reserve(self, positions: int) -> None:
        """Makes room for so many positions in every row; what is there stays."""
        if positions <= self._capacity:
            return
        more = max(positions, self._capacity + max(STEP, self._capacity // 4))
        capacity = min(-(-more // STEP) * STEP, self.runtime.rope_context)
        shape = (self._most, self._heads, capacity, self._head_dim)
        for part in self._parts:
            values = np.zeros(shape, self._dtype)
            for row, slot in enumerate(self._slots):
                length = slot.cache_length
                if length:
                    values[row, :, :length] = self._buffers[part][row, :, :length]
            self._buffers[part] = values
        self._capacity = capacity

    def release(self, slot: OnnxSlot) -> None:
        """Frees a slot's row."""
        row = self._slots.index(slot)
        last = self._slots.pop()
        if last is slot:
            return
        length = last.cache_length
        for buffer in self._buffers.values():
            buffer[row, :, :length] = buffer[len(self._slots), :, :length]
        self._slots[row] = last

    def _row_of(self, slot: OnnxSlot) -> _Rows:
        row = self._slots.index(slot)
        return self._view(row, row + 1)

    def _view(self, first: int, stop: int) -> _Rows:
        arrays = {part: buffer[first:stop] for part, buffer in self._buffers.items()}
        return _Rows(arrays, self._capacity)


class OnnxSlot(CacheBookkeeping):
    """See ``Slot``."""

    def __init__(self, batch: OnnxBatch) -> None:
        super().__init__()
        self._batch = batch
        # The factor that the runtime has when its slots run.
        runtime = batch.runtime
        self.max_context = runtime.rope_context
        self.vocab_size = runtime.vocab_size
        # A prompt is read in the pieces that it is read in alone.
        self.prefill_chunk = runtime.prefill_chunk
        self.prefill_memory, self.needs = runtime.prefill_memory, runtime.needs

    def require_fits(self, token_id: int) -> None:
        """Raises RequestError for a token that is none, or for which there is no room."""
        self._require_fits([token_id])

    def close(self) -> None:
        """See ``Slot``."""
        self._batch.release(self)
        self.cached_ids = []

    def _reserve(self, length: int) -> None:
        self._batch.reserve(length)

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        return self._batch.run_alone(self, token_ids, keep)

    def _fill(self, token_ids: TokenIds) -> None:
        if not self._batch.fill_alone(self, token_ids):
            super()._fill(token_ids)

    def _truncate_cache(self, length: int) -> None:
        """Later positions are overwritten."""


class _Rows:
    """Some rows of the buffers, as the cache of a run."""

    def __init__(self, arrays: dict[str, NDArray[Any]], capacity: int) -> None:
        self._arrays = arrays
        self.capacity = capacity

    def bind(self, binding: Any, past: int, total: int) -> None:
        """See ``BindsCache``."""
        for part, array in self._arrays.items():
            place = ("cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            binding.bind_input(f"past_key_values.{part}", *place)
            binding.bind_output(f"present.{part}", *place)


def _stretches(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and end of every stretch of rising numbers without a gap."""
    first = rows[0]
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if following != row + 1:
            yield first, row + 1
            first = following if following is not None else first
