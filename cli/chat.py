"""``qwen2x chat``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from qwen2x.cli.options import (
    model_options,
    open_model,
    quantize_options,
    sampling_for,
    sampling_options,
    system_option,
    take_sampling,
)
from qwen2x.cli.output import log
from qwen2x.cli.run import timings_of
from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.runtimes.chat import Message
    from qwen2x.runtimes.generate import Generation
    from qwen2x.runtimes.runtime import Runtime
    from qwen2x.runtimes.sampler import Sampling

_QUOTES = '"""'
_HELP = f"""  /clear          forget the conversation
  /system TEXT    set the system message and forget the conversation
  /help           this list
  /exit           leave (or Ctrl-D)
  three quotes ({_QUOTES}) begin and end a message of several lines; Ctrl-C stops an answer"""


@click.command(
    "chat", epilog="\b\nExample: qwen2x chat qwen-int4 --system 'Answer in one sentence.'"
)
@click.argument("model")
@model_options
@quantize_options
@sampling_options
@system_option
@click.option("-v", "--verbose", is_flag=True, help="Show tokens and speed after each answer.")
def command(
    model: str, max_tokens: int | None, system: str | None, verbose: bool, **options: Any
) -> None:
    """Talk with MODEL: a bundle, a Hugging Face folder, or a hub id.

    The KV cache is kept between turns, so only what is new is run. Ctrl-C stops the answer, not
    the program; at the prompt it leaves. /help lists the commands.
    """
    given = take_sampling(options)
    with open_model(model, **options) as runtime:
        talk = Conversation(
            runtime=runtime,
            sampling=sampling_for(runtime, given),
            max_tokens=max_tokens,
            is_verbose=verbose,
        )
        talk.begin(system)
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 (gives input() arrow keys and a history)
            log(f"{model} on {runtime.backend}, {runtime.device}; /help for commands")
        while (message := _read_message()) is not None:
            if not talk.obey(message):
                return


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A message as it was typed; in quotes nothing is a command."""

    text: str
    is_quoted: bool = False


class Conversation:
    """The messages so far; answers are added as they were shown."""

    def __init__(
        self, *, runtime: Runtime, sampling: Sampling, max_tokens: int | None, is_verbose: bool
    ) -> None:
        self._runtime = runtime
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._is_verbose = is_verbose
        self.messages: list[Message] = []

    def begin(self, system: str | None) -> None:
        """Forgets everything; with a text, that is the system message from now on."""
        self._system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def obey(self, typed: Typed) -> bool:
        """Runs a command or answers a message; false to leave."""
        word, _, rest = typed.text.strip().partition(" ")
        if not word:
            return True
        # A second slash is that of a path, with which a question may begin.
        if typed.is_quoted or not word.startswith("/") or word.count("/") > 1:
            self._answer(typed.text)
        elif word in ("/exit", "/quit", "/bye"):
            return False
        elif word in ("/help", "/?"):
            log(_HELP)
        elif word == "/clear":
            self.begin(self._system)
        elif word == "/system":
            self.begin(rest.strip() or None)
        else:
            log(f"unknown command {word}; /help lists them, {_QUOTES} sends the line as it is")
        return True

    def _answer(self, text: str) -> None:
        """One turn. What was shown before Ctrl-C stays in the conversation."""
        from qwen2x.runtimes.generate import generate

        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = generate(
                self._runtime, messages, max_tokens=self._max_tokens, sampling=self._sampling
            )
        except RequestError as error:
            log(f"{error} (/clear forgets the conversation)")
            return
        if _show(answer):
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        if self._is_verbose:
            speed = timings_of(answer, 0.0)["decode_tokens_per_s"]
            log(
                f"{len(answer.prompt_ids)} prompt tokens ({answer.cached_tokens} cached), "
                f"{len(answer.token_ids)} new at {speed:.1f}/s"
            )


def _show(answer: Generation) -> bool:
    """Prints an answer as it comes; false if Ctrl-C stopped it before its first token."""
    try:
        with _interrupt_noted(answer) as noted:
            for piece in answer:
                click.echo(piece.text, nl=False)
                sys.stdout.flush()
                if noted:
                    log(" [stopped]")
                    break
    except KeyboardInterrupt:
        # Half a step may be in the cache: the next turn begins with an empty one.
        answer.runtime.reset()
        log(" [stopped]")
    click.echo()
    return bool(answer.token_ids or answer.finish_reason)


@contextmanager
def _interrupt_noted(answer: Generation) -> Iterator[list[int]]:
    """A list that Ctrl-C fills, so that the step of a token ends in order and the cache is kept.

    While the prompt is read, which may take long, and the second time it raises.
    """
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted or not answer.token_ids:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _read_message() -> Typed | None:
    '''A line, or several between """ and """; None at the end.'''
    is_asked = sys.stdin.isatty()
    try:
        line = input("> " if is_asked else "")
        if not line.lstrip().startswith(_QUOTES):
            return Typed(text=line)
        text = line.lstrip().removeprefix(_QUOTES)
        with suppress(EOFError):
            while _QUOTES not in text:
                text += "\n" + input(". " if is_asked else "")
        return Typed(text=text.partition(_QUOTES)[0], is_quoted=True)
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8: {error}; convert it") from None
