"""Guesses from the text itself: where its end has stood before, what followed then."""

from __future__ import annotations

from collections.abc import Sequence

# Places of a pair of tokens that are compared, the latest first, and how far back.
_CANDIDATES = 8
_REACH = 32
# How often the next token is that of the match, before anything is known of the text: behind 1, 2,
# 3, 4, 5-7, 8-15, and 16 or more tokens that match.
_CHANCES = (0.3, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9)
_SINGLE = 4
_WEIGHT = 0.1


class PromptLookup:
    """A ``Drafter`` without a model, after llama.cpp's and vLLM's n-gram lookup.

    It follows the longest match of the text's end, and learns from every token that comes, whether
    it was asked for a draft or not: guessing costs nothing, running the guesses does.

    Args:
        token_ids: the prompt.
    """

    seconds_per_token = 0.0

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._tokens: list[int] = []
        # What follows a pair of tokens: places in the text.
        self._places: dict[tuple[int, int], list[int]] = {}
        self._chances = list(_CHANCES)
        # The guess is the token at this place, behind so many tokens that match.
        self._place = self._matched = 0
        for token_id in token_ids:
            self._append(token_id)
        self._search()

    def observe(self, token_id: int) -> None:
        """See ``Drafter``."""
        was_followed = self._matched > 0
        is_hit = was_followed and self._tokens[self._place] == token_id
        if was_followed:
            kind = _kind(self._matched)
            self._chances[kind] += _WEIGHT * (is_hit - self._chances[kind])
        self._append(token_id)
        self._place += 1
        if is_hit:
            self._matched += 1
        else:
            # One token may have been changed in a text that is copied: it goes on behind it.
            self._matched = int(was_followed)
            self._search()

    def chances(self, limit: int) -> list[float]:
        """See ``Drafter``."""
        if not self._matched:
            return []
        return [self._chances[_kind(self._matched + ahead)] for ahead in range(limit)]

    def draft(self, count: int) -> list[int]:
        """See ``Drafter``. A match that reaches the end of the text goes on with the guesses."""
        guesses: list[int] = []
        for place in range(self._place, self._place + count):
            beyond = place - len(self._tokens)
            guesses.append(self._tokens[place] if beyond < 0 else guesses[beyond])
        return guesses

    def _append(self, token_id: int) -> None:
        self._tokens.append(token_id)
        # The pair's place is known once something follows it.
        if len(self._tokens) > 2:
            first, second, _ = self._tokens[-3:]
            self._places.setdefault((first, second), []).append(len(self._tokens) - 1)

    def _search(self) -> None:
        """Follows the longest match of the text's end, of two tokens or more, if there is one."""
        tokens = self._tokens
        places = self._places.get((tokens[-2], tokens[-1]), []) if len(tokens) > 1 else []
        for place in reversed(places[-_CANDIDATES:]):
            matched = 2
            furthest = min(place, _REACH)
            while matched < furthest and tokens[place - matched - 1] == tokens[-matched - 1]:
                matched += 1
            if matched > self._matched:
                self._place, self._matched = place, matched


def _kind(matched: int) -> int:
    """Where in the table of chances a match of so many tokens belongs."""
    if matched <= _SINGLE:
        return matched - 1
    return min(matched.bit_length() + 1, len(_CHANCES) - 1)
