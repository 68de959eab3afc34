from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.exporter import export
from qwen2x.runtimes.speculation import Costs
from tests.cli.conftest import Call
from tests.tiny_checkpoint import write_tiny_checkpoint

WORDS = "one two three, one two three, one two three, one"
ASKED = (WORDS, "--raw", "--temperature", "0", "--max-tokens", "40", "--threads", "1")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "best_length", lambda self, chances, seconds: len(chances))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller bundle with the example's tokenizer."""
    place = tmp_path_factory.mktemp("draft")
    source = write_tiny_checkpoint(place / "source", num_hidden_layers=1)
    return export(source, out=place / "bundle").bundle


@pytest.mark.usefixtures("always")
def test_run_says_the_same_and_counts_its_guesses(
    call: Call, float_bundle: Path, draft: Path
) -> None:
    plain = call("run", float_bundle, *ASKED, "--json").json
    assert plain["speculation"] is None
    ways: list[tuple[Any, ...]] = [("--speculate",), ("--draft", draft)]
    for options in ways:
        ahead = call("run", float_bundle, *ASKED, *options, "--json").json
        assert (ahead["text"], ahead["token_ids"]) == (plain["text"], plain["token_ids"])
        counts = ahead["speculation"]
        assert set(counts) == {"passes", "drafted", "accepted"}
        assert 0 < counts["drafted"] >= counts["accepted"] >= 0
        assert counts["passes"] <= len(ahead["token_ids"])


@pytest.mark.usefixtures("always")
def test_verbose_tells_people_of_the_guesses(call: Call, float_bundle: Path) -> None:
    said = call("run", float_bundle, *ASKED, "--speculate", "-v").err
    assert "guesses right in" in said
    assert "guesses" not in call("run", float_bundle, *ASKED, "-v").err
    typed = f"{WORDS}\n{WORDS}\n/exit\n".encode()
    options = ("--speculate", "-v", "--max-tokens", "8", "--temperature", "0")
    done = call("chat", float_bundle, *options, stdin=typed)
    assert done.code == 0
    assert done.err.count("guesses right in") == 2
    assert done.out == call("chat", float_bundle, *options[2:], stdin=typed).out


def test_chat_takes_a_draft_too(call: Call, float_bundle: Path, draft: Path) -> None:
    typed = b"Hello\n/exit\n"
    options = ("--max-tokens", "8", "--temperature", "0")
    plain = call("chat", float_bundle, *options, stdin=typed)
    ahead = call("chat", float_bundle, *options, "--draft", draft, stdin=typed)
    assert (ahead.code, ahead.out) == (0, plain.out)


def test_what_cannot_guess_is_refused_in_one_line(
    call: Call, float_bundle: Path, draft: Path, tmp_path: Path
) -> None:
    both = call("run", float_bundle, *ASKED, "--speculate", "--draft", draft).complaint
    assert "give one" in both
    assert "no bundle" in call("run", float_bundle, *ASKED, "--draft", tmp_path / "none").complaint
    source = write_tiny_checkpoint(tmp_path / "source")
    path = source / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<|im_start|>", "<|im_begin|>"), encoding="utf-8")
    other = export(source, out=tmp_path / "bundle").bundle
    for command in ("run", "chat"):
        words = ASKED if command == "run" else ()
        said = call(command, float_bundle, *words, "--draft", other).complaint
        assert "has another tokenizer" in said
        assert "same family" in said
