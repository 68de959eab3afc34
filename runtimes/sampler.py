"""How the next token is chosen from logits.

Order and meaning of the steps are those of transformers' logits processors: repetition penalty,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.errors import RequestError

Logits = NDArray[np.float32]
_HEAD = 1024
NOT_FINITE = "the model's logits are not finite; validate the bundle, or export it in float32"


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
        _require_number("temperature", self.temperature, "in 0..100", lambda v: 0 <= v <= 100)
        _require_integer("top_k", self.top_k, "0 or more", lambda v: v >= 0)
        _require_number("top_p", self.top_p, "above 0 and at most 1", lambda v: 0 < v <= 1)
        _require_number("min_p", self.min_p, "in 0..1", lambda v: 0 <= v <= 1)
        penalty = self.repetition_penalty
        expected = "above 0 and at most 100"
        _require_number("repetition_penalty", penalty, expected, lambda v: 0 < v <= 100)
        if self.seed is not None:
            _require_integer("seed", self.seed, "in 0..2**64-1", lambda v: 0 <= v < 1 << 64)


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
    """Chooses the tokens of one text by one ``Sampling``; holds what the choices depend on.

    Args:
        sampling: the settings.
        context: the prompt, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, context: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = np.unique(np.asarray(context, np.int64))

    def choose(self, logits: Logits) -> int:
        """The next token, which belongs to the context from then on.

        Args:
            logits: float32 [vocab]; they are not changed.

        Raises:
            RequestError: logits that are not finite.
        """
        token_id = self._pick(self._penalize(logits))
        self._remember(token_id)
        return token_id

    def choose_among(self, ids: NDArray[np.int64], logits: Logits, known: int) -> int | None:
        """The token that ``choose`` would give, from the likeliest alone.

        Args:
            ids: int64 [n], rising.
            logits: float32 [n], theirs. No token that is missing has one above the least of them.
            known: only tokens below it are chosen.

        Returns:
            None where these do not decide it, and nothing is remembered then.
        """
        sampling = self.sampling
        wanted = 1 if sampling.temperature == 0 else sampling.top_k
        floor, count = logits.min(), int(np.searchsorted(ids, known))
        ids, logits = ids[:count], logits[:count]
        if sampling.repetition_penalty < 1 or not 0 < wanted <= count:
            return None
        if sampling.repetition_penalty != 1:
            logits = self._lower(logits, self._places_seen(ids))
        # One that equals the floor may be tied with one that is missing.
        least = logits.max() if wanted == 1 else np.partition(logits, -wanted)[-wanted]
        if not least > floor:
            return None
        token_id = int(ids[self._pick(logits)])
        self._remember(token_id)
        return token_id

    def _places_seen(self, ids: NDArray[np.int64]) -> NDArray[np.intp]:
        """Which of these stand in the context."""
        if not len(self._seen):
            return np.empty(0, np.intp)
        nearest = np.minimum(np.searchsorted(self._seen, ids), len(self._seen) - 1)
        return np.flatnonzero(self._seen[nearest] == ids)

    def _pick(self, logits: Logits) -> int:
        """The place of the choice among logits that the penalty is in."""
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise RequestError(NOT_FINITE)
        if self.sampling.temperature == 0:
            return best
        places, probabilities = self._distribution(logits)
        return int(places[self._draw(probabilities)])

    def _penalize(self, logits: Logits) -> Logits:
        return self._lower(logits, self._seen[: np.searchsorted(self._seen, len(logits))])

    def _lower(self, logits: Logits, places: NDArray[np.integer]) -> Logits:
        """The logits with the penalty at these places."""
        penalty = np.float32(self.sampling.repetition_penalty)
        if penalty == 1 or not len(places):
            return logits
        logits = logits.copy()
        values = logits[places]
        logits[places] = np.where(values > 0, values / penalty, values * penalty)
        return logits

    def _remember(self, token_id: int) -> None:
        if self.sampling.repetition_penalty == 1:
            return
        place = int(np.searchsorted(self._seen, token_id))
        if place == len(self._seen) or self._seen[place] != token_id:
            self._seen = np.insert(self._seen, place, token_id)

    def _distribution(self, logits: Logits) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Places of the tokens that may be drawn, and their probabilities."""
        sampling = self.sampling
        ids = _top_k(logits, sampling.top_k)
        below = logits[ids].astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # at a tiny temperature all but the likeliest get -inf
            probabilities = np.exp(below / sampling.temperature)
        probabilities /= probabilities.sum()
        if sampling.top_p < 1:
            kept = _top_p(probabilities, sampling.top_p)
            ids, probabilities = ids[kept], probabilities[kept]
        if sampling.min_p > 0:
            kept = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
            ids, probabilities = ids[kept], probabilities[kept]
        return ids, probabilities / probabilities.sum()

    def _draw(self, probabilities: NDArray[np.float64]) -> int:
        reached = np.cumsum(probabilities)
        point = self._random.random() * reached[-1]
        return min(int(np.searchsorted(reached, point, side="right")), len(reached) - 1)


def _top_k(logits: NDArray[np.floating], top_k: int) -> NDArray[np.int64]:
    """Ids of the k largest. Ties at the k-th place stay in, as in transformers."""
    if not 0 < top_k < len(logits):
        return np.arange(len(logits))
    threshold = np.partition(logits, -top_k)[-top_k]
    return np.flatnonzero(logits >= threshold)


def _top_p(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Places of the likeliest that together reach top_p, the one that crosses it included.

    A few hundred nearly always do; the whole vocabulary is sorted only if they do not.
    """
    for size in (_HEAD, len(probabilities)):
        head = _top_k(probabilities, size)
        order = head[np.argsort(-probabilities[head], kind="stable")]
        reached = np.cumsum(probabilities[order])
        if reached[-1] >= top_p:
            break
    before = reached - probabilities[order]
    return order[: max(1, int((before < top_p).sum()))]


def _require_number(name: str, value: Any, expected: str, holds: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
        raise RequestError(f"{name} must be a number {expected}, got {value!r}")


def _require_integer(name: str, value: Any, expected: str, holds: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not holds(value):
        raise RequestError(f"{name} must be an integer {expected}, got {value!r}")
