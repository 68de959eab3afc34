"""The page itself, of figures that are made up."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qwen2x.cli.page import Page, Shown, render, visible, write_page
from qwen2x.cli.page_style import STYLE
from qwen2x.cli.reading import Reading, WorstPlace
from qwen2x.exporters.bundle import Bundle
from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.surprises import Surprise
from tests.cli.test_figures import figures

TEXT = {"name": "a <b>text</b>", "tokens": 4, "window": 4, "sha256": "1"}
PLACE = WorstPlace(
    position=3,
    kl=1.25,
    before="one\ntwo <script>",
    followed=" three",
    reference=((" three", 0.75), ("\n", 0.004)),
    candidate=(("&", math.nan), ("", 0.5)),
)
VOID = {"meta", "br", "hr", "input"}


def page(tmp_path: Path, **changes: Any) -> Page:
    bundle = Bundle(folder=tmp_path / "mine", manifest={"source": {"sha256": {}}})
    shown = Shown(
        bundle=bundle,
        figures=figures(10**6, 0.1, str(tmp_path / "mine")),
        kl=(0.1, 0.2, 0.05, 0.01),
        worst=(PLACE,),
    )
    values = {"shown": [shown], "against": "org/<name>", "backend": "torch", "text": TEXT}
    return Page(**values | changes)  # type: ignore[arg-type]


class Balance(HTMLParser):
    """Checks that elements are closed in their order; gathers what must be unique or exist."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.named += str(values.get("aria-labelledby") or "").split()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_what_names_a_plot_exists(tmp_path: Path) -> None:
    seen = Balance()
    seen.feed(render(page(tmp_path)))
    assert seen.open == []
    assert len(seen.ids) == len(set(seen.ids)) == 4
    assert set(seen.named) == set(seen.ids)


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    text = render(page(tmp_path))
    assert "<script" not in text
    assert "org/&lt;name&gt;" in text
    assert "one⏎two &lt;script&gt;" in text
    assert "“&amp;”" in text


def test_a_worst_place_shows_what_both_expected(tmp_path: Path) -> None:
    text = render(page(tmp_path))
    assert "KL 1.25 nats at position 3; the text goes on with\n<code>“ three”</code>" in text
    shares = re.findall(r"<code dir=\"auto\">“(.*?)”</code> <span>(.*?)</span>", text)
    assert shares == [
        (" three", "75 %"), ("⏎", "0.4 %"), ("&amp;", "not finite"), ("(no text)", "50 %")
    ]  # fmt: skip


def test_a_single_bundle_without_neighbours_says_how_to_get_a_plot_of_sizes(
    tmp_path: Path,
) -> None:
    text = render(page(tmp_path))
    assert 'id="sizes-title"' not in text
    assert "what\n<code>qwen2x validate</code> records there is shown here next time" in text


def test_line_ends_and_tabs_of_tokens_are_seen() -> None:
    assert visible("a\r\n\tb") == "a⏎⇥b"
    assert visible("") == "(no text)"


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.mkdir()
    with pytest.raises(RequestError, match=r"page\.html cannot be written: "):
        write_page(target, page(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_texts_with_half_characters_are_written(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page(tmp_path, text=TEXT | {"name": "\ud800"}))
    assert "built" not in (tmp_path / "page.html").read_text("utf-8")


# Colours


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    digits = color if len(color) == 6 else "".join(2 * digit for digit in color)
    parts = [int(digits[index : index + 2], 16) / 255 for index in (0, 2, 4)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_texts_and_lines_stand_out_from_the_paper(place: int) -> None:
    themes = re.findall(r":root \{ (--ink.*?)\}", STYLE, re.DOTALL)
    colors = dict(re.findall(r"--(\w+): #(\w+)", themes[place]))
    for name in ("ink", "soft", "good", "bad", "first", "second"):
        assert contrast(colors[name], colors["paper"]) >= 4.5, name
    assert contrast(colors["ink"], colors["tint"]) >= 4.5


# Reading


class Letters:
    """Token 0 is a, token 1 is b, ..."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


def test_a_position_is_found_in_its_window() -> None:
    reading = Reading(name="n", window=3, windows=[[0, 1, 2], [3, 4, 5], [6, 7]])
    surprises = [
        Surprise(position=position, kl=1.0, reference=((0, 0.5),), candidate=((1, 0.25),))
        for position in (0, 4, 5, 7)
    ]
    places = reading.in_words(surprises, Letters())  # type: ignore[arg-type]
    assert [place.before for place in places] == ["a", "de", "def", "gh"]
    assert [place.followed for place in places] == ["b", "f", None, None]
    assert places[0].reference == (("a", 0.5),)
    assert places[0].candidate == (("b", 0.25),)
