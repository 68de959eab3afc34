"""``qwen2x chat``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2x.cli.conversation import load, save, shift
from qwen2x.cli.options import (
    SAMPLING_NAMES,
    model_options,
    open_model,
    prompt_cache_option,
    quantize_options,
    sampling_for,
    sampling_options,
    system_option,
    take_sampling,
    yarn_option,
)
from qwen2x.cli.output import log, prefill_progress
from qwen2x.cli.run import rope_text, timings_of
from qwen2x.cli.speculating import speculating, speculation_options, speculation_text
from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.runtimes.chat import Message
    from qwen2x.runtimes.generate import Generation
    from qwen2x.runtimes.prompt_cache import PromptCache
    from qwen2x.runtimes.rope_choice import Yarn
    from qwen2x.runtimes.runtime import Runtime
    from qwen2x.runtimes.sampler import Sampling

_QUOTES = '"""'
_HELP = f"""  /clear              forget the conversation
  /system TEXT        set the system message and forget the conversation
  /set                show how answers are sampled
  /set FIELD VALUE    change it: {", ".join(SAMPLING_NAMES)}
  /save FILE          write the conversation as JSON
  /load FILE          go on with a saved one
  /help               this list
  /exit               leave (or Ctrl-D, or Ctrl-C twice)
  three quotes ({_QUOTES}) begin and end a message of several lines; Ctrl-C stops an answer"""
_WHOLE_NUMBERS = ("top_k", "seed")


