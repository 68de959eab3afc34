"""A bundle's graph on a device of its own memory: cache, logits and their search stay there."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwen2x.exporters.bundle import Bundle
from qwen2x.exporters.onnx_candidates import graph_with_candidates
from qwen2x.runtimes.cache_bookkeeping import integers
from qwen2x.runtimes.onnx_cache import SharedCache
from qwen2x.runtimes.onnx_provider import PROVIDERS, Start, choose_device
from qwen2x.runtimes.onnx_runtime import OnnxRuntime, graph_inputs
from qwen2x.runtimes.onnx_session import GRAPH_FILE, not_runnable, open_session
from qwen2x.runtimes.onnx_step import DecodeStep, no_capture
from qwen2x.runtimes.runtime import Logits, TokenIds
from qwen2x.runtimes.sampler import Sampler, Sampling

# The likeliest tokens that come back from the device; a checkpoint's top-k is 20, as a rule.
CANDIDATES = 64
# Positions that are reserved for an answer of any length before the cache has to grow.
_ANSWER = 1024


def open_onnx(
    bundle: Bundle, *, device: str = "auto", record: bool = False, **options: Any
) -> OnnxRuntime:
    """The runtime that is right for a device; one that records its runs captures none.

    Options are those of ``OnnxRuntime``.
    """
    chosen = choose_device(bundle, device)
    is_resident = PROVIDERS[chosen].has_own_memory and bundle.cache["layout"] == "shared"
    options |= {"device": chosen, "record": record}
    if is_resident:
        return DeviceRuntime(bundle, is_captured=not record, **options)
    return OnnxRuntime(bundle, **options)


class DeviceRuntime(OnnxRuntime):
    """An ``OnnxRuntime`` that leaves on the device what the host does not ask for.

    A step of one token is captured as a CUDA graph. The graph finds the likeliest tokens itself;
    only where they do not decide the choice does the whole row of logits come to the host. On the
    CPU the same code runs without a capture, which is how it is tested.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        is_captured: bool = True,
        **options: Any,
    ) -> None:
        self._is_captured = is_captured
        self._count = min(CANDIDATES, bundle.vocab_size)
        super().__init__(bundle, **options)
        self._run_options = no_capture()
        self._cache: SharedCache = SharedCache(
            bundle.cache, self.device, self.max_context, is_kept=True
        )
        self._step = DecodeStep(
            self._session.io_binding,
            self.device,
            vocab_size=self.vocab_size,
            count=self._count,
            has_ropes=len(self.rope_contexts) > 1,
        )

    def sample_ahead(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        context: Sequence[int],
        known: int,
        limit: int,
    ) -> Generator[int, None, None]:
        """See ``SamplesAhead``; no step is queued here, since the host chooses every token."""
        running = integers(token_ids)
        self._require_fits(running)
        total = self.cache_length + len(running)
        self._require_room(total + limit - 1)
        self._reserve(total + min(limit, _ANSWER))
        start = (len(running) - 1) // self.prefill_chunk * self.prefill_chunk
        if start:
            self.append(running[:start])
            running = running[start:]
        sampler = Sampler(sampling, context)
        for _ in range(limit):
            self._advance(running)
            token_id = sampler.choose_among(*self._step.candidates(), known)
            if token_id is None:
                token_id = sampler.choose(self._step.logits()[0, :known])
            yield token_id
            running = [token_id]

    def decode_guessed(self, token_ids: Sequence[int]) -> Logits:
        """See ``Runtime``."""
        return self.append(token_ids, keep=len(token_ids))

    def close(self) -> None:
        """Gives session, cache and buffers back."""
        super().close()
        self._step.close()

    def _open(self, start: Start) -> Any:
        graph = graph_with_candidates(self.folder / GRAPH_FILE, self.vocab_size, self._count)
        return open_session(self.bundle, replace(start, is_captured=self._is_captured), graph)

    def _advance(self, token_ids: list[int]) -> None:
        """Runs tokens behind the cache and leaves on the device what follows them."""
        past = self.cache_length
        if len(token_ids) == 1:
            self._reserve(past + 1)
            self._step.run(token_ids[0], past, self._cache, self._execute, self._rope_index)
        else:
            total = past + len(token_ids)
            positions = np.arange(past, total)[None]
            mask = np.ones((1, total), np.int64)
            inputs = graph_inputs(np.array([token_ids], np.int64), mask, positions, 1)
            inputs |= self._rope_inputs(1)
            self._step.run_prompt(inputs, past, total, self._cache, self._execute)
        self.cached_ids.extend(token_ids)

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        if token_ids.shape[1] > 1:
            return super()._run(token_ids, keep)
        token_id, past = int(token_ids[0, 0]), self.cache_length
        self._step.run(token_id, past, self._cache, self._execute, self._rope_index)
        return self._step.logits()

    def reserve(self, positions: int) -> None:
        """See ``Runtime``; all of it at once, since a captured graph is bound to its buffers."""
        self._require_room(positions)
        self._reserve(positions)

    def _reserve(self, length: int) -> None:
        """Doubles the cache at least, since a captured graph stays in memory when it grows."""
        length, capacity = min(length, self.max_context), self._cache.capacity
        if length > capacity:
            try:
                self._cache.reserve(self.cache_length, max(length, 2 * capacity))
            except Exception as error:
                raise not_runnable(self.bundle, error) from None
