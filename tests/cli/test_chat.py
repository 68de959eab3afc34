from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2x.cli.chat import _show
from qwen2x.exporters.exporter import export
from tests.cli.command import PROGRAM, environment
from tests.cli.conftest import Call
from tests.tiny_checkpoint import write_tiny_checkpoint

GREEDY = ("--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "8")
CACHED = re.compile(r"(\d+) prompt tokens \((\d+) cached\), (\d+) new at ")


def turns_of(err: str) -> list[tuple[int, ...]]:
    """Prompt, cached and new tokens of every answer, as -v shows them."""
    return [tuple(map(int, found)) for found in CACHED.findall(err)]


def talk(call: Call, bundle: Path, *lines: str, options: tuple[str, ...] = ()) -> Any:
    text = "".join(f"{line}\n" for line in lines)
    done = call("chat", bundle, "-v", *GREEDY, *options, stdin=text.encode())
    assert done.code == 0, done.err
    return done


def test_a_piped_conversation_keeps_its_cache(call: Call, float_bundle: Path) -> None:
    done = talk(call, float_bundle, "Who was Abraham?", "And his son?")
    (first, none, new), (second, cached, _) = turns_of(done.err)
    assert none == 0
    # All of the first turn but its last token, which only the next step would have run.
    assert cached >= first + new - 1
    assert second > cached
    assert done.out.count("\n") >= 2


def test_an_answer_is_that_of_run(call: Call, float_bundle: Path) -> None:
    said = call("run", float_bundle, "Who was Abraham?", *GREEDY).out
    assert talk(call, float_bundle, "Who was Abraham?").out == said


def test_clear_forgets_the_turns_and_keeps_the_system_message(
    call: Call, float_bundle: Path
) -> None:
    done = talk(
        call, float_bundle, "Who?", "And?", "/clear", "Who?", options=("--system", "Be brief.")
    )
    first, second, third = turns_of(done.err)
    assert third[0] == first[0] < second[0]


def test_system_sets_the_message_and_forgets_the_turns(call: Call, float_bundle: Path) -> None:
    kings = "/system Speak of kings, and of the kings of kings, and of their sons and daughters."
    done = talk(
        call, float_bundle, "Who?", kings, "Who?", "/system Be brief.", "Who?", "/system", "Who?"
    )
    plain, long, brief, again = (turn[0] for turn in turns_of(done.err))
    assert long > brief
    assert plain == again


def test_exit_leaves_what_follows_unread(call: Call, float_bundle: Path) -> None:
    for word in ("/exit", "/quit", "/bye"):
        done = talk(call, float_bundle, "", word, "Who was Abraham?")
        assert (done.out, turns_of(done.err)) == ("", [])


def test_help_and_unknown_commands_go_to_standard_error(call: Call, float_bundle: Path) -> None:
    done = talk(call, float_bundle, "/help", "/sistem Be brief.", "/clera")
    assert done.out == ""
    for word in ("/clear", "/system TEXT", "/exit", "Ctrl-C"):
        assert word in done.err
    assert "unknown command /sistem" in done.err
    assert "unknown command /clera" in done.err


def test_a_path_is_no_command(call: Call, float_bundle: Path) -> None:
    assert len(turns_of(talk(call, float_bundle, "/etc/hosts is what?").err)) == 1


def test_three_quotes_hold_several_lines_and_no_commands(call: Call, float_bundle: Path) -> None:
    done = talk(
        call, float_bundle, '"""Who was', "Abraham?", '"""', '"""', "/clear", '"""', '"""/exit"""',
        '"""the end is missing',
    )  # fmt: skip
    turns = turns_of(done.err)
    assert len(turns) == 4
    lengths = [turn[0] for turn in turns]
    assert lengths == sorted(lengths)


def test_a_message_beyond_the_context_is_refused_and_forgotten(
    call: Call, float_bundle: Path
) -> None:
    done = talk(call, float_bundle, "Abraham begat Isaac. " * 900, "Who?")
    assert "/clear forgets" in done.err
    assert len(turns_of(done.err)) == 1


def test_what_does_not_fit_is_one_line(call: Call, float_bundle: Path) -> None:
    assert "top_p" in call("chat", float_bundle, "--top-p", "2").complaint
    assert "not UTF-8" in call("chat", float_bundle, stdin=b"\xff\n").complaint


class Stopped:
    """An answer that Ctrl-C stops while its prompt is read."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason = None
        self.resets = 0
        self.runtime = self

    def reset(self) -> None:
        self.resets += 1

    def __iter__(self) -> Iterator[Any]:
        signal.raise_signal(signal.SIGINT)
        yield from ()


def test_ctrl_c_while_the_prompt_is_read_empties_the_cache(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half a step may be in it, and nothing was said that would belong to the conversation."""
    answer: Any = Stopped()
    before = signal.getsignal(signal.SIGINT)
    assert _show(answer) is False
    assert answer.resets == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert "[stopped]" in capsys.readouterr().err


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose answers take many seconds."""
    folder = tmp_path_factory.mktemp("endless")
    source = write_tiny_checkpoint(folder / "source", max_position_embeddings=32768, seed=3)
    return export(source, out=folder / "bundle").bundle


@pytest.fixture
def terminal(endless: Path) -> Iterator[Any]:
    """``qwen2x chat`` in a terminal, waiting for the first message."""
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(
        str(PROGRAM),
        ["chat", str(endless), "-v", "--temperature", "0", "--repetition-penalty", "1"],
        env=environment(TERM="dumb"),
        timeout=30,
        echo=False,
        encoding="utf-8",
        codec_errors="replace",
    )
    child.expect_exact("/help for commands")
    child.expect_exact("> ")
    yield child
    child.close(force=True)


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Any) -> None:
    terminal.sendline("Hello")
    terminal.expect(r"\S+ \S+")
    time.sleep(0.3)
    terminal.sendintr()
    terminal.expect_exact("[stopped]")
    terminal.expect(CACHED)
    stopped = int(terminal.match[1]) + int(terminal.match[3])
    assert int(terminal.match[3]) > 0
    terminal.expect_exact("> ")
    terminal.sendline("Go on")
    time.sleep(0.5)
    terminal.sendintr()
    terminal.expect_exact("[stopped]")
    terminal.expect(CACHED)
    # What was said stays, and so does what the cache holds of it.
    assert int(terminal.match[1]) >= stopped
    assert int(terminal.match[2]) > 0
    terminal.expect_exact("> ")
    terminal.sendline("/exit")
    terminal.wait()
    assert terminal.exitstatus == 0


def test_ctrl_c_at_the_prompt_leaves_with_130(terminal: Any) -> None:
    terminal.sendintr()
    terminal.expect_exact("interrupted")
    terminal.wait()
    assert terminal.exitstatus == 130


def test_ctrl_d_leaves_with_0(terminal: Any) -> None:
    terminal.sendeof()
    terminal.wait()
    assert terminal.exitstatus == 0
