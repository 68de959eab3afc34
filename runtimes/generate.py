"""The loop: prompt in, text out as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.cache_bookkeeping import integers
from qwen2x.runtimes.chat import ChatTemplate, Message, read_chat_template
from qwen2x.runtimes.draft_model import DraftModel, require_same_tokenizer
from qwen2x.runtimes.prompt_cache import PromptCache, common_prefix
from qwen2x.runtimes.prompt_lookup import PromptLookup
from qwen2x.runtimes.rope_choice import Yarn, choose_rope
from qwen2x.runtimes.runtime import Runtime, SamplesAhead
from qwen2x.runtimes.sampler import Sampler, Sampling, read_sampling
from qwen2x.runtimes.speculation import SpeculationCounts, guess_ahead
from qwen2x.runtimes.tokenizer import StopFilter, Tokenizer

FinishReason = Literal["stop", "length"]
_TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some text, and the token that completed it (None for what was held back to the end)."""

    text: str
    token_id: int | None


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """What stands beside the weights: tokenizer, chat template, generation defaults."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation: dict[str, Any]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer.

        Raises:
            RequestError: the model has no chat template.
        """
        if self.template is None:
            raise RequestError("this model has no chat template (a base model?); use --raw")
        return self.tokenizer.encode(self.template.render(messages))


def read_text_files(folder: Path) -> TextFiles:
    """Reads them once per folder, and again when one of them has changed."""
    folder = folder.resolve()
    return _read_text_files(folder, tuple(_stamp(folder / name) for name in _TEXT_FILES))


@lru_cache(maxsize=8)
def _read_text_files(folder: Path, _stamps: tuple[tuple[int, int] | None, ...]) -> TextFiles:
    return TextFiles(
        tokenizer=Tokenizer(folder),
        template=read_chat_template(folder),
        generation=_read_generation(folder / "generation_config.json"),
    )


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _read_generation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        generation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(generation, dict):
        raise RequestError(f"{path} must hold a JSON object, got {generation!r:.80}")
    return generation


@dataclass
class Generation:
    """One answer: iterate over it, once, for its pieces; its facts are there when it ends.

    ``rope_factor`` is the YaRN factor for all of its tokens, None the one in use. A prompt that was
    in the cache with another factor is read once more; ``prefilled_again`` counts those tokens.
    ``room`` is what the KV cache is made for beforehand: positions of the prompt, and of as many
    tokens as were asked for. ``prefill_s`` is the time that the first token took, reading a prompt
    cache included, ``decode_s`` what the others were waited
    for: a runtime that samples ahead works on while their text is used.
    """

    runtime: Runtime
    prompt_ids: list[int]
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    rope_factor: float | None = None
    room: int = 0
    prompt_cache: PromptCache | None = None
    speculate: bool | Runtime = False
    speculation: SpeculationCounts | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    prefilled_again: int = 0
    finish_reason: FinishReason | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def __post_init__(self) -> None:
        StopFilter(self.stop)

    def __iter__(self) -> Iterator[Piece]:
        if self.token_ids:
            raise RequestError("this answer was given already; call generate again")
        stream = read_text_files(self.runtime.folder).tokenizer.stream()
        stops = StopFilter(self.stop)
        for token_id in self._tokens():
            text = stops.push(stream.push(token_id))
            self.text += text
            yield Piece(text=text, token_id=token_id)
            if stops.is_stopped:
                self.finish_reason = "stop"
                return
        text = stops.push(stream.finish())
        if stops.is_stopped:
            self.finish_reason = "stop"
        text += stops.finish()
        self.text += text
        if text:
            yield Piece(text=text, token_id=None)

    def run(self) -> Generation:
        """Generates to the end."""
        for _ in self:
            pass
        return self

    def _tokens(self) -> Iterator[int]:
        """Token ids until an end token (which is not given) or the limit."""
        with closing(self._choices()) as choices:
            while len(self.token_ids) < self.max_tokens:
                started = time.perf_counter()
                token_id = next(choices)
                seconds = time.perf_counter() - started
                if self.token_ids:
                    self.decode_s += seconds
                else:
                    self.prefill_s = seconds
                if token_id in self.runtime.eos_token_ids and not self.ignore_eos:
                    self.finish_reason = "stop"
                    return
                self.token_ids.append(token_id)
                yield token_id
        self.finish_reason = "length"

    def _choices(self) -> Generator[int, None, None]:
        """Token after token, each chosen from the logits behind the one before."""
        runtime = self.runtime
        if self.rope_factor not in (None, runtime.rope_factor):
            self.prefilled_again = common_prefix(runtime.cached_ids, self.prompt_ids)
            runtime.use_rope(self.rope_factor)
        if self.prompt_cache is not None:
            self.prompt_cache.load(runtime, self.prompt_ids, self.room)
        shared = common_prefix(runtime.cached_ids, self.prompt_ids)
        # The last token is run in any case: nothing else gives its logits.
        self.cached_tokens = min(shared, len(self.prompt_ids) - 1)
        runtime.truncate(self.cached_tokens)
        runtime.reserve(self.room)
        fresh = self.prompt_ids[self.cached_tokens :]
        # Rows of a padded vocabulary have no text; they are never chosen.
        known = read_text_files(runtime.folder).tokenizer.size
        if self.speculate is not False:
            yield from self._speculated(fresh, known)
            return
        if isinstance(runtime, SamplesAhead):
            context, limit = self.prompt_ids, self.max_tokens
            yield from runtime.sample_ahead(
                fresh, self.sampling, context=context, known=known, limit=limit
            )
            return
        sampler = Sampler(self.sampling, self.prompt_ids)
        logits = runtime.prefill(fresh)
        while True:
            token_id = sampler.choose(logits[:known])
            yield token_id
            logits = runtime.decode(token_id)

    def _speculated(self, fresh: list[int], known: int) -> Generator[int, None, None]:
        runtime, prompt = self.runtime, self.prompt_ids
        counts = self.speculation = SpeculationCounts()
        logits = runtime.prefill(fresh)
        drafter = (
            PromptLookup(prompt)
            if isinstance(self.speculate, bool)
            else DraftModel(self.speculate, prompt, known)
        )
        sampler, limit = Sampler(self.sampling, prompt), self.max_tokens
        yield from guess_ahead(runtime, logits, sampler, drafter, counts, known=known, limit=limit)


