"""How fast a runtime reads a prompt and writes an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.runtime import Runtime
from qwen2x.runtimes.sampler import Sampler, Sampling


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over the repeats."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float


def bench(
    runtime: Runtime, text_ids: Sequence[int], prompt_tokens: int, new_tokens: int, repeat: int
) -> Speed:
    """Greedy answers to a prompt cut from a text, repeated where it is too short.

    Args:
        runtime: what is measured.
        text_ids: tokens of any text.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer; its first token belongs to the prefill.
        repeat: runs that count; one more before them warms up.

    Raises:
        RequestError: the lengths do not fit the context, or there is nothing to measure.
    """
    if min(len(text_ids), prompt_tokens, new_tokens - 1, repeat) < 1:
        raise RequestError(
            "expected a text, prompt tokens and repeats of 1 or more, and new tokens of 2 or more, "
            f"got {len(text_ids)}, {prompt_tokens}, {repeat} and {new_tokens}"
        )
    if prompt_tokens + new_tokens > runtime.max_context:
        raise RequestError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens do not fit the context of "
            f"{runtime.max_context}; ask for fewer"
        )
    copies = -(-prompt_tokens // len(text_ids))
    prompt = (list(text_ids) * copies)[:prompt_tokens]
    runs = [_once(runtime, prompt, new_tokens) for _ in range(repeat + 1)][1:]
    runtime.reset()
    return Speed(
        prefill_tokens_per_s=median(prompt_tokens / first for first, _ in runs),
        decode_tokens_per_s=median((new_tokens - 1) / rest for _, rest in runs),
        time_to_first_token_s=median(first for first, _ in runs),
    )


def _once(runtime: Runtime, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for all others."""
    runtime.reset()
    sampler = Sampler(Sampling())
    started = time.perf_counter()
    token = sampler.choose(runtime.prefill(prompt))
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = sampler.choose(runtime.decode(token))
    return first, time.perf_counter() - started
