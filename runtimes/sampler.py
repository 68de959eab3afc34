"""How the next token is chosen from logits.

Order and meaning of the steps are those of transformers' logits processors: repetition penalty,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qwen2x.quantize.errors import RequestError

Logits = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a sampler. The default is greedy: always the likeliest token.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together reach this probability.
        min_p: only tokens at least this likely, relative to the likeliest.
        repetition_penalty: above 1, tokens that stand in the context become less likely.
        seed: makes the choice repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0 <= self.temperature <= 100, "in 0..100")
        _require("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "in 0..1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < penalty <= 100, "above 0 and at most 100")
        if self.seed is not None:
            _require("seed", self.seed, 0 <= self.seed < 1 << 64, "in 0..2**64-1")


def read_sampling(generation: Mapping[str, Any], **overrides: Any) -> Sampling:
    """The checkpoint's own defaults (``generation_config.json``), changed by what the user gave.

    Args:
        generation: the dictionary; without ``do_sample`` the default is greedy.
        **overrides: fields of ``Sampling``; None keeps the default.
    """
    defaults: dict[str, Any] = {"repetition_penalty": generation.get("repetition_penalty")}
    if generation.get("do_sample"):
        defaults["temperature"] = generation.get("temperature", 1.0)
        for key in ("top_k", "top_p", "min_p"):
            defaults[key] = generation.get(key)
    known = {key: value for key, value in defaults.items() if value is not None}
    given = {key: value for key, value in overrides.items() if value is not None}
    return replace(Sampling(), **(known | given))


class Sampler:
    """Chooses tokens by one ``Sampling``; holds the state of its random numbers."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: Logits, context: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: float32 [vocab].
            context: prompt and new tokens so far, for the repetition penalty.

        Raises:
            RequestError: logits that are not finite.
        """
        logits = self._penalize(logits, context)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise RequestError(
                "the model's logits are not finite; validate the bundle, or export it in float32"
            )
        if self.sampling.temperature == 0:
            return best
        ids, probabilities = self._distribution(logits)
        return int(ids[self._draw(probabilities)])

    def _penalize(self, logits: Logits, context: Sequence[int]) -> Logits:
        penalty = np.float32(self.sampling.repetition_penalty)
        if penalty == 1 or not len(context):
            return logits
        seen = np.unique(np.asarray(context, np.int64))
        seen = seen[seen < len(logits)]
        logits = logits.copy()
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        return logits

    def _distribution(self, logits: Logits) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Candidate ids from the likeliest down, and their probabilities."""
        sampling = self.sampling
        if 0 < sampling.top_k < len(logits):
            # Ties at the k-th place stay in, as in transformers.
            threshold = np.partition(logits, -sampling.top_k)[-sampling.top_k]
            ids = np.flatnonzero(logits >= threshold)
        else:
            ids = np.flatnonzero(logits > -np.inf)
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        scaled = logits[ids].astype(np.float64) / sampling.temperature
        probabilities = np.exp(scaled - scaled[0])
        probabilities /= probabilities.sum()
        if sampling.top_p < 1:
            # The token that crosses top_p is the last one kept.
            before = np.cumsum(probabilities) - probabilities
            kept = max(1, int((before < sampling.top_p).sum()))
            ids, probabilities = ids[:kept], probabilities[:kept] / probabilities[:kept].sum()
        if sampling.min_p > 0:
            kept = max(1, int((probabilities >= sampling.min_p * probabilities[0]).sum()))
            ids, probabilities = ids[:kept], probabilities[:kept] / probabilities[:kept].sum()
        return ids, probabilities

    def _draw(self, probabilities: NDArray[np.float64]) -> int:
        point = self._random.random() * probabilities.sum()
        return min(int(np.searchsorted(np.cumsum(probabilities), point)), len(probabilities) - 1)


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds or not math.isfinite(value):
        raise RequestError(f"{name} must be {expected}, got {value}")
