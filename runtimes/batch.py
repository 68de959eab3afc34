"""Several sequences in one session: each has its own cache, and they decode together.

A decode step reads every weight once, for one token or for several, so that tokens of several
sequences cost little more than one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

from qwen2x.quantize.errors import BackendError, RequestError
from qwen2x.runtimes.runtime import Logits, Runtime


class Slot(Protocol):
    """One sequence of a batch; see ``Runtime`` for what its members give."""

    cached_ids: list[int]

    @property
    def cache_length(self) -> int:
        """Positions in the cache."""
        ...

    def append(self, token_ids: Sequence[int], keep: int = 1) -> Logits:
        """Runs tokens of this sequence alone; logits float32 [keep, vocab] of the last."""
        ...

    def prefill(self, token_ids: Sequence[int]) -> Logits:
        """Runs a prompt, in chunks, and gives the last row's logits [vocab]."""
        ...

    def truncate(self, length: int) -> None:
        """Drops the cache beyond ``length`` positions."""
        ...

    def close(self) -> None:
        """Leaves the batch."""
        ...


class Batch(Protocol):
    """Sequences that share weights and decode steps."""

    def open_slot(self) -> Slot:
        """A new, empty sequence.

        Raises:
            RequestError: all slots are taken.
        """
        ...

    def decode(self, tokens: Sequence[tuple[Slot, int]]) -> Logits:
        """Runs one token of each of these sequences; logits float32 [sequences, vocab]."""
        ...

    def close(self) -> None:
        """Gives the memory of the caches back."""
        ...


def open_batch(runtime: Runtime, slots: int) -> Batch:
    """A batch over a runtime's weights; the runtime's own cache is another one.

    Args:
        runtime: of an ONNX bundle on the CPU; it must outlive the batch.
        slots: sequences at most.

    Raises:
        BackendError: this runtime decodes sequences one by one.
        RequestError: no slots.
    """
    if slots < 1:
        raise RequestError(f"a batch needs 1 slot or more, got {slots}")
    if (runtime.backend, runtime.device) != ("onnx", "cpu"):
        raise BackendError(
            f"batches run on onnx and cpu, this is {runtime.backend} on {runtime.device}; "
            "decode one by one, or export with --to onnx --device cpu"
        )
    module: Any = importlib.import_module("qwen2x.runtimes.onnx_batch")
    return cast(Batch, module.OnnxBatch(runtime, slots))
