from __future__ import annotations

import numpy as np

from qwen2x.runtimes.prompt_lookup import PromptLookup


def lookup(*token_ids: int, then: tuple[int, ...] = ()) -> PromptLookup:
    made = PromptLookup(token_ids)
    for token_id in then:
        made.observe(token_id)
    return made


def test_what_followed_before_is_guessed() -> None:
    assert lookup(1, 2, 3, 4, 5, 9, 1, 2).draft(3) == [3, 4, 5]
    assert lookup(1, 2, 3, 4, 5, 9, then=(1, 2)).draft(2) == [3, 4]


def test_the_longest_match_counts_and_of_equals_the_latest() -> None:
    assert lookup(7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2).draft(1) == [3]
    assert lookup(7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2).draft(1) == [4]


def test_a_match_is_followed_as_long_as_it_holds() -> None:
    guesses = lookup(1, 2, 3, 4, 5, 6, 9, 1, 2)
    for token_id in (3, 4, 5):
        assert guesses.draft(1) == [token_id]
        guesses.observe(token_id)
    assert guesses.draft(1) == [6]


def test_behind_one_changed_token_the_copy_goes_on() -> None:
    guesses = lookup(1, 2, 3, 4, 5, 6, 9, 1, 2, then=(3, 77))
    assert guesses.draft(2) == [5, 6]


def test_a_text_that_turns_in_circles_is_guessed_beyond_its_end() -> None:
    assert lookup(1, 2, 3, 1, 2, 3, 1, 2).draft(7) == [3, 1, 2, 3, 1, 2, 3]


def test_where_nothing_matches_nothing_is_guessed() -> None:
    for token_ids in ((), (1,), (1, 2), (1, 2, 3, 4)):
        guesses = lookup(*token_ids)
        assert guesses.chances(5) == []
        assert guesses.draft(0) == []


def test_longer_matches_are_believed_more() -> None:
    chances = lookup(*range(40), 99, *range(30)).chances(5)
    assert len(chances) == 5
    assert chances[0] > lookup(1, 2, 3, 9, 1, 2).chances(1)[0]
    assert lookup(1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2).chances(9) == sorted(
        lookup(1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2).chances(9)
    )


def test_it_learns_without_being_asked() -> None:
    pairs = [token for other in range(100, 140) for token in (1, 2, other)]
    assert lookup(1, 2, 3, 9, 1, 2).chances(1)[0] > 0.2
    assert lookup(1, 2, then=(*pairs, 1, 2)).chances(1)[0] < 0.1
    copied = lookup(*range(200), then=tuple(range(200)))
    assert copied.chances(1)[0] > 0.95


def test_the_guesses_are_those_of_a_search_through_the_whole_text() -> None:
    """Against a plain search, on text of few tokens; only beginnings of a match are compared."""
    random = np.random.default_rng(1)
    for _ in range(50):
        tokens = random.integers(0, 12, 40).tolist()
        found = lookup(*tokens)
        best = max((suffix(tokens, place), place) for place in range(1, len(tokens)))
        if best[0] < 2:
            assert found.chances(1) == []
        else:
            assert found.draft(1) == [tokens[best[1]]]


def suffix(tokens: list[int], place: int) -> int:
    """How many tokens before a place are those at the end."""
    count = 0
    while count < place and tokens[place - 1 - count] == tokens[-1 - count]:
        count += 1
    return count
