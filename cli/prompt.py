"""The prompt of ``run``: what was given as an argument, and what was piped."""

from __future__ import annotations

import os
import select
import stat
import sys
from typing import TextIO

from qwen2x.cli.output import log
from qwen2x.quantize.errors import RequestError

_PATIENCE_S = 1.0


def read_prompt(prompt: str | None) -> str:
    """The text to answer.

    Without PROMPT, or with ``-``, that is standard input. With both it is what was piped, an empty
    line and PROMPT: the order of ollama (``cmd.go``, RunHandler) and llm (``cli.py``, read_prompt).
    Unlike theirs, a PROMPT never waits for a pipe that stays silent.

    Raises:
        RequestError: it is empty, or not UTF-8.
    """
    if prompt is None or prompt == "-":
        text = _read_stdin(is_asked=prompt is None)
    elif (piped := _piped()).strip():
        text = f"{piped}\n\n{prompt}"
    else:
        text = prompt
    if not text.strip():
        raise RequestError("the prompt is empty; give a text, or - for standard input")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not UTF-8: {error.reason}; convert it") from None
    return text


def _read_stdin(*, is_asked: bool) -> str:
    if sys.stdin is None:
        raise RequestError(
            "expected a prompt on standard input, which is closed; give it as PROMPT"
        )
    if is_asked and sys.stdin.isatty():
        log("reading the prompt from standard input; end it with Ctrl-D")
    try:
        # The line end that echo and editors add is not part of what was asked.
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8: {error}; convert it") from None


def _piped() -> str:
    """What came along with PROMPT; empty where nothing did."""
    if sys.stdin is None or sys.stdin.isatty() or not _is_for_us(sys.stdin):
        return ""
    return _read_stdin(is_asked=False)


def _is_for_us(stream: TextIO) -> bool:
    """Whether a standard input that is no terminal was meant to be read.

    A script, ssh or a CI job hands on its own, which may be a pipe that nobody ever writes to.
    """
    try:
        number = stream.fileno()
    except OSError:
        return True  # in memory, as in tests
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        # A loop over the lines of a file hands it on half read: the rest belongs to the loop.
        return os.lseek(number, 0, os.SEEK_CUR) == 0
    if not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
        return False
    try:
        is_filled = bool(select.select([number], [], [], _PATIENCE_S)[0])
    except OSError:  # Windows can wait for sockets only
        is_filled = False
    if not is_filled:
        log(
            f"nothing came through standard input in {_PATIENCE_S:.0f} s, so PROMPT goes alone "
            "(- instead of PROMPT waits; </dev/null says that nothing will come)"
        )
    return is_filled
