"""An MLX folder's ``decode.mlxfn``: static traces of the forward pass, with weights by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from qwen2x.exporters.bundle import Bundle
from qwen2x.quantize.errors import BackendError, BundleError
from qwen2x.runtimes.cache_bookkeeping import CacheBookkeeping
from qwen2x.runtimes.mlx_runtime import choose_device
from qwen2x.runtimes.runtime import Logits, TokenIds

GRAPH_FILE = "decode.mlxfn"
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Fewer new tokens than these run one by one: a padded chunk costs as much as many of them.
_WORTH_A_CHUNK = 8


class MlxGraphRuntime(CacheBookkeeping):
    """See ``Runtime`` for what its methods give, ``exporters/mlx_graph.py`` for the graph.

    Rows that are wanted whole (``logits``, ``append`` with keep) are run token by token, since a
    trace gives the logits of one row.
    """

    backend = "mlx"

    def __init__(self, bundle: Bundle, *, device: str = "auto") -> None:
        super().__init__()
        self.bundle = bundle
        self.folder = bundle.folder
        self.device = choose_device(device)
        self._mx_device = mx.cpu if self.device == "cpu" else mx.gpu
        facts = _require_fit(bundle, self.device)
        self.dtype = bundle.dtype
        self.vocab_size = bundle.vocab_size
        self._ropes = bundle.ropes
        self._has_rope_inputs = bool(facts.get("has_rope_inputs"))
        self._offer_ropes(bundle.rope_contexts, bundle.own_factor)
        self.eos_token_ids = bundle.eos_token_ids
        self.weight_bytes = bundle.weight_bytes
        self.bits_per_weight = bundle.bits_per_weight
        self.prefill_chunk = self._chunk = int(facts["chunk"])
        self._capacities: list[int] = list(facts["capacities"])
        with mx.stream(self._mx_device):
            self._function: Any = _import(bundle)
            self._weights = _load(bundle)
        self._apply_rope()
        self._buffers: list[mx.array] = []

    def logits(
        self,
        token_ids: TokenIds,
        *,
        lengths: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> Logits:
        """See ``Runtime.logits``; what lies behind a row's length stays 0."""
        valid, places = self._require_rows(token_ids, lengths, positions)
        rows = np.zeros((*token_ids.shape, self.vocab_size), np.float32)
        for row, length in enumerate(valid):
            buffers: list[mx.array] = []
            for column in range(length):
                token = token_ids[row : row + 1, column : column + 1]
                rows[row, column] = self._step(token, int(places[column]), column, buffers)
        return rows

    def close(self) -> None:
        """Gives graph, weights and cache back."""
        self._function, self._weights, self._buffers = None, {}, []
        mx.clear_cache()

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        offset, count = self.cache_length, token_ids.shape[1]
        together = count if keep == 1 and count > _WORTH_A_CHUNK else count - keep
        rows = []
        done = 0
        if together > _WORTH_A_CHUNK:
            rows.append(self._advance(token_ids[:, :together], offset))
            done = together
        rows += [
            self._advance(token_ids[:, place : place + 1], offset + place)
            for place in range(done, count)
        ]
        return np.stack(rows[-keep:])

    def _truncate_cache(self, length: int) -> None:
        """Later places are not seen, and written over; an empty cache gives its memory back."""
        if length == 0:
            self._buffers = []
            mx.clear_cache()

    def _apply_rope(self) -> None:
        """Early bundles, and those of one factor, have its numbers in the graph."""
        self._rope_inputs: list[mx.array] = []
        if self._has_rope_inputs:
            rope = self._ropes[self.rope_factor]
            magnitude = np.array([rope.attention_factor], np.float32)
            with mx.stream(self._mx_device):
                parts = rope.inverse_frequencies(), magnitude
                self._rope_inputs = [mx.array(part) for part in parts]

    def _advance(self, token_ids: TokenIds, offset: int) -> Logits:
        return self._step(token_ids, offset, offset, self._buffers)

    def _step(
        self, token_ids: TokenIds, position: int, offset: int, buffers: list[mx.array]
    ) -> Logits:
        """Runs tokens [1, count] at offset; gives the last one's logits [V], renews the buffers."""
        count = token_ids.shape[1]
        traced = 1 if count == 1 else self._chunk
        padded = np.zeros((1, traced), np.int32)
        padded[:, :count] = token_ids
        with mx.stream(self._mx_device):
            self._make_room(buffers, offset + traced)
            inputs = (
                mx.array(padded),
                mx.arange(position, position + traced, dtype=mx.int32),
                mx.array([offset], mx.int32),
                mx.array([count - 1], mx.int32),
                *self._rope_inputs,
            )
            # The list lets go of the old buffers before anything runs: MLX writes in place only
            # where nobody else holds an array.
            logits, *buffers[:] = self._function(*inputs, *buffers, **self._weights)
            mx.eval(logits, buffers)
            row: Logits = np.array(logits[0])
        return row

    def _make_room(self, buffers: list[mx.array], needed: int) -> None:
        """Makes buffers [1, K, C, D], or copies them into the next traced capacity if full."""
        if buffers and buffers[0].shape[2] >= needed:
            return
        capacity = next(size for size in self._capacities if size >= needed)
        cache = self.bundle.cache
        if not buffers:
            shape = (1, cache["num_key_value_heads"], capacity, cache["head_dim"])
            buffers[:] = [mx.zeros(shape, _DTYPES[self.dtype]) for _ in range(2 * cache["layers"])]
            return
        # One after the other, so that no more than one of them is there twice.
        for index, part in enumerate(buffers):
            room = capacity - part.shape[2]
            buffers[index] = mx.pad(part, [(0, 0), (0, 0), (0, room), (0, 0)])
            del part
            mx.eval(buffers[index])


def _require_fit(bundle: Bundle, device: str) -> Mapping[str, Any]:
    """The graph's facts.

    Raises:
        BackendError: there is none, or it is of another version of MLX or kind of device.
    """
    facts: Mapping[str, Any] | None = bundle.manifest.get("graph")
    advice = "export it again with --to mlx --graph here, or run it without --graph"
    if facts is None:
        raise BackendError(f"{bundle.folder} has no {GRAPH_FILE}; {advice}")
    for what, here in (("mlx", version("mlx")), ("device", device)):
        if facts[what] != here:
            raise BackendError(
                f"{bundle.folder / GRAPH_FILE} was traced with {what} {facts[what]}, here is "
                f"{here}; {advice}"
            )
    return facts


def _import(bundle: Bundle) -> Any:
    try:
        return mx.import_function(str(bundle.folder / GRAPH_FILE))
    except (RuntimeError, ValueError) as error:
        raise BundleError(
            f"{bundle.folder / GRAPH_FILE} cannot be read ({str(error).splitlines()[0]}); "
            "export the bundle again"
        ) from None


def _load(bundle: Bundle) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    for path in sorted(bundle.folder.glob("model*.safetensors")):
        loaded: Any = mx.load(str(path))
        weights |= loaded
    return weights
