"""``qwen2x chat``."""

from __future__ import annotations

import sys
from typing import Any

import click
from qwen2x.cli.options import (
    model_options,
    open_model,
    quantize_options,
    sampling_for,
    sampling_options,
    take_sampling,
)
from qwen2x.cli.output import log
from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.chat import Message

_HELP = """  /clear          forget the conversation
  /system TEXT    set the system message and forget the conversation
  /help           this list
  /exit           leave (or Ctrl-D)
  three quotes (\"\"\") begin and end a message of several lines; Ctrl-C stops an answer"""


@click.command("chat", epilog="Example: qwen2x chat qwen-int4 --system 'Answer in one sentence.'")
@click.argument("model")
@model_options
@quantize_options
@sampling_options
@click.option("--system", help="The system message.")
@click.option("-v", "--verbose", is_flag=True, help="Show tokens and speed after each answer.")
def command(
    model: str,
    max_tokens: int | None,
    system: str | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Talk with MODEL: a bundle, a Hugging Face folder, or a hub id.

    The KV cache is kept between turns, so only what is new is run. Ctrl-C stops the answer, not
    the program; at the prompt it leaves. /help lists the commands.
    """
    given = take_sampling(options)
    with open_model(model, **options) as runtime:
        sampling = sampling_for(runtime, given)
        talk = Conversation(runtime, sampling, max_tokens, system, verbose)
        if sys.stdin.isatty():
            log(f"{model} on {runtime.backend}, {runtime.device}; /help for commands")
        while (line := _read_message()) is not None:
            if not talk.obey(line):
                return


class Conversation:
    """The messages so far; answers are added as they were shown."""

    def __init__(
        self,
        runtime: Any,
        sampling: Any,
        max_tokens: int | None,
        system: str | None,
        verbose: bool,
    ) -> None:
        self._runtime = runtime
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._verbose = verbose
        self.messages: list[Message] = []
        self._begin(system)

    def obey(self, line: str) -> bool:
        """Runs a command or answers a message; false to leave."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return True
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word == "/help":
            log(_HELP)
        elif word == "/clear":
            self._begin(self._system)
        elif word == "/system":
            self._begin(rest.strip() or None)
        elif word.startswith("/") and " " not in line.strip() and word.count("/") == 1:
            log(f"unknown command {word}; /help lists them")
        else:
            self._answer(line)
        return True

    def _begin(self, system: str | None) -> None:
        self._system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def _answer(self, text: str) -> None:
        """One turn. What was shown before Ctrl-C stays in the conversation."""
        from qwen2x.runtimes.generate import generate

        self.messages.append({"role": "user", "content": text})
        try:
            answer = generate(
                self._runtime,
                self.messages,
                max_tokens=self._max_tokens,
                sampling=self._sampling,
            )
        except RequestError as error:
            self.messages.pop()
            log(f"{error} (/clear forgets the conversation)")
            return
        try:
            for piece in answer:
                click.echo(piece.text, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            log(" [stopped]")
        click.echo()
        self.messages.append({"role": "assistant", "content": answer.text})
        if self._verbose:
            new = len(answer.token_ids)
            speed = new / answer.decode_s if answer.decode_s else 0.0
            log(
                f"{len(answer.prompt_ids)} prompt tokens ({answer.cached_tokens} cached), "
                f"{new} new at {speed:.1f}/s"
            )


def _read_message() -> str | None:
    '''A line, or several between """ and """; None at the end.'''
    try:
        line = input("> " if sys.stdin.isatty() else "")
        if not line.lstrip().startswith('"""'):
            return line
        text = line.lstrip()[3:]
        while '"""' not in text:
            text += "\n" + input(". " if sys.stdin.isatty() else "")
        return text[: text.index('"""')]
    except EOFError:
        return None
