"""Which YaRN factor a request gets: one for all of its tokens, and no larger than it needs.

A larger factor changes short prompts too, so ``auto`` takes the smallest one that reaches far
enough. The choice depends on the request alone, not on what was asked before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.ropes import factor_refused

Yarn = float | Literal["auto"]
# Tokens of an answer whose length nobody says, for which a factor must leave room; of a model with
# a small context, a quarter of it.
_USUAL_ANSWER = 2048


@dataclass(frozen=True, kw_only=True)
class RopeChoice:
    """A factor, and the new tokens that it has room for at most."""

    factor: float
    max_tokens: int


def choose_rope(
    every: Mapping[float, int], prompt_tokens: int, max_tokens: int | None, yarn: Yarn = "auto"
) -> RopeChoice:
    """The factor for a prompt and its answer.

    Args:
        every: positions that each factor reaches, by factor, rising; as in ``Runtime``.
        prompt_tokens: of the prompt.
        max_tokens: new tokens that there must be room for. None takes what the factor has room
            for, at least 2,048 (or a quarter of the smallest context) if any factor has.
        yarn: ``auto``, or one of the factors.

    Raises:
        RequestError: a factor that it does not have, or no factor reaches far enough.
    """
    if yarn != "auto" and yarn not in every:
        raise factor_refused(yarn, every)
    contexts = every if yarn == "auto" else {yarn: every[yarn]}
    usual = min(_USUAL_ANSWER, min(every.values()) // 4)
    wanted = prompt_tokens + (usual if max_tokens is None else max_tokens)
    fitting = [factor for factor, context in contexts.items() if context >= wanted]
    # The smallest factor that is enough, else the one that reaches farthest.
    factor = fitting[0] if fitting else max(contexts, key=lambda each: contexts[each])
    room = contexts[factor] - prompt_tokens
    least = 1 if max_tokens is None else max_tokens
    if room < least:
        raise _too_long(prompt_tokens, max_tokens, factor, every)
    return RopeChoice(factor=factor, max_tokens=room if max_tokens is None else max_tokens)


def _too_long(
    prompt_tokens: int, max_tokens: int | None, factor: float, every: Mapping[float, int]
) -> RequestError:
    answer = "at least one" if max_tokens is None else str(max_tokens)
    with_factor = "" if len(every) == 1 else f" with YaRN factor {factor:g}"
    return RequestError(
        f"the prompt has {prompt_tokens} tokens, the context {every[factor]}{with_factor}, with "
        f"{answer} for the answer; "
        + _advice(prompt_tokens + (max_tokens or 1), max_tokens is not None, every)
    )


def _advice(needed: int, has_limit: bool, every: Mapping[float, int]) -> str:
    """What to do, and which factor would hold it."""
    shorten = "shorten the prompt" + (" or ask for fewer tokens" if has_limit else "")
    holding = [factor for factor, context in every.items() if context >= needed]
    if holding:
        return f"{shorten}, or choose --yarn {holding[0]:g}"
    native = max(context / factor for factor, context in every.items())
    larger = 2.0 ** math.ceil(math.log2(needed / native))
    factors = [*every, *([larger] if larger not in every else [])]
    listed = ",".join(f"{factor:g}" for factor in sorted({1.0, *factors}))
    return f"{shorten}, or export with --yarn {listed}"
