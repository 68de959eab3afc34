"""A bundle's graph in ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qwen2x.exporters.bundle import PREFILL_FILE, Bundle
from qwen2x.exporters.onnx_decode import ATTEND_BY_PRODUCTS, graph_with_products
from qwen2x.exporters.onnx_probe import plain_graph, probed_graph
from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.cache_bookkeeping import CacheBookkeeping, integers
from qwen2x.runtimes.cache_file import CacheArrays
from qwen2x.runtimes.huge_pages import use_huge_pages
from qwen2x.runtimes.layers import Hidden
from qwen2x.runtimes.onnx_cache import (
    BindsCache,
    ConcatenatedCache,
    OnnxCache,
    SharedCache,
    make_cache,
)
from qwen2x.runtimes.onnx_memory import needs_of
from qwen2x.runtimes.onnx_mirror import MirroredCache, can_mirror
from qwen2x.runtimes.onnx_prefill import LEAST_ROWS, PromptGraph
from qwen2x.runtimes.onnx_provider import Start, choose_device, sums_are_exact
from qwen2x.runtimes.onnx_session import (
    GRAPH_FILE,
    not_runnable,
    open_session,
    recorded_runs,
    start_session,
)
from qwen2x.runtimes.profile import GraphRun
from qwen2x.runtimes.runtime import DEFAULT_CHUNK, DEFAULT_PREFILL_MEMORY, Logits, TokenIds

_MIRRORED_ROWS = 16
# Below so many positions one operator attends faster than several products do.
_LEAST_POSITIONS = 1024


class OnnxRuntime(CacheBookkeeping):
    """One session with one cache; see ``Runtime`` for what its methods give."""

    backend = "onnx"

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        threads: int | None = None,
        prefill_chunk: int = DEFAULT_CHUNK,
        record: bool = False,
        prefill_memory: int = DEFAULT_PREFILL_MEMORY,
        room: int | None = None,
    ) -> None:
        super().__init__()
        self._record = tempfile.TemporaryDirectory() if record else None
        self.bundle = bundle
        self.folder = bundle.folder
        self.device = choose_device(bundle, device)
        self.dtype = bundle.dtype
        self.vocab_size = bundle.vocab_size
        self._offer_ropes(bundle.rope_contexts, bundle.own_factor)
        self.eos_token_ids = bundle.eos_token_ids
        self.weight_bytes = bundle.weight_bytes
        self.bits_per_weight = bundle.bits_per_weight
        self.prefill_chunk = prefill_chunk
        self.prefill_memory = prefill_memory
        self.needs = needs_of(bundle, self.device, None)
        self.cache_dtype = str(bundle.cache["dtype"])
        record_folder = Path(self._record.name) if self._record else None
        self.products_from = _LEAST_POSITIONS
        self.has_products = False
        self._room = room
        self._session: Any = self._open(
            Start(device=self.device, threads=threads, record=record_folder)
        )
        self._run_options: Any = None
        self._cache: OnnxCache = make_cache(bundle.cache, self.device, self.max_context)
        self._binding: Any = self._session.io_binding()
        self._mask = np.ones((1, 256), np.int64)
        self._prompts: PromptGraph | None = None
        if self.device == "cpu":
            use_huge_pages(self.weight_bytes)
            if bundle.has_prefill and sums_are_exact():
                start = Start(device="cpu", threads=threads, record=record_folder)
                self._prompts = PromptGraph(lambda: self._open_prompts(start))

    def logits(
        self,
        token_ids: TokenIds,
        *,
        lengths: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> Logits:
        """See ``Runtime.logits``."""
        valid, places = self._require_rows(token_ids, lengths, positions)
        batch, sequence = token_ids.shape
        # GroupQueryAttention takes a first call's positions as consecutive: a jump begins a chunk.
        starts = [0, *(np.flatnonzero(np.diff(places) > 1) + 1).tolist()]
        if len(starts) > 1 and batch > 1:
            raise RequestError(f"positions that jump need a single row, got {batch}")
        mask = np.arange(sequence)[None] < np.array(valid)[:, None]
        cache = ConcatenatedCache(self.bundle.cache, self.device, batch)
        rows = np.empty((batch, sequence, self.vocab_size), np.float32)
        for start, stop in zip(starts, [*starts[1:], sequence], strict=True):
            ids = token_ids[:, start:stop]
            inputs = graph_inputs(
                ids, mask[:, :stop], np.broadcast_to(places[start:stop], ids.shape), 0
            )
            inputs |= self._rope_inputs(batch)
            binding = self._session.io_binding()
            self._run_bound(binding, inputs, rows[:, start:stop], cache, start, stop)
            cache.collect(binding)
        return rows

    def plain_logits(self, token_ids: TokenIds) -> Logits:
        """See ``GivesPlainLogits``; another session takes this one's place for it."""
        graph, chosen = plain_graph(self.folder / GRAPH_FILE), self._session
        self._session = open_session(self.bundle, Start(device=self.device), graph)
        try:
            return self.logits(token_ids)
        finally:
            self._session = chosen

    def hidden_states(self, token_ids: TokenIds) -> Hidden:
        """See ``GivesHiddenStates``; a second session is opened for it, and closed."""
        valid, places = self._require_rows(token_ids, None, None)
        path, layers = self.folder / GRAPH_FILE, self.bundle.cache["layers"]
        graph, names = probed_graph(path, layers)
        session = open_session(self.bundle, Start(device=self.device), graph)
        binding = session.io_binding()
        mask = np.ones_like(token_ids)
        inputs = graph_inputs(token_ids, mask, np.broadcast_to(places, token_ids.shape), 0)
        inputs |= self._rope_inputs(len(token_ids))
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, "cpu")
        ConcatenatedCache(self.bundle.cache, self.device, 1).bind(binding, 0, valid[0])
        session.run_with_iobinding(binding)
        rows = [value.numpy()[0] for value in binding.get_outputs()[: len(names)]]
        return np.stack([row.astype(np.float32) for row in rows])

    def recorded_runs(self) -> list[GraphRun]:
        """See ``RecordsRuns``; none, if the runtime was not opened to record them."""
        if self._record is None:
            return []
        runs = recorded_runs(self._session)
        if self._prompts is not None:
            runs += self._prompts.recorded_runs()
        self._record.cleanup()
        self._record = None
        return sorted(runs, key=lambda run: run.started)

    def close(self) -> None:
        """Gives session and cache back."""
        self.recorded_runs()
        self._binding = None
        self._cache.truncate(0)
        self._session = self._prompts = None

    @property
    def reads_prompts_in_int8(self) -> bool:
        """See ``ReadsPromptsInInt8``."""
        return self._prompts is not None

    def export_cache(self, length: int) -> CacheArrays:
        """See ``SavesCache``."""
        return self._cache.export(length)

    def import_cache(self, token_ids: Sequence[int], arrays: CacheArrays) -> None:
        """See ``SavesCache``."""
        token_ids = integers(token_ids)
        self.reset()
        self._require_fits(token_ids)
        self._reserve(len(token_ids))
        self._cache.put(arrays, len(token_ids))
        self.cached_ids.extend(token_ids)

    def reserve(self, positions: int) -> None:
        """See ``Runtime``; the cache grows while it is filled."""
        self._require_room(positions)
        self._cache.expect(positions)

    def _reserve(self, length: int) -> None:
        self._cache.reserve(self.cache_length, length)

    def _open(self, start: Start) -> Any:
        # The choice costs 20 us for each layer of a step.
        is_long = self._room is None or self._room >= self.products_from
        wants_choice = self.device == "cpu" and is_long
        graph = graph_with_products(self.folder / GRAPH_FILE) if wants_choice else None
        self.has_products = graph is not None
        return open_session(self.bundle, start, graph)

    def _open_prompts(self, start: Start) -> Any:
        session = start_session(self.bundle, start, self.folder / PREFILL_FILE)
        use_huge_pages(self.bundle.prefill_bytes)
        return session

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        kept = self.run_row(self._cache, token_ids, self.cache_length, keep, self._binding)
        self._cache.collect(self._binding)
        return kept

    def _fill(self, token_ids: TokenIds) -> None:
        if not self.fill_row(self._cache, token_ids, self.cache_length):
            super()._fill(token_ids)

    def run_row(
        self, cache: BindsCache, token_ids: TokenIds, past: int, keep: int, binding: Any = None
    ) -> Logits:
        """Runs tokens of one sequence behind a cache of one row; logits float32 [keep, vocab].

        Args:
            cache: it is not told what was run.
            token_ids: int64 [1, sequence].
            past: positions that are in the cache.
            keep: logits of the last so many tokens.
            binding: of the session, to be used again; None makes one.
        """
        total = past + token_ids.shape[1]
        if keep == 1 and self.fill_row(cache, token_ids[:, :-1], past):
            token_ids, past = token_ids[:, -1:], total - 1
        positions = np.arange(past, total)[None]
        rows = np.empty((1, keep, self.vocab_size), np.float32)
        inputs = graph_inputs(token_ids, self._ones(total), positions, keep)
        inputs |= self._rope_inputs(1) | self._attention_inputs(cache, positions)
        binding = self._session.io_binding() if binding is None else binding
        self._run_bound(binding, inputs, rows, cache, past, total)
        kept: Logits = rows[0]
        return kept

    def fill_row(self, cache: BindsCache, token_ids: TokenIds, past: int) -> bool:
        """Puts tokens [1, sequence] into a cache of one row by the graph that reads prompts.

        Returns:
            False where there is none, or the tokens are few; then nothing was done.
        """
        if self._prompts is None or token_ids.shape[1] < LEAST_ROWS:
            return False
        total = past + token_ids.shape[1]
        inputs = graph_inputs(token_ids, self._ones(total), np.arange(past, total)[None], 1)
        del inputs["num_logits_to_keep"]
        try:
            self._prompts.run(inputs | self._rope_inputs(1), cache, past, total)
        except Exception as error:
            raise not_runnable(self.bundle, error, PREFILL_FILE) from None
        return True

    def _ones(self, total: int) -> NDArray[np.int64]:
        """A mask that hides nothing: [1, total]."""
        if total > self._mask.shape[1]:
            self._mask = np.ones((1, 2 * total), np.int64)
        return self._mask[:, :total]

    def decode_guessed(self, token_ids: Sequence[int]) -> Logits:
        """See ``Runtime``; on the CPU each token is run as a row of its own, on one cache."""
        token_ids = integers(token_ids)
        past, rows = self.cache_length, len(token_ids)
        cache = self._mirrored_cache() if 1 < rows <= _MIRRORED_ROWS and past else None
        if cache is None:
            return super().decode_guessed(token_ids)
        self._require_fits(token_ids)
        cache.reserve(past, past + rows)
        # Each row attends in the way that it would alone.
        alone = (row for row in range(rows) if self._by_products(cache, past + row + np.ones(1)))
        split = next(alone, rows)
        guessed = [
            self._run_as_rows(cache, token_ids[start:stop], past + start)
            for start, stop in ((0, split), (split, rows))
            if start < stop
        ]
        self.cached_ids.extend(token_ids)
        return np.concatenate(guessed)

    def _run_as_rows(self, cache: MirroredCache, token_ids: list[int], past: int) -> Logits:
        """Logits float32 [S, vocab] of tokens behind ``past`` positions, each a row of its own."""
        rows = len(token_ids)
        positions = past + np.arange(rows)[:, None]
        mask = np.arange(past + rows)[None] <= positions
        new = np.array(token_ids, np.int64)[:, None]
        logits: Logits = self.run_rows(_AsRows(cache, past, rows), new, mask, positions, 1)[:, 0]
        return logits

    def _by_products(self, cache: BindsCache, lengths: NDArray[Any]) -> bool:
        """Whether new tokens at the ends of rows so long [batch] attend by products."""
        if not self.has_products or lengths.max() > cache.capacity:
            return False
        if self.products_from == 0:
            return True
        # Products go through all of the buffers, in less than half the time per position.
        is_worth_it = lengths.size * cache.capacity <= 2 * lengths.sum()
        return bool(is_worth_it and lengths.min() >= self.products_from)

    def _attention_inputs(self, cache: BindsCache, positions: TokenIds) -> dict[str, Any]:
        """How tokens at these positions [batch, sequence] attend, where there is a choice."""
        if not self.has_products:
            return {}
        has_single = positions.shape[1] == 1
        chosen = has_single and self._by_products(cache, positions[:, 0] + 1)
        return {ATTEND_BY_PRODUCTS: ort.OrtValue.ortvalue_from_numpy(np.array(chosen))}

    def _mirrored_cache(self) -> MirroredCache | None:
        """The cache, taken over by one that several rows can share; None where that cannot be."""
        cache = self._cache
        if isinstance(cache, MirroredCache):
            return cache
        facts, most = self.bundle.cache, self.max_context
        if not isinstance(cache, SharedCache) or not can_mirror(facts, self.device, most):
            return None
        mirrored = MirroredCache(cache, facts, most, self.cache_length, _MIRRORED_ROWS)
        self._cache = mirrored
        self._binding = self._session.io_binding()
        return mirrored

    def _rope_inputs(self, rows: int) -> dict[str, Any]:
        """Which YaRN factor is in use, where there is a choice."""
        if len(self.rope_contexts) == 1:
            return {}
        index = np.full(rows, self._rope_index, np.int64)
        return {"rope_index": ort.OrtValue.ortvalue_from_numpy(index)}

    @property
    def _rope_index(self) -> int:
        """Of the segment that belongs to the factor in use."""
        return list(self.rope_contexts).index(self.rope_factor)

    def run_rows(
        self, cache: BindsCache, token_ids: TokenIds, mask: Any, positions: TokenIds, keep: int
    ) -> Logits:
        """Runs rows behind a cache of the caller's; logits float32 [batch, keep, vocab].

        Args:
            cache: of the batch; it is not told what was run.
            token_ids: int64 [batch, sequence].
            mask: [batch, total], which positions of the cache and the new ones are valid.
            positions: int64 [batch, sequence].
            keep: logits of the last so many tokens.
        """
        rows = np.empty((len(token_ids), keep, self.vocab_size), np.float32)
        total = mask.shape[1]
        past = total - token_ids.shape[1]
        inputs = graph_inputs(token_ids, mask, positions, keep)
        inputs |= self._rope_inputs(len(token_ids)) | self._attention_inputs(cache, positions)
        self._run_bound(self._session.io_binding(), inputs, rows, cache, past, total)
        return rows

    def _run_bound(
        self,
        binding: Any,
        inputs: dict[str, Any],
        rows: Logits,
        cache: BindsCache,
        past: int,
        total: int,
    ) -> None:
        """Runs the graph, which writes into rows. Arrays behind OrtValues must outlive the run."""
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        logits = ort.OrtValue.ortvalue_from_numpy(rows)
        binding.bind_ortvalue_output("logits", logits)
        cache.bind(binding, past, total)
        self._execute(binding, self._run_options)

    def _execute(self, binding: Any, run_options: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, run_options)
        except Exception as error:
            raise not_runnable(self.bundle, error) from None

    def _truncate_cache(self, length: int) -> None:
        self._cache.truncate(length)
        if length == 0:
            # The bindings hold references to the old buffers.
            self._binding = self._session.io_binding()
            if self._prompts is not None:
                self._prompts.forget()


class _AsRows:
    """A mirrored cache that is bound as those of several rows."""

    def __init__(self, cache: MirroredCache, past: int, rows: int) -> None:
        self._cache, self._past, self._rows = cache, past, rows
        self.capacity = cache.capacity

    def bind(self, binding: Any, past: int, total: int) -> None:
        """See ``BindsCache``; what is there already ends where the first row does."""
        self._cache.bind_rows(binding, self._rows, self._past, total)


def graph_inputs(token_ids: TokenIds, mask: Any, positions: TokenIds, keep: int) -> dict[str, Any]:
    """Inputs of a run as OrtValues of the host, by name."""
    # bind_cpu_input does not know inputs that have a default; an OrtValue is not looked up.
    values = {
        "input_ids": token_ids,
        "attention_mask": mask,
        "position_ids": positions,
        "num_logits_to_keep": keep,
    }
    return {
        name: ort.OrtValue.ortvalue_from_numpy(np.require(value, np.int64, "C"))
        for name, value in values.items()
    }
