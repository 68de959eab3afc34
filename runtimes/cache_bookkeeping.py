"""What every runtime with one cache does alike: checks, pieces of prompts, and what is cached."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.memory_needs import Chunking, MemoryNeeds
from qwen2x.runtimes.ropes import OffersRopes
from qwen2x.runtimes.runtime import (
    DEFAULT_CHUNK,
    DEFAULT_PREFILL_MEMORY,
    Logits,
    OnPrefill,
    TokenIds,
)


class CacheBookkeeping(OffersRopes):
    """What every runtime with one cache does alike: checks, chunks, and which tokens are in it.

    A subclass implements ``_run`` (append a chunk, give the logits of its last rows) and
    ``_truncate_cache``; it may implement ``_reserve`` (make room before the first chunk).
    """

    vocab_size: int
    needs = MemoryNeeds()
    prefill_chunk: int = DEFAULT_CHUNK
    prefill_memory: int = DEFAULT_PREFILL_MEMORY
    on_prefill: OnPrefill | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cached_ids: list[int] = []

    @property
    def cache_length(self) -> int:
        """See ``Runtime``."""
        return len(self.cached_ids)

    def append(self, token_ids: Sequence[int], keep: int = 1) -> Logits:
        """See ``Runtime``."""
        token_ids = integers(token_ids)
        self._require_fits(token_ids)
        if not 1 <= keep <= len(token_ids):
            raise RequestError(f"keep must be in 1..{len(token_ids)}, got {keep}")
        self._reserve(self.cache_length + len(token_ids))
        return self._run_pieces(token_ids, keep, of=len(token_ids))

    def _run_pieces(self, token_ids: list[int], keep: int, *, of: int) -> Logits:
        """Runs tokens piece by piece; with those that will follow they are so many."""
        has_several = len(self._pieces(of)) > 1
        if has_several:
            self._tell(0, of)
        rows: list[Logits] = []
        for start, end in self._pieces(len(token_ids)):
            chunk = token_ids[start:end]
            wanted = max(0, min(len(chunk), end - (len(token_ids) - keep)))
            ids = np.array([chunk], np.int64)
            if wanted:
                rows.append(self._run(ids, wanted))
            else:
                self._fill(ids)
            self.cached_ids.extend(chunk)
            if has_several:
                self._tell(end, of)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def prefill(self, token_ids: Sequence[int]) -> Logits:
        """See ``Runtime``."""
        last: Logits = self.append(token_ids)[-1]
        return last

    def decode(self, token_id: int) -> Logits:
        """See ``Runtime``."""
        last: Logits = self.append([token_id])[-1]
        return last

    def reserve(self, positions: int) -> None:
        """See ``Runtime``."""
        self._require_room(positions)
        self._reserve(positions)

    def decode_guessed(self, token_ids: Sequence[int]) -> Logits:
        """See ``Runtime``."""
        return self.append(token_ids, keep=len(token_ids))

    def truncate(self, length: int) -> None:
        """See ``Runtime``."""
        if not 0 <= length <= self.cache_length:
            raise RequestError(f"truncate needs 0..{self.cache_length} positions, got {length}")
        if length < self.cache_length:
            self._truncate_cache(length)
            del self.cached_ids[length:]

    def reset(self) -> None:
        """See ``Runtime``."""
        self.truncate(0)

    def close(self) -> None:
        """Gives the memory back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tell(self, done: int, total: int) -> None:
        if self.on_prefill is not None:
            self.on_prefill(done, total)

    def _pieces(self, count: int) -> list[tuple[int, int]]:
        """Start and end of what is run at once, of so many tokens behind the cache."""
        chunking = Chunking(
            most=self.prefill_chunk, memory_bytes=self.prefill_memory, needs=self.needs
        )
        return list(chunking.pieces(self.cache_length, count))

    def _reserve(self, length: int) -> None:
        """Told the length that the cache is about to have."""

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        raise NotImplementedError

    def _fill(self, token_ids: TokenIds) -> None:
        """Runs a chunk whose logits nobody wants."""
        self._run(token_ids, 1)

    def _truncate_cache(self, length: int) -> None:
        raise NotImplementedError

    def _require_fits(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("expected at least one token, got none")
        wrong = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise RequestError(f"token ids must be in 0..{self.vocab_size - 1}, got {wrong[0]}")
        self._require_room(self.cache_length + len(token_ids))

    def _require_room(self, needed: int) -> None:
        if needed > self.rope_context:
            raise RequestError(
                f"{needed} positions are needed, the context has "
                f"{self.rope_context}{self.with_factor}; "
                "shorten the prompt"
            )

    def _require_rows(
        self,
        token_ids: TokenIds,
        lengths: Sequence[int] | None,
        positions: Sequence[int] | None,
    ) -> tuple[list[int], TokenIds]:
        """Checks the arguments of ``logits``; gives lengths of rows and positions of columns."""
        if token_ids.ndim != 2 or token_ids.size == 0:
            raise RequestError(
                f"expected token ids [batch, sequence] with tokens, got shape {token_ids.shape}"
            )
        batch, sequence = token_ids.shape
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise RequestError(f"token ids must be in 0..{self.vocab_size - 1}, got {wrong}")
        taken = [sequence] * batch if lengths is None else list(lengths)
        if len(taken) != batch or not all(1 <= length <= sequence for length in taken):
            raise RequestError(
                f"expected {batch} lengths in 1..{sequence}, one per row, got {taken}"
            )
        places = np.array(integers(range(sequence) if positions is None else positions), np.int64)
        if len(places) != sequence or (np.diff(places) < 1).any():
            raise RequestError(f"expected {sequence} rising positions, got {places.tolist()!r:.80}")
        if places[0] < 0 or places[-1] >= self.rope_context:
            raise RequestError(
                f"positions {places[0]}..{places[-1]} are needed, the "
                f"context has 0..{self.rope_context - 1}{self.with_factor}; shorten the rows"
            )
        return taken, places


def integers(token_ids: Sequence[Any]) -> list[int]:
    """Plain integers, of NumPy's integers too."""
    try:
        return [operator.index(token) for token in token_ids]
    except TypeError:
        raise RequestError(f"token ids must be integers, got {token_ids!r:.80}") from None
