"""Guesses from a smaller model of the same family."""

from __future__ import annotations

import filecmp
import time
from collections.abc import Sequence

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.runtime import Logits, Runtime
from qwen2x.runtimes.tokenizer import Tokenizer

# How often its guess is right, before anything is known, and what is learnt of one guess.
_USUAL_CHANCE = 0.7
_WEIGHT = 0.1
# While it is not asked, it is slowly believed in again, so that it is tried from time to time.
_FORGET = 0.01


class DraftModel:
    """A ``Drafter`` that says what another model finds likeliest.

    Args:
        runtime: of the smaller model; its cache is used, and kept for the next answer.
        token_ids: the prompt.
        known: only the first so many tokens of the vocabulary are guessed.
    """

    def __init__(self, runtime: Runtime, token_ids: Sequence[int], known: int) -> None:
        self.seconds_per_token = 0.0
        self._runtime = runtime
        self._known = min(known, runtime.vocab_size)
        self._tokens = list(token_ids)
        self._chance = _USUAL_CHANCE
        self._open: list[int] = []
        # Up to here the cache is known to hold the text.
        self._agreed = 0

    def observe(self, token_id: int) -> None:
        """See ``Drafter``."""
        self._tokens.append(token_id)
        if not self._open:
            self._chance += _FORGET * (_USUAL_CHANCE - self._chance)
            return
        is_hit = self._open.pop(0) == token_id
        self._chance += _WEIGHT * (is_hit - self._chance)
        if not is_hit:
            self._open = []

    def chances(self, limit: int) -> list[float]:
        """See ``Drafter``; none once the text has outgrown the smaller model's context."""
        room = self._runtime.rope_context - len(self._tokens)
        return [self._chance] * max(0, min(limit, room))

    def draft(self, count: int) -> list[int]:
        """See ``Drafter``."""
        self._open = []
        if count:
            self._open = [self._likeliest(self._catch_up())]
        while len(self._open) < count:
            started = time.perf_counter()
            self._open.append(self._likeliest(self._runtime.decode(self._open[-1])))
            self.seconds_per_token = time.perf_counter() - started
        return list(self._open)

    def _catch_up(self) -> Logits:
        """Runs what the smaller model has not seen of the text; logits [vocab] behind it."""
        runtime, length = self._runtime, min(self._agreed, self._runtime.cache_length)
        # The last token is run in any case: nothing else gives its logits.
        shared = zip(runtime.cached_ids[length:], self._tokens[length:-1], strict=False)
        for theirs, ours in shared:
            if theirs != ours:
                break
            length += 1
        runtime.truncate(length)
        self._agreed = len(self._tokens)
        return runtime.prefill(self._tokens[length:])

    def _likeliest(self, logits: Logits) -> int:
        return int(logits[: self._known].argmax())


def require_same_tokenizer(runtime: Runtime, draft: Runtime) -> None:
    """Raises RequestError unless both models give each token the same meaning."""
    path, other = (model.folder / "tokenizer.json" for model in (runtime, draft))
    if path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False):
        return
    ours, theirs = (Tokenizer(model.folder).vocabulary for model in (runtime, draft))
    if ours == theirs:
        return
    token, number = next(iter(sorted(ours.items() ^ theirs.items(), key=lambda item: item[1])))
    raise RequestError(
        f"the draft {draft.folder} has another tokenizer than {runtime.folder} ({len(theirs)} "
        f"tokens, expected {len(ours)}; the first that differs is {number}, {token!r}); "
        "give a bundle of the same family"
    )
