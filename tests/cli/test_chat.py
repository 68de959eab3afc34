from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2x.cli.chat import _show
from qwen2x.cli.conversation import save, shift
from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import RequestError
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
    for word in ("/clear", "/system TEXT", "/set FIELD", "/save FILE", "/load FILE", "/exit"):
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
    done = talk(call, float_bundle, "Who?", "Abraham begat Isaac. " * 900, "Who?")
    assert "this message is forgotten" in done.err
    assert "turns are forgotten" not in done.err
    first, second = turns_of(done.err)
    assert second[0] > first[0] + first[2]


def test_the_oldest_turns_make_room_and_the_system_message_stays(
    call: Call, float_bundle: Path, tmp_path: Path
) -> None:
    """A conversation that outgrew the context ended with an error at every message."""
    kept = tmp_path / "kept.json"
    messages = [f"{index}: " + "Abraham begat Isaac. " * 40 for index in range(12)]
    done = talk(call, float_bundle, *messages, f"/save {kept}", options=("--system", "Be brief."))
    turns = turns_of(done.err)
    assert len(turns) == len(messages)
    shifts = re.findall(r"of 2048 tokens is full: the oldest (\d+) turns are forgotten", done.err)
    assert shifts
    # Not at every turn: after one, half of the context is free.
    assert len(shifts) <= 2
    assert all(prompt + 8 <= 2048 for prompt, _, _ in turns)
    saved = json.loads(kept.read_text())
    assert saved[0] == {"role": "system", "content": "Be brief."}
    assert saved[1]["role"] == "user"
    assert saved[1]["content"].startswith(f"{sum(map(int, shifts))}: ")
    assert saved[-2]["content"] == messages[-1]


def test_an_answer_that_fills_the_context_says_so_and_the_chat_goes_on(
    call: Call, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", max_position_embeddings=128, seed=3)
    out = export(source, out=tmp_path / "bundle").bundle
    done = call("chat", out, "-v", "--temperature", "0", stdin=b"Who?\nAnd?\n")
    assert done.code == 0
    assert "the context of 128 tokens is full: the answer ends here" in done.err
    assert len(turns_of(done.err)) == 2


def words(count: int) -> list[Any]:
    """A system message and ``count`` turns of ten words each, the last without its answer."""
    turn = [{"role": "user", "content": "u " * 5}, {"role": "assistant", "content": "a " * 5}]
    return [{"role": "system", "content": "s"}, *(turn * count)[:-1]]


def word_count(messages: list[Any]) -> int:
    return sum(len(message["content"].split()) for message in messages)


@pytest.mark.parametrize(
    ("turns", "context", "reserve", "dropped"),
    [
        (5, 100, 25, 0),
        (8, 100, 25, 3),  # 76 words: the four turns that stay, and the half, are 46
        (2, 17, 4, 1),  # nothing else to drop
        (2, 30, 16, 1),
        (2, 20, 4, 0),  # the half would leave the last message alone
        (1, 4, 1, 0),  # for the caller to refuse
    ],
)
def test_as_many_turns_go_as_make_half_of_the_context_free(
    turns: int, context: int, reserve: int, dropped: int
) -> None:
    messages = words(turns)
    kept, count = shift(messages, context, reserve, word_count)
    assert count == dropped
    assert kept == [messages[0], *messages[1 + 2 * dropped :]]


def test_set_changes_the_sampling(call: Call, float_bundle: Path) -> None:
    greedy = talk(call, float_bundle, "Who was Abraham?").out
    sampled = ("--temperature", "2", "--seed", "1")
    lines = ("/set temperature 0", "/set repetition-penalty 1", "/set")
    done = call(
        "chat", float_bundle, *sampled, "--max-tokens", "8",
        stdin="\n".join([*lines, "Who was Abraham?", ""]).encode(),
    )  # fmt: skip
    assert done.out == greedy
    assert done.err.splitlines()[-1].startswith("temperature 0.0, top_p ")
    assert done.err.splitlines()[-1].endswith("repetition_penalty 1.0, seed 1")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set heat 1", "/set: expected temperature, top_p, top_k, min_p, repetition_penalty"),
        ("/set temperature", "/set: expected a field and its value, got 'temperature'"),
        ("/set temperature 0.7 0.8", "/set: expected a field and its value"),
        ("/set temperature warm", "/set: expected a number for temperature, got 'warm'"),
        ("/set top_k 1.5", "/set: expected a whole number for top_k, got '1.5'"),
        ("/set top_p 2", "/set: top_p must be a number above 0 and at most 1, got 2.0"),
        ("/set temperature nan", "temperature must be a number in 0..100, got nan"),
        ("/save", "/save: expected the name of a file, got nothing"),
        ("/save {tmp}/no/file", "file cannot be written: No such file or directory"),
        ("/save {tmp}", "cannot be written: it is no regular file"),
        ("/save /dev/null", "/save: /dev/null cannot be written: it is no regular file"),
        ("/load", "/load: expected the name of a file, got nothing"),
        ("/load {tmp}/absent", "absent cannot be read: No such file or directory"),
        ("/load {tmp}", "cannot be read: it is no regular file"),
        ("/load {tmp}/latin1", "cannot be read: 'utf-8' codec"),
        ("/load {tmp}/text", "cannot be read: Expecting value"),
        ("/load {tmp}/object", "expected a list of messages, got {{'role'"),
        ("/load {tmp}/empty", "expected a list of messages, got []"),
        ("/load {tmp}/number", "expected an object with role and content as text, got 1 as"),
        ("/load {tmp}/silent", "expected an object with role and content as text"),
        ("/load {tmp}/half", "expected an object with role and content as text"),
        ("/load {tmp}/tool", "expected role system or user or assistant, got 'tool' as message 1"),
        ("/load {tmp}/late", "expected role user or assistant, got 'system' as message 2"),
    ],
)
def test_what_a_command_cannot_take_is_one_line(
    line: str, said: str, call: Call, float_bundle: Path, tmp_path: Path
) -> None:
    user = {"role": "user", "content": "Who?"}
    for name, value in {
        "object": user,
        "empty": [],
        "number": [1],
        "silent": [{"role": "user"}],
        "half": [{"role": "user", "content": "\ud83d"}],
        "tool": [{"role": "tool", "content": ""}],
        "late": [user, {"role": "system", "content": ""}],
    }.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "text").write_text("Who?")
    (tmp_path / "latin1").write_bytes(b"\xe9")
    done = talk(call, float_bundle, "Who?", line.format(tmp=tmp_path), "And?")
    first, message, second = done.err.splitlines()
    assert said.format() in message
    # The conversation is as it was.
    (one, _, _), (other, cached, _) = turns_of(f"{first}\n{second}\n")
    assert other > one
    assert cached >= one


