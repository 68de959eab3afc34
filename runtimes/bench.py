"""How fast a runtime reads a prompt and writes an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.batch import Batch, open_batch
from qwen2x.runtimes.rope_choice import Yarn, choose_rope
from qwen2x.runtimes.runtime import Runtime, SamplesAhead
from qwen2x.runtimes.sampler import Sampler, Sampling


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one run, or medians over the repeats."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float


def bench(
    runtime: Runtime,
    text_ids: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    on_run: Callable[[int, Speed], None] = lambda run, speed: None,
    *,
    yarn: Yarn = "auto",
) -> Speed:
    """Greedy answers to a prompt cut from a text, repeated where it is too short.

    Args:
        runtime: what is measured.
        text_ids: tokens of any text.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer; its first token belongs to the prefill.
        repeat: runs that count; one more before them warms up.
        on_run: told the number of every run, 0 for the one that warms up, and its speed.
        yarn: the factor, see ``choose_rope``.

    Raises:
        RequestError: the lengths do not fit the context, or there is nothing to measure.
    """
    if min(len(text_ids), prompt_tokens, new_tokens - 1, repeat) < 1:
        raise RequestError(
            "expected a text, prompt tokens and repeats of 1 or more, and new tokens of 2 or more, "
            f"got {len(text_ids)}, {prompt_tokens}, {repeat} and {new_tokens}"
        )
    runtime.use_rope(choose_rope(runtime.rope_contexts, prompt_tokens, new_tokens, yarn).factor)
    copies = -(-prompt_tokens // len(text_ids))
    prompt = (list(text_ids) * copies)[:prompt_tokens]
    runs = []
    for run in range(repeat + 1):
        first, rest = _once(runtime, prompt, new_tokens)
        speed = Speed(
            prefill_tokens_per_s=prompt_tokens / first,
            decode_tokens_per_s=(new_tokens - 1) / rest,
            time_to_first_token_s=first,
        )
        on_run(run, speed)
        runs.append(speed)
    runtime.reset()
    return Speed(
        **{
            name: median(getattr(speed, name) for speed in runs[1:])
            for name in Speed.__dataclass_fields__
        }
    )


def prompt_of(text_ids: Sequence[int], prompt_tokens: int) -> list[int]:
    """A prompt of that length, cut from a text that is repeated where it is too short."""
    copies = -(-prompt_tokens // len(text_ids))
    return (list(text_ids) * copies)[:prompt_tokens]


@dataclass(frozen=True, kw_only=True)
class BatchSpeed:
    """Tokens per second of all sequences of a batch together, and of one alone, in turn."""

    batch_decode_tokens_per_s: float
    single_decode_tokens_per_s: float


def bench_batch(
    runtime: Runtime, prompt: Sequence[int], new_tokens: int, sequences: int, repeat: int
) -> BatchSpeed:
    """Greedy answers of several sequences, which decode together, to one prompt.

    One alone is measured between them, so that both see the same machine; medians of the repeats.

    Raises:
        BackendError: this runtime has no batches.
    """
    seconds: dict[int, list[float]] = {1: [], sequences: []}
    batch = open_batch(runtime, sequences)
    try:
        for _ in range(repeat + 1):
            for count, runs in seconds.items():
                runs.append(_together(batch, count, prompt, new_tokens))
    finally:
        batch.close()
    speeds = {count: count * (new_tokens - 1) / median(runs[1:]) for count, runs in seconds.items()}
    return BatchSpeed(
        batch_decode_tokens_per_s=speeds[sequences], single_decode_tokens_per_s=speeds[1]
    )


def _together(batch: Batch, count: int, prompt: Sequence[int], new_tokens: int) -> float:
    """Seconds of all tokens but the first ones."""
    slots = [batch.open_slot() for _ in range(count)]
    tokens = [int(slot.prefill(prompt).argmax()) for slot in slots]
    started = time.perf_counter()
    for _ in range(new_tokens - 1):
        logits = batch.decode(list(zip(slots, tokens, strict=True)))
        tokens = [int(row.argmax()) for row in logits]
    seconds = time.perf_counter() - started
    for slot in slots:
        slot.close()
    return seconds


def _once(runtime: Runtime, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for all others, made in the way that ``generate`` does."""
    runtime.reset()
    started = time.perf_counter()
    tokens = _greedy(runtime, prompt, new_tokens)
    next(tokens)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in tokens:
        pass
    return first, time.perf_counter() - started


def _greedy(runtime: Runtime, prompt: list[int], new_tokens: int) -> Iterator[int]:
    if isinstance(runtime, SamplesAhead):
        known = runtime.vocab_size
        yield from runtime.sample_ahead(
            prompt, Sampling(), context=prompt, known=known, limit=new_tokens
        )
        return
    sampler = Sampler(Sampling())
    token = sampler.choose(runtime.prefill(prompt))
    yield token
    for _ in range(new_tokens - 1):
        token = sampler.choose(runtime.decode(token))
        yield token
