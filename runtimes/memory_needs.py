"""What a run of tokens takes of memory, and so how many of a prompt are run at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen2x.exporters.bundle import Bundle

# Smaller pieces would read the weights too often.
_LEAST = 16


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """Bytes that grow with a text.

    Attributes:
        per_position: of the KV cache.
        per_token: of activations, for each token that is run at once.
        per_score: of attention, for each of these tokens and each position that it sees; 0 where
            a fused kernel keeps no scores.
        most: tokens that are run at once, beyond which speed is lost; None where more never harm.
    """

    per_position: int = 0
    per_token: int = 0
    per_score: int = 0
    most: int | None = None

    def work_bytes(self, tokens: int, positions: int) -> int:
        """What it takes to run tokens of which the last one sees so many positions."""
        return tokens * (self.per_token + positions * self.per_score)


def activation_bytes(bundle: Bundle) -> int:
    """Of one token in float32: the widest of a layer live together (measured, both targets)."""
    config = bundle.model_config
    return 4 * (9 * config.hidden_size + 3 * config.intermediate_size)


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How a long prompt is run piece by piece.

    Attributes:
        most: tokens that are run at once.
        memory_bytes: that a piece may take beside weights and cache; it is halved until it does
            not, which far into a text it may.
        needs: of the model.
    """

    most: int
    memory_bytes: int
    needs: MemoryNeeds

    def size(self, past: int) -> int:
        """Tokens that are run at once behind so many positions."""
        size = self.most if self.needs.most is None else min(self.most, self.needs.most)
        while size > _LEAST and self.needs.work_bytes(size, past + size) > self.memory_bytes:
            size //= 2
        return size

    def pieces(self, past: int, count: int) -> Iterator[tuple[int, int]]:
        """Start and end of every piece of so many tokens; they depend on what is before alone."""
        start = 0
        while start < count:
            end = min(count, start + self.size(past + start))
            yield start, end
            start = end

    def work_bytes(self, past: int, count: int) -> int:
        """The most that a piece takes."""
        pieces = self.pieces(past, count)
        return max((self.needs.work_bytes(b - a, past + b) for a, b in pieces), default=0)
