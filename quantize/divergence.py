"""How far one model's next-token probabilities are from another's, without all logits at once.

The head is read by rows of the vocabulary, since a token's logits alone are 0.6 MB for Qwen2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.groups import Float

Double = NDArray[np.float64]
_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head's rows: ``read(start, stop)`` gives float32 [stop - start, hidden]."""

    vocab_size: int
    read: Callable[[int, int], Float]

    def parts(self) -> Iterator[tuple[int, Float]]:
        """The first row's number and the rows, part by part."""
        for start in range(0, self.vocab_size, _ROWS):
            yield start, self.read(start, min(start + _ROWS, self.vocab_size))


class Normalizers:
    """Largest logit and log of the sum of exponentials of each position, float64 [positions]."""

    def __init__(self, positions: int) -> None:
        self.highest = np.full(positions, -np.inf)
        self._total = np.zeros(positions)

    def add(self, logits: Float) -> None:
        """Takes in logits [positions, tokens] of further tokens."""
        highest = np.maximum(self.highest, logits.max(axis=1))
        self._total *= np.exp(self.highest - highest)
        self._total += np.exp(logits - highest[:, None].astype(np.float32)).sum(axis=1)
        self.highest = highest

    @property
    def logarithms(self) -> Double:
        """Of the sums of exponentials."""
        logarithms: Double = np.log(self._total) + self.highest
        return logarithms


class Divergence:
    """KL divergence of a model's probabilities from the exact ones, in nats."""

    def __init__(self, exact: Normalizers) -> None:
        self._exact = exact
        self._own = Normalizers(len(exact.highest))
        self._difference = np.zeros(len(exact.highest))

    def add(self, probabilities: Float, exact: Float, own: Float) -> None:
        """Takes in further tokens, all [positions, tokens].

        Args:
            probabilities: of the exact model.
            exact: its logits.
            own: the other model's logits.
        """
        self._own.add(own)
        self._difference += np.einsum("pt,pt->p", probabilities, exact - own)

    @property
    def own(self) -> Normalizers:
        """Of the other model."""
        return self._own

    def each(self) -> Double:
        """Float64 [positions], not negative."""
        gap = self._own.logarithms - self._exact.logarithms
        return np.maximum(self._difference + gap, 0)


def normalize(inputs: Float, head: Head) -> Normalizers:
    """Normalizers of inputs [positions, hidden] times a head."""
    found = Normalizers(len(inputs))
    for _, rows in head.parts():
        found.add(inputs @ rows.T)
    return found


def probabilities_of(logits: Float, normalizers: Normalizers) -> Float:
    """Probabilities float32 of logits [positions, tokens]."""
    probabilities: Float = np.exp(logits - normalizers.logarithms[:, None].astype(np.float32))
    return probabilities