def test_a_conversation_is_saved_and_gone_on_with(
    call: Call, float_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a talk.json"
    path.write_text("before")
    system = ("--system", "Be brief.")
    said = talk(
        call, float_bundle, "Who was Abraham? שלום", f"/save {path}", "And?", options=system
    )
    first, second = said.out.splitlines()
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who was Abraham? שלום"},
        {"role": "assistant", "content": first},
    ]
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
    loaded = talk(call, float_bundle, f"/load {path}", "And?", "/clear", "Who was Abraham? שלום")
    assert loaded.out.splitlines() == [second, first]
    assert "going on after 3 messages" in loaded.err


def test_nothing_said_is_nothing_to_save(call: Call, float_bundle: Path, tmp_path: Path) -> None:
    done = talk(call, float_bundle, f"/save {tmp_path}/talk.json")
    assert "expected a conversation, got none yet" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "talk.json"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RequestError, match="No space left"):
        save(words(1), str(path))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


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


def test_ctrl_c_at_the_prompt_warns_once_and_leaves_with_130(terminal: Any) -> None:
    """One too many, right after an answer, ended the conversation."""
    terminal.sendintr()
    terminal.expect_exact("press Ctrl-C again or /exit to leave")
    terminal.expect_exact("> ")
    terminal.sendintr()
    terminal.expect_exact("interrupted")
    terminal.wait()
    assert terminal.exitstatus == 130


def test_a_line_between_two_ctrl_c_begins_anew(terminal: Any) -> None:
    for _ in range(2):
        terminal.sendintr()
        terminal.expect_exact("press Ctrl-C again or /exit to leave")
        terminal.expect_exact("> ")
        terminal.sendline("/set")
        terminal.expect_exact("temperature 0.0")
        terminal.expect_exact("> ")
    terminal.sendline("/exit")
    terminal.wait()
    assert terminal.exitstatus == 0


def test_ctrl_d_leaves_with_0(terminal: Any) -> None:
    terminal.sendeof()
    terminal.wait()
    assert terminal.exitstatus == 0
