"""A bundle's MLX folder in MLX: on Metal, on CUDA, or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

# Read by MLX at its first product: float32 means float32 on matrix units too.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import numpy as np

from qwen2x.exporters.bundle import Bundle
from qwen2x.exporters.mlx_model import Slices, Whole, load_model
from qwen2x.quantize.errors import BackendError, RequestError
from qwen2x.runtimes.cache_bookkeeping import CacheBookkeeping, integers
from qwen2x.runtimes.cache_file import CacheArrays
from qwen2x.runtimes.layers import Hidden
from qwen2x.runtimes.mlx_cache import Buffers, float_layout
from qwen2x.runtimes.mlx_int8_cache import Int8Buffers, int8_layout, take_key_biases
from qwen2x.runtimes.mlx_joined import join_projections
from qwen2x.runtimes.mlx_memory import needs_of
from qwen2x.runtimes.mlx_sampler import FAILED, MlxSampler
from qwen2x.runtimes.runtime import DEFAULT_CHUNK, DEFAULT_PREFILL_MEMORY, Logits, TokenIds
from qwen2x.runtimes.sampler import NOT_FINITE, Sampling

# Passes of so few tokens, as of guesses, leave little memory behind that is worth giving back.
_FEW = 16


class MlxRuntime(CacheBookkeeping):
    """One model with one cache; see ``Runtime`` for what its methods give.

    One token is run by a compiled step on Metal, which is traced anew when the cache has grown.
    Elsewhere it is run eagerly: on CUDA a step's mask would cost the fused attention, and on the
    CPU each of its kernels would be built by a C++ compiler first.
    """

    backend = "mlx"

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        prefill_chunk: int = DEFAULT_CHUNK,
        prefill_memory: int = DEFAULT_PREFILL_MEMORY,
        kv_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.bundle = bundle
        self.folder = bundle.folder
        self.device = choose_device(device)
        self.dtype = bundle.dtype
        self.vocab_size = bundle.vocab_size
        self._ropes = bundle.ropes
        self._offer_ropes(bundle.rope_contexts, bundle.own_factor)
        self.eos_token_ids = bundle.eos_token_ids
        self.weight_bytes = bundle.weight_bytes
        self.bits_per_weight = bundle.bits_per_weight
        self.prefill_chunk = prefill_chunk
        self.prefill_memory = prefill_memory
        self.needs = needs_of(bundle, self.device, kv_bits)
        self.cache_dtype = str(bundle.cache["dtype"]) if kv_bits is None else f"int{kv_bits}"
        self._mx_device = mx.cpu if self.device == "cpu" else mx.gpu
        self._is_compiled = self.device == "metal"
        self._compiled: Any = None
        self._compiled_capacity = 0
        layout = float_layout(bundle.cache) if kv_bits is None else int8_layout(bundle.cache)
        with mx.stream(self._mx_device):
            self._model: Any = load_model(
                bundle.folder, bundle.model_config, bundle.quantization, bundle.dtype
            )
            self._make_buffers: Any = partial(Buffers, layout)
            if kv_bits is not None:
                biases, angles = take_key_biases(self._model), self._model.angles
                self._make_buffers = partial(Int8Buffers, layout, biases, angles)
            join_projections(self._model)
        self._apply_rope()
        self._buffers: Buffers = self._make_buffers()

    def logits(
        self,
        token_ids: TokenIds,
        *,
        lengths: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> Logits:
        """See ``Runtime.logits``. Padding stands behind what is valid, which never sees it."""
        _, places = self._require_rows(token_ids, lengths, positions)
        batch, sequence = token_ids.shape
        rows = np.empty((batch, sequence, self.vocab_size), np.float32)
        with mx.stream(self._mx_device):
            columns = mx.array(places, mx.int32)
            buffers = self._make_buffers(batch=batch, places=columns)
            buffers.reserve(sequence)
            for start in range(0, sequence, self.prefill_chunk):
                stop = min(sequence, start + self.prefill_chunk)
                rows[:, start:stop] = self._model(
                    mx.array(token_ids[:, start:stop], mx.int32),
                    columns[start:stop],
                    buffers.cache(buffers.arrays, buffers.extras, Slices(start, stop)),
                    keep=stop - start,
                )
        return rows

    def hidden_states(self, token_ids: TokenIds) -> Hidden:
        """See ``GivesHiddenStates``."""
        count = token_ids.shape[1]
        self._require_rows(token_ids, None, None)
        seen: list[mx.array] = []
        with mx.stream(self._mx_device):
            buffers = self._make_buffers()
            buffers.reserve(count)
            self._model(
                mx.array(token_ids, mx.int32),
                mx.arange(count, dtype=mx.int32),
                buffers.cache(buffers.arrays, buffers.extras, Slices(0, count)),
                keep=count,
                seen=seen,
            )
            return np.stack([np.array(x[0].astype(mx.float32)) for x in seen])

    def sample_ahead(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        context: Sequence[int],
        known: int,
        limit: int,
    ) -> Generator[int, None, None]:
        """See ``SamplesAhead``."""
        token_ids = integers(token_ids)
        self._require_fits(token_ids)
        self._require_room(self.cache_length + len(token_ids) + limit - 1)
        self._reserve(self.cache_length + len(token_ids))
        start, _ = self._pieces(len(token_ids))[-1]
        if start:
            self._run_pieces(token_ids[:start], 1, of=len(token_ids))
        running, past = token_ids[start:], self.cache_length
        with mx.stream(self._mx_device):
            sampler = MlxSampler(sampling, context, min(known, self.vocab_size))
            choice = self._queue(mx.array(running, mx.int32), past, sampler)
        for left in range(limit - 1, -1, -1):
            past += len(running)
            following = self._queue(choice, past, sampler) if left else choice
            token_id = int(np.array(choice)[0])
            self.cached_ids.extend(running)
            if start and left == limit - 1:
                self._tell(len(token_ids), len(token_ids))
            if token_id == FAILED:
                raise RequestError(NOT_FINITE)
            yield token_id
            running, choice = [token_id], following

    def close(self) -> None:
        """Gives model and cache back."""
        self._buffers.clear()
        self._buffers = Buffers(self._buffers.layout)
        self._model = self._compiled = self._make_buffers = None

    def _apply_rope(self) -> None:
        rope = self._ropes[self.rope_factor]
        with mx.stream(self._mx_device):
            self._model.use_rope(mx.array(rope.inverse_frequencies()), rope.attention_factor)
        # Its traces hold the old frequencies.
        self._compiled = None

    def reserve(self, positions: int) -> None:
        """See ``Runtime``. A compiled step sees the whole cache, which is better kept short."""
        if not self._is_compiled:
            super().reserve(positions)
            return
        self._require_room(positions)
        with mx.stream(self._mx_device):
            self._buffers.require_memory(positions)

    def export_cache(self, length: int) -> CacheArrays:
        """See ``SavesCache``."""
        with mx.stream(self._mx_device):
            return self._buffers.export(length)

    def import_cache(self, token_ids: Sequence[int], arrays: CacheArrays) -> None:
        """See ``SavesCache``."""
        token_ids = integers(token_ids)
        self.reset()
        self._require_fits(token_ids)
        self._reserve(len(token_ids))
        with mx.stream(self._mx_device):
            self._buffers.put(arrays, len(token_ids))
        self.cached_ids.extend(token_ids)

    def _reserve(self, length: int) -> None:
        with mx.stream(self._mx_device):
            self._buffers.reserve(length)

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        with mx.stream(self._mx_device):
            rows = self._forward(mx.array(token_ids, mx.int32), self.cache_length, keep)
            mx.eval(rows, self._buffers.arrays)
            kept: Logits = np.array(rows[0])
        if token_ids.shape[1] > _FEW:
            mx.clear_cache()
        return kept

    def _forward(self, token_ids: mx.array, past: int, keep: int) -> mx.array:
        """Logits float32 [1, keep, V], not evaluated yet, of int32 [1, S] behind ``past``."""
        total = past + token_ids.shape[1]
        buffers = self._buffers
        buffers.reserve(total)
        if self._is_compiled and total == past + 1:
            return self._forward_compiled(token_ids, past)
        cache = buffers.cache(buffers.arrays, buffers.extras, Slices(past, total))
        rows: mx.array = self._model(token_ids, mx.arange(past, total), cache, keep)
        return rows

    def _forward_compiled(self, token_ids: mx.array, past: int) -> mx.array:
        buffers = self._buffers
        if self._compiled is None or self._compiled_capacity != buffers.capacity:
            # A new one, so that the traces of smaller caches go.
            self._compiled, self._compiled_capacity = mx.compile(self._step), buffers.capacity
        rows: mx.array
        rows, buffers.arrays = self._compiled(
            token_ids, mx.array([past]), buffers.arrays, buffers.extras
        )
        return rows

    def _step(
        self,
        token_ids: mx.array,
        offset: mx.array,
        arrays: list[mx.array],
        extras: list[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        """One token as a pure function: logits float32 [1, 1, V], and the arrays after it.

        Takes int32 [1, 1], the positions before it int32 [1], and the arrays of the cache.
        """
        place = Whole(offset, 1, arrays[0].shape[2])
        cache = self._buffers.cache(list(arrays), extras, place)
        rows = self._model(token_ids, offset, cache, keep=1)
        return rows, cache.buffers

    def _queue(self, token_ids: mx.array, past: int, sampler: MlxSampler) -> mx.array:
        """Runs int32 [S] behind ``past`` and chooses what follows, int32 [1], asynchronously."""
        with mx.stream(self._mx_device):
            choice = sampler.choose(self._forward(token_ids[None], past, 1)[0, -1])
            mx.async_eval(choice)  # type: ignore[no-untyped-call]
        return choice

    def _truncate_cache(self, length: int) -> None:
        """Later positions are overwritten; an empty cache gives its memory back."""
        if length == 0:
            self._buffers.clear()


def available_devices() -> list[str]:
    """Devices that this MLX can use; the fastest first."""
    gpus = [("metal", mx.metal), ("cuda", getattr(mx, "cuda", None))]
    return [name for name, module in gpus if module and module.is_available()] + ["cpu"]


_INSTALL = {
    "metal": 'needs a Mac with Apple silicon; there, pip install "qwen2x[mlx]"',
    "cuda": 'pip install "mlx[cuda13]" (Linux with an NVIDIA GPU; mlx[cuda12] for older drivers)',
}


def choose_device(device: str) -> str:
    """The device of that name; ``auto`` is the fastest.

    Raises:
        BackendError: it is not here.
    """
    available = available_devices()
    if device == "auto":
        return available[0]
    if device not in ("cpu", *_INSTALL):
        raise BackendError(f"device must be auto, cpu, metal or cuda, got {device!r}")
    if device not in available:
        raise BackendError(
            f"MLX {version('mlx')} has no {device} here: {_INSTALL[device]}; or use --device cpu"
        )
    return device