@click.command(
    "chat", epilog="\b\nExample: qwen2x chat qwen-int4 --system 'Answer in one sentence.'"
)
@click.argument("model")
@model_options
@quantize_options
@sampling_options
@system_option
@yarn_option
@prompt_cache_option
@speculation_options
@click.option("-v", "--verbose", is_flag=True, help="Show tokens and speed after each answer.")
def command(
    model: str,
    max_tokens: int | None,
    system: str | None,
    yarn: Any,
    prompt_cache: Path | None,
    speculate: bool,
    draft: Path | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Talk with MODEL: a bundle, a Hugging Face folder, or a hub id.

    The KV cache is kept between turns, so only what is new is run; when the context is full, the
    oldest turns are forgotten. Ctrl-C stops the answer, not the program; twice at the prompt it
    leaves. /help lists the commands.
    """
    from qwen2x.runtimes.prompt_cache import PromptCache

    given = take_sampling(options)
    kept = PromptCache(prompt_cache) if prompt_cache else None
    guessing: dict[str, Any] = {"speculate": speculate, "draft": draft}
    guessing["threads"] = options["threads"]
    opening = open_model(model, yarn=yarn, **options)
    with opening as runtime, speculating(runtime, **guessing) as ahead:
        runtime.on_prefill = prefill_progress(is_verbose=verbose)
        if kept is not None:
            kept.check(runtime)
        talk = Conversation(
            runtime=runtime,
            sampling=sampling_for(runtime, given),
            max_tokens=max_tokens,
            yarn=yarn,
            prompt_cache=kept,
            is_verbose=verbose,
            speculate=ahead,
        )
        talk.begin(system)
        if sys.stdin is not None and sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 (gives input() arrow keys and a history)
            log(f"{model} on {runtime.backend}, {runtime.device}; /help for commands")
        _converse(talk)


def _converse(talk: Conversation) -> None:
    """Line by line to the end. At a terminal the first Ctrl-C in a row only warns."""
    is_warned = False
    while True:
        try:
            typed = _read_message()
            if typed is None or not talk.obey(typed):
                return
            is_warned = False
        except KeyboardInterrupt:
            if is_warned or not sys.stdin.isatty():
                raise
            is_warned = True
            log("\npress Ctrl-C again or /exit to leave")


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A message as it was typed; in quotes nothing is a command."""

    text: str
    is_quoted: bool = False


class Conversation:
    """The messages so far; answers are added as they were shown."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        sampling: Sampling,
        max_tokens: int | None,
        yarn: Yarn,
        prompt_cache: PromptCache | None,
        is_verbose: bool,
        speculate: bool | Runtime = False,
    ) -> None:
        self._runtime = runtime
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._yarn: Yarn = yarn
        self._prompt_cache = prompt_cache
        self._is_verbose = is_verbose
        self._speculate = speculate
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
        else:
            try:
                self._command(word, rest.strip())
            except RequestError as error:
                log(f"{word}: {error}")
        return True

    def _command(self, word: str, rest: str) -> None:
        match word:
            case "/help" | "/?":
                log(_HELP)
            case "/clear":
                self.begin(self._system)
            case "/system":
                self.begin(rest or None)
            case "/set":
                self._set(*rest.split())
            case "/save":
                log(f"wrote {save(self.messages, _required(rest))}")
            case "/load":
                self._load(_required(rest))
            case _:
                log(f"unknown command {word}; /help lists them, {_QUOTES} sends the line as it is")

    def _set(self, *words: str) -> None:
        """Changes one field of the sampling, or shows them all."""
        if words:
            if len(words) != 2:
                raise RequestError(f"expected a field and its value, got {' '.join(words)!r}")
            field = words[0].replace("-", "_")
            changed: dict[str, Any] = {field: _read_value(field, words[1])}
            self._sampling = replace(self._sampling, **changed)
        log(", ".join(f"{name} {getattr(self._sampling, name)}" for name in SAMPLING_NAMES))

    def _load(self, name: str) -> None:
        self.messages = load(name)
        first = self.messages[0]
        self._system = first["content"] if first["role"] == "system" else None
        log(f"going on after {len(self.messages)} messages")

    def _answer(self, text: str) -> None:
        """One turn. What was shown before Ctrl-C stays in the conversation."""
        from qwen2x.runtimes.generate import generate

        context = self._context
        try:
            messages, dropped = self._shifted([*self.messages, {"role": "user", "content": text}])
            answer = generate(
                self._runtime,
                messages,
                max_tokens=self._limit(messages),
                sampling=self._sampling,
                yarn=self._yarn,
                prompt_cache=self._prompt_cache,
                speculate=self._speculate,
            )
        except RequestError as error:
            log(f"{error} (this message is forgotten, /clear forgets all)")
            return
        if dropped:
            log(
                f"the context of {context} tokens is full: the oldest {dropped} turns are forgotten"
            )
        if _show(answer):
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._keep_prompt(answer)
        if len(answer.prompt_ids) + len(answer.token_ids) >= context:
            log(f"the context of {context} tokens is full: the answer ends here")
        elif self._runtime.cache_length + 1 >= self._runtime.rope_context:
            log(
                f"YaRN factor {answer.rope_factor:g} reaches {self._runtime.rope_context} tokens: "
                "the answer ends here, the next one gets a larger factor"
            )
        if self._is_verbose:
            speed = timings_of(answer, 0.0)["decode_tokens_per_s"]
            log(
                f"{len(answer.prompt_ids)} prompt tokens ({answer.cached_tokens} cached), "
                f"{len(answer.token_ids)} new at {speed:.1f}/s{rope_text(answer)}"
                f"{speculation_text(answer)}"
            )

    def _keep_prompt(self, answer: Generation) -> None:
        """Writes the prompt cache where it is due; a disk that is full ends no conversation."""
        if self._prompt_cache is None:
            return
        try:
            is_written = self._prompt_cache.save(self._runtime, answer.prompt_ids)
        except RequestError as error:
            log(str(error))
            return
        if is_written and self._is_verbose:
            log(f"wrote {self._prompt_cache.path}")

    def _shifted(self, messages: list[Message]) -> tuple[list[Message], int]:
        """The messages that leave room for an answer, a quarter of the context at most."""
        from qwen2x.runtimes.generate import read_text_files

        files = read_text_files(self._runtime.folder)
        context = self._context
        reserve = min(self._max_tokens or context, context // 4)
        return shift(messages, context, reserve, lambda kept: len(files.prompt_ids(kept)))

    @property
    def _context(self) -> int:
        """Positions that a conversation can have, with the factor that was asked for or any."""
        runtime = self._runtime
        return runtime.max_context if self._yarn == "auto" else runtime.rope_contexts[self._yarn]

    def _limit(self, messages: list[Message]) -> int | None:
        """New tokens at most, of those that were asked for, until the context is full."""
        from qwen2x.runtimes.generate import read_text_files

        if self._max_tokens is None:
            return None
        prompt = len(read_text_files(self._runtime.folder).prompt_ids(messages))
        return max(1, min(self._max_tokens, self._context - prompt))


def _required(name: str) -> str:
    if not name:
        raise RequestError("expected the name of a file, got nothing")
    return name


def _read_value(field: str, text: str) -> float:
    """The value of a field of ``Sampling``, whose range that class checks."""
    if field not in SAMPLING_NAMES:
        raise RequestError(f"expected {', '.join(SAMPLING_NAMES)}, got {field!r}")
    try:
        return int(text) if field in _WHOLE_NUMBERS else float(text)
    except ValueError:
        kind = "a whole number" if field in _WHOLE_NUMBERS else "a number"
        raise RequestError(f"expected {kind} for {field}, got {text!r}") from None


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
    if sys.stdin is None:
        return None
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
