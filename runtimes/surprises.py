"""The positions where a candidate is farthest from its reference, and what each would say there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_KEPT = 8
_TOP = 3

TokenProbability = tuple[int, float]


@dataclass(frozen=True, kw_only=True)
class Surprise:
    """One position, counted over all windows, with the likeliest next tokens of both.

    Attributes:
        position: of the last token that was read.
        kl: nats there.
        reference: token ids with their probabilities, likeliest first.
        candidate: the same of the candidate.
    """

    position: int
    kl: float
    reference: tuple[TokenProbability, ...]
    candidate: tuple[TokenProbability, ...]


class Surprises:
    """Keeps the worst positions of rows that come in blocks, so that no row needs to be kept."""

    def __init__(self) -> None:
        self._kept: list[Surprise] = []

    def add(
        self,
        start: int,
        kl: NDArray[np.float64],
        reference: NDArray[np.float64],
        candidate: NDArray[np.float64],
    ) -> None:
        """Looks at rows of log-probabilities [rows, vocab], the first at position ``start``."""
        # What is no number is worse than any number.
        badness = np.where(np.isnan(kl), np.inf, kl)
        for row in np.argsort(-badness, kind="stable")[:_KEPT]:
            self._kept.append(
                Surprise(
                    position=start + int(row),
                    kl=float(badness[row]),
                    reference=_likeliest(reference[row]),
                    candidate=_likeliest(candidate[row]),
                )
            )
        self._kept.sort(key=lambda surprise: -surprise.kl)
        del self._kept[_KEPT:]

    @property
    def worst(self) -> tuple[Surprise, ...]:
        """The worst first."""
        return tuple(self._kept)


def _likeliest(row: NDArray[np.float64]) -> tuple[TokenProbability, ...]:
    best = np.argpartition(-row, _TOP - 1)[:_TOP]
    ordered = best[np.argsort(-row[best], kind="stable")]
    return tuple((int(token), float(np.exp(row[token]))) for token in ordered)
