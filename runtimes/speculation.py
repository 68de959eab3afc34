"""Speculative decoding: several tokens from one pass, by guessing what comes.

A guess decides nothing. The rows of a pass over guessed tokens are what plain decoding would see,
and the sampler chooses from each as it always does, with the same random numbers; the first choice
that is not the guess ends the pass. So a guess x is kept with its own probability p(x), what takes
its place otherwise is distributed as p without x, renormalized, and a seed gives the text that it
gives without speculation. This is the rule of Leviathan et al. (arXiv:2211.17192) for a draft that
is certain of itself. What is not the same is rounding: a pass of several rows may sum in another
order than one of a single row.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwen2x.runtimes.runtime import Logits, Runtime
from qwen2x.runtimes.sampler import Sampler

LONGEST = 15
# Of the time of a pass, what one more row is believed to cost before that is measured.
_USUAL_SHARE = 0.25
# A row cannot well cost more than a pass of its own; what was measured above is a disturbance.
_MOST_SHARE = 1.0
# How far a new measurement moves the last one, and how far each step moves it to what is usual:
# one bad measurement must not end speculation for good.
_WEIGHT = 0.3
_FORGET = 0.02
# A gain below this is not worth a try.
_WORTH = 1.1


@dataclass(kw_only=True)
class SpeculationCounts:
    """What became of the guesses of one answer.

    Attributes:
        passes: of the model, the prompt's not counted.
        drafted: tokens that were guessed and run.
        accepted: guesses that the sampler chose too.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


class Drafter(Protocol):
    """Guesses what follows a text, and learns how often it was right."""

    @property
    def seconds_per_token(self) -> float:
        """What a guess costs."""
        ...

    def observe(self, token_id: int) -> None:
        """Told every token that was chosen, which belongs to the text from then on."""
        ...

    def chances(self, limit: int) -> list[float]:
        """How likely each of the next guesses is right if those before it are; at most limit."""
        ...

    def draft(self, count: int) -> list[int]:
        """The next guesses, no more than ``chances`` promised."""
        ...


def guess_ahead(
    runtime: Runtime,
    logits: Logits,
    sampler: Sampler,
    drafter: Drafter,
    counts: SpeculationCounts,
    *,
    known: int,
    limit: int,
) -> Generator[int, None, None]:
    """Yields token after token; whoever leaves it finds all but the last given in the cache.

    Args:
        runtime: has run the prompt.
        logits: float32 [vocab], behind the prompt.
        sampler: chooses.
        drafter: knows the prompt.
        counts: counted up.
        known: only the first so many tokens of the vocabulary are chosen.
        limit: tokens that will be taken at most.
    """
    costs = Costs()
    token = sampler.choose(logits[:known])
    yield token
    left = limit - 1
    while True:
        drafter.observe(token)
        chances = drafter.chances(min(LONGEST, left - 1)) if left > 1 else []
        guesses = drafter.draft(costs.best_length(chances, drafter.seconds_per_token))
        past = runtime.cache_length
        started = time.perf_counter()
        rows = runtime.decode_guessed([token, *guesses])
        costs.record(len(rows), time.perf_counter() - started)
        counts.passes += 1
        counts.drafted += len(guesses)
        run = past
        try:
            for row, guess in zip(rows, [*guesses, None], strict=True):
                token, run = sampler.choose(row[:known]), run + 1
                left -= 1
                yield token
                if token != guess:
                    break
                counts.accepted += 1
                drafter.observe(token)
        finally:
            # A caller who left may have emptied the cache already.
            runtime.truncate(min(run, runtime.cache_length))


class Costs:
    """What passes of one and of several rows cost, learnt while they run."""

    def __init__(self) -> None:
        self._single = 0.0
        self._share = _USUAL_SHARE

    def record(self, rows: int, seconds: float) -> None:
        """Told the seconds of every pass."""
        if rows == 1:
            self._single = _moved(self._single, seconds) if self._single else seconds
            self._share += _FORGET * (_USUAL_SHARE - self._share)
        elif self._single:
            share = (seconds / self._single - 1) / (rows - 1)
            self._share = _moved(self._share, min(_MOST_SHARE, max(0.0, share)))

    def best_length(self, chances: Sequence[float], seconds_per_guess: float) -> int:
        """How many guesses give the most tokens per second; 0 where one by one is as fast."""
        if not chances or not self._single:
            return 0
        cost_of_guess = self._share + seconds_per_guess / self._single
        best, best_gain = 0, _WORTH
        reached = expected = 1.0
        for count, chance in enumerate(chances, 1):
            reached *= chance
            expected += reached
            gain = expected / (1 + count * cost_of_guess)
            if gain > best_gain:
                best, best_gain = count, gain
        return best


def _moved(value: float, found: float) -> float:
    return value + _WEIGHT * (found - value)