def generate(
    runtime: Runtime,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    system: str | None = None,
    raw: bool = False,
    ignore_eos: bool = False,
    yarn: Yarn = "auto",
    prompt_cache: PromptCache | None = None,
    speculate: bool | Runtime = False,
) -> Generation:
    """Answers a prompt.

    Args:
        runtime: what ``open_runtime`` gave. Tokens that its cache shares with the prompt are kept.
        prompt: a text, a conversation, or token ids (which are taken as they are).
        max_tokens: new tokens at most; by default what the checkpoint says, or the rest of the
            context that goes with the prompt (see ``choose_rope``).
        sampling: by default the checkpoint's ``generation_config.json``.
        stop: one or several strings that end the text and do not appear in it.
        system: the system message, with a text prompt and without raw.
        raw: continue the text, without the chat template.
        ignore_eos: go on to the limit, for measurements.
        yarn: ``auto`` takes the smallest factor of the bundle that reaches over prompt and answer;
            a number takes that one.
        prompt_cache: a file with the KV cache of an earlier prompt; ``save`` is up to the caller.
        speculate: guess ahead, where that is faster: from the text itself, or with a smaller model
            of the same family. The text stays what it would be.

    Raises:
        RequestError: an empty prompt, one that does not fit the context with its answer, a factor
            that is not there, settings out of range, or a smaller model with another tokenizer.
    """
    if not isinstance(speculate, bool):
        require_same_tokenizer(runtime, speculate)
    files = read_text_files(runtime.folder)
    prompt_ids = prompt_ids_of(files, prompt, system, raw)
    limit = files.generation.get("max_new_tokens") if max_tokens is None else max_tokens
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise RequestError(f"max tokens must be an integer of 1 or more, got {limit!r}")
    chosen = choose_rope(runtime.rope_contexts, len(prompt_ids), max_tokens, yarn)
    return Generation(
        runtime=runtime,
        prompt_ids=prompt_ids,
        sampling=sampling or read_sampling(files.generation),
        max_tokens=chosen.max_tokens if limit is None else min(limit, chosen.max_tokens),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=ignore_eos,
        rope_factor=chosen.factor,
        room=len(prompt_ids) + (max_tokens or 0),
        prompt_cache=prompt_cache,
        speculate=speculate,
    )


def prompt_ids_of(
    files: TextFiles, prompt: str | Sequence[Message] | Sequence[int], system: str | None, raw: bool
) -> list[int]:
    """The token ids of a prompt, as ``generate`` takes it.

    Raises:
        RequestError: an empty prompt, or a system message that has no place in it.
    """
    if system is not None and (raw or not isinstance(prompt, str)):
        raise RequestError(
            "a system message goes with a text prompt and the chat template; put it into the "
            "messages, or into the text"
        )
    if len(prompt) == 0 or (isinstance(prompt, str) and not prompt.strip()):
        raise RequestError("the prompt is empty; give a text, or - for standard input")
    if not isinstance(prompt, str):
        messages = [part for part in prompt if isinstance(part, Mapping)]
        if messages and len(messages) == len(prompt):
            return files.prompt_ids(messages)
        return integers(prompt)
    if raw or (files.template is None and system is None):
        return files.tokenizer.encode(prompt)
    turns: list[Message] = [{"role": "user", "content": prompt}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return files.prompt_ids(turns)
