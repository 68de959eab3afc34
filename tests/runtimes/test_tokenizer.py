from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.tokenizer import StopFilter, Tokenizer
from tests.tiny_checkpoint import EXAMPLE

TOKENIZER = Tokenizer(EXAMPLE)
TEXTS = [
    "Grüße aus Köln – straßenweise Übung.",
    "你好，世界！今天天气怎么样？",
    "こんにちは。漢字とかなカナ。",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "Emoji: 😀👨‍👩‍👧‍👦🏳️‍🌈🇩🇪 e\u0301 end",
    "def f(x):\n\treturn x  # 🤖\r\n\n   ",
    "\ufffd a replacement character of its own \ufffd\ufffd",
    "mixed 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b\u2028 and NUL \x00",
]


def streamed(token_ids: list[int]) -> list[str]:
    stream = TOKENIZER.stream()
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_split_a_character(text: str) -> None:
    token_ids = TOKENIZER.encode(text)
    pieces = streamed(token_ids)
    # The tokenizer itself composes characters (NFC).
    text = unicodedata.normalize("NFC", text)
    assert "".join(pieces) == text == TOKENIZER.decode(token_ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(
    token_ids=st.lists(
        st.one_of(st.integers(0, 255), st.integers(0, TOKENIZER.size - 1)), max_size=40
    )
)
def test_pieces_of_any_tokens_join_to_what_decode_gives(token_ids: list[int]) -> None:
    pieces = streamed(token_ids)
    whole = TOKENIZER.decode(token_ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_when_it_is_whole() -> None:
    token_ids = TOKENIZER.encode("😀")
    assert len(token_ids) > 1
    assert streamed(token_ids) == [*[""] * (len(token_ids) - 1), "😀", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    token_ids = TOKENIZER.encode("ok 😀")[:-1]
    pieces = streamed(token_ids)
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces) == "ok \ufffd"


def test_special_tokens_have_no_text() -> None:
    token_ids = TOKENIZER.encode("<|im_start|>user\nHi<|im_end|>")
    assert token_ids[0] == 2014
    assert token_ids[-1] == 2015
    assert "".join(streamed(token_ids)) == "user\nHi"


@pytest.mark.parametrize("text", [*TEXTS, "<|im_start|>system\nYou are.<|im_end|>\n", ""])
def test_tokens_are_those_of_transformers(text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(EXAMPLE)
    assert TOKENIZER.encode(text) == theirs.encode(text, add_special_tokens=False)
    token_ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(token_ids) == theirs.decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert TOKENIZER.size == len(theirs)


def test_half_characters_are_refused_in_one_line() -> None:
    with pytest.raises(RequestError, match="lone surrogates"):
        TOKENIZER.encode("broken \ud83d text")


def test_a_folder_without_a_tokenizer_or_with_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")
    with pytest.raises(RequestError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_truncation_that_a_tokenizer_file_carries_is_switched_off(tmp_path: Path) -> None:
    library = TOKENIZER._tokenizer
    library.enable_truncation(4)
    library.save(str(tmp_path / "tokenizer.json"))
    library.no_truncation()
    assert len(Tokenizer(tmp_path).encode("a b c d e f g h i j")) > 4


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The reference: read character by character; the first stop that is complete ends it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


SHORT_TEXT = st.text("ab\n", max_size=14)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400, deadline=None)
@given(text=SHORT_TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 14), max_size=8))
def test_stops_cut_the_same_text_however_it_comes(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    expected, is_stopped = cut_at_stop(text, stops)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    for way in (pieces, list(text), [text]):
        stop_filter = StopFilter(stops)
        shown = [stop_filter.push(piece) for piece in way]
        assert expected.startswith("".join(shown))
        assert "".join(shown) + stop_filter.finish() == expected
        assert stop_filter.is_stopped == is_stopped


def test_text_is_held_back_no_longer_than_it_may_begin_a_stop() -> None:
    stop_filter = StopFilter(["\nUser:", "END"])
    assert [stop_filter.push(piece) for piece in ("Hi", " E", "N", "d", "\nUs", "e")] == [
        "Hi", " ", "", "ENd", "", ""
    ]  # fmt: skip
    assert stop_filter.finish() == "\nUse"
    assert not stop_filter.is_stopped


def test_nothing_comes_after_a_stop() -> None:
    stop_filter = StopFilter(["."])
    assert stop_filter.push("One. Two.") == "One"
    assert stop_filter.is_stopped
    assert stop_filter.push("Three") + stop_filter.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="must not be empty"):
        StopFilter(["ok", ""])
