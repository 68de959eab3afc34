"""What of a text two models are compared on, and the places where they differ most in words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2x.runtimes.surprises import Surprise, TokenProbability
    from qwen2x.runtimes.tokenizer import Tokenizer

BUILT_IN_NAME = "built-in"
_BEFORE = 24

TextProbability = tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The tokens that are compared, cut into windows of ``window`` tokens, and their text's name.

    A name is never a path, which would tell others about the machine.
    """

    name: str
    window: int
    windows: Sequence[Sequence[int]]

    def to_json(self) -> dict[str, Any]:
        """How a manifest records it: the hash is of the token ids, int64 little-endian."""
        import numpy as np

        ids = np.concatenate([np.asarray(part, "<i8") for part in self.windows])
        return {
            "name": self.name,
            "tokens": len(ids),
            "window": self.window,
            "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        }

    def in_words(self, worst: Sequence[Surprise], tokenizer: Tokenizer) -> list[WorstPlace]:
        """The worst positions of a comparison with the text that stands there."""
        return [self._tell(surprise, tokenizer) for surprise in worst]

    def _tell(self, surprise: Surprise, tokenizer: Tokenizer) -> WorstPlace:
        # All windows but the last are of equal length.
        window = self.windows[surprise.position // self.window]
        end = surprise.position % self.window + 1
        followed = tokenizer.decode([window[end]]) if end < len(window) else None

        def told(tokens: Sequence[TokenProbability]) -> tuple[TextProbability, ...]:
            return tuple((tokenizer.decode([token]), share) for token, share in tokens)

        return WorstPlace(
            position=surprise.position,
            kl=surprise.kl,
            before=tokenizer.decode(window[max(0, end - _BEFORE) : end]),
            followed=followed,
            reference=told(surprise.reference),
            candidate=told(surprise.candidate),
        )


@dataclass(frozen=True, kw_only=True)
class WorstPlace:
    """The text before a position, what followed there, and what both models expected."""

    position: int
    kl: float
    before: str
    followed: str | None
    reference: tuple[TextProbability, ...]
    candidate: tuple[TextProbability, ...]


def text_name(path: Path | None) -> str:
    """What the text of ``--text`` is called in a record."""
    return BUILT_IN_NAME if path is None else path.name
