"""``validate``: the bundle's logits against PyTorch's, and against its own by other ways."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qwen2x.runtimes.compare import Difference, compare, kl_divergence, windows_of
from qwen2x.runtimes.generate import Generation, read_text_files
from qwen2x.runtimes.runtime import AttendsByProducts, Logits, ReadsPromptsInInt8, Runtime
from qwen2x.runtimes.sampler import Sampling
from qwen2x.runtimes.tolerance import Tolerance

_PROBE = 48
_GREEDY_TOKENS = 32
_CHUNK = 13
# Rows of passes over guessed tokens, the longest among them: kernels take several together.
_GUESSED = (5, 16, 2)
# A greedy choice between two tokens whose logits are this close is a tie, which summing in another
# order may break the other way.
_TIE = 1e-3
# Steps through the cache and the whole differ by the rounding of int8 activations, which moves the
# logits of few bits more: as the root of the divergence that is allowed, 0.5 with 8 bits.
_TIE_QUANTIZED, _KL_OF_IT = 0.5, 0.005
# What a prompt in int8 may add to the divergence: rows of int8 cost 0.002 by themselves.
_PROMPT_KL = 0.005
_SHORTEST_WITH_PROMPT = 96


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure against its limit. ``is_floor``: the value must reach the limit.

    ``judge``: who was asked, where that depends on the tolerance.
    """

    name: str
    value: float
    limit: float
    is_floor: bool = False
    judge: str | None = None

    @property
    def verdict(self) -> str:
        """``pass`` or ``fail``; a figure that is no number fails."""
        holds = self.value >= self.limit if self.is_floor else self.value <= self.limit
        return "pass" if holds else "fail"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a validation."""

    difference: Difference
    checks: list[Check]
    tolerance: Tolerance
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``pass`` if every check passed."""
        failed = any(check.verdict == "fail" for check in self.checks)
        return "fail" if failed else "pass"

    def to_json(self) -> dict[str, Any]:
        """The object that ``validate --json`` prints."""
        checks = [
            {
                "name": check.name,
                "verdict": check.verdict,
                "value": _number(check.value),
                "limit": check.limit,
            }
            | ({"judge": check.judge} if check.judge else {})
            for check in self.checks
        ]
        return {
            "verdict": self.verdict,
            **{name: _number(value) for name, value in self.difference.figures().items()},
            "checks": checks,
            **self.facts,
            "tolerance": asdict(self.tolerance),
        }


def validate(
    candidate: Runtime,
    reference: Runtime,
    token_ids: Sequence[int],
    *,
    tolerance: Tolerance,
    tokens: int = 1024,
    window: int = 512,
    on_step: Callable[[str], None] = lambda step: None,
) -> Report:
    """Runs the same tokens through both, with the factors in use, and checks the figures.

    Args:
        candidate: the bundle's runtime.
        reference: the judge, transformers in float32.
        token_ids: of the text, at least two.
        tolerance: the limits.
        tokens: how many of them to compare.
        window: tokens that are read at once.
        on_step: told what is about to run.

    Raises:
        RequestError: a text too short, or values out of range.
    """
    windows = windows_of(token_ids, tokens, min(window, candidate.rope_context))
    on_step("logits")
    difference = compare(reference, candidate, windows)
    checks = _limits(difference, tolerance)
    if _reads_in_int8(candidate) and len(windows[0]) >= _SHORTEST_WITH_PROMPT:
        on_step("behind_prompt")
        checks.append(_behind_prompt(candidate, reference, list(windows[0]), tolerance))
    probe = list(token_ids[: min(_PROBE, candidate.rope_context)])
    on_step("cache_equals_prefill")
    whole, stepwise = _whole(candidate, probe), _by_cache(candidate, probe)
    checks.append(_same("cache_equals_prefill", whole, stepwise, tolerance))
    if isinstance(candidate, AttendsByProducts) and candidate.has_products:
        on_step("products_equal_prefill")
        by_products = _by_products(candidate, probe)
        checks.append(_same("products_equal_prefill", whole, by_products, tolerance))
    on_step("chunked_equals_whole")
    checks.append(chunked_equals_whole(candidate, probe, tolerance))
    on_step("guesses_equal_prefill")
    guessed = _by_guesses(candidate, probe)
    checks.append(_same("guesses_equal_prefill", whole, guessed, tolerance))
    on_step("batch_equals_single")
    checks.append(_batch_equals_single(candidate, probe, tolerance))
    on_step("long_positions")
    checks.append(_long_positions(candidate, reference, probe, tolerance))
    on_step("greedy_text_equal")
    checks.append(_greedy_text_equal(candidate, reference, probe, tolerance))
    candidate.reset()
    facts = {
        "backend": candidate.backend,
        "device": candidate.device,
        "dtype": candidate.dtype,
        "bits_per_weight": candidate.bits_per_weight,
        "guesses_are_exact": bool(np.array_equal(stepwise, guessed)),
    }
    return Report(difference=difference, checks=checks, tolerance=tolerance, facts=facts)


def chunked_equals_whole(runtime: Runtime, probe: list[int], tolerance: Tolerance) -> Check:
    """Small chunks behind the cache, with the factor in use, against all tokens at once."""
    chunked = _by_chunks(runtime, probe)
    return _same("chunked_equals_whole", _whole(runtime, probe), chunked, tolerance)


def _reads_in_int8(runtime: Runtime) -> bool:
    return isinstance(runtime, ReadsPromptsInInt8) and runtime.reads_prompts_in_int8


def _behind_prompt(
    candidate: Runtime, reference: Runtime, window: list[int], tolerance: Tolerance
) -> Check:
    """The second half of a window, with the first half in the cache as a prompt."""
    half = len(window) // 2
    candidate.reset()
    candidate.prefill(window[:half])
    rows = candidate.append(window[half:], keep=len(window) - half)
    value = float(kl_divergence(_whole(reference, window)[half:], rows).mean())
    return Check(name="behind_prompt", value=value, limit=tolerance.kl_mean + _PROMPT_KL)


def _number(value: float) -> float | None:
    """The value, or None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def _limits(difference: Difference, tolerance: Tolerance) -> list[Check]:
    checks = [
        Check(name="all_finite", value=float(difference.all_finite), limit=1, is_floor=True),
        Check(name="kl_mean", value=difference.kl_mean, limit=tolerance.kl_mean),
        Check(
            name="top1_agreement",
            value=difference.top1_agreement,
            limit=tolerance.top1_agreement,
            is_floor=True,
        ),
    ]
    if tolerance.max_abs_diff is not None:
        checks.append(
            Check(name="max_abs_diff", value=difference.max_abs_diff, limit=tolerance.max_abs_diff)
        )
    return checks


def _same(name: str, one: Logits, other: Logits, tolerance: Tolerance) -> Check:
    value = float(kl_divergence(one, other).mean())
    return Check(name=name, value=value, limit=tolerance.self_kl)


def _whole(runtime: Runtime, probe: list[int]) -> Logits:
    rows: Logits = runtime.logits(np.array([probe], np.int64))[0]
    return rows


def _by_cache(runtime: Runtime, probe: list[int]) -> Logits:
    """Token by token; then the last half once more after a truncation, which must not matter."""
    runtime.reset()
    rows = [runtime.decode(token) for token in probe]
    half = len(probe) // 2
    runtime.truncate(half)
    rows[half:] = [runtime.decode(token) for token in probe[half:]]
    return np.stack(rows)


def _by_products(runtime: Runtime, probe: list[int]) -> Logits:
    """The same by the way that long caches take."""
    assert isinstance(runtime, AttendsByProducts)
    usual, runtime.products_from = runtime.products_from, 0
    try:
        return _by_cache(runtime, probe)
    finally:
        runtime.products_from = usual


def _by_chunks(runtime: Runtime, probe: list[int]) -> Logits:
    runtime.reset()
    parts = [probe[start : start + _CHUNK] for start in range(0, len(probe), _CHUNK)]
    return np.concatenate([runtime.append(part, keep=len(part)) for part in parts])


def _by_guesses(runtime: Runtime, probe: list[int]) -> Logits:
    """In passes of several tokens behind the first one, as guessed tokens are run."""
    runtime.reset()
    rows = [runtime.decode(probe[0])[None].copy()]
    done = 1
    for count in itertools.cycle(_GUESSED):
        if done >= len(probe):
            break
        rows.append(runtime.decode_guessed(probe[done : done + count]).copy())
        done += count
    return np.concatenate(rows)


def _batch_equals_single(runtime: Runtime, probe: list[int], tolerance: Tolerance) -> Check:
    """Rows of different lengths, padded on the right, against each row alone."""
    lengths = sorted({len(probe), max(1, len(probe) // 2), max(1, len(probe) // 3)})
    padded = np.zeros((len(lengths), len(probe)), np.int64)
    for row, length in enumerate(lengths):
        padded[row, :length] = probe[:length]
    batch = runtime.logits(padded, lengths=lengths)
    together = np.concatenate([batch[row, :length] for row, length in enumerate(lengths)])
    alone = np.concatenate([_whole(runtime, probe[:length]) for length in lengths])
    return _same("batch_equals_single", alone, together, tolerance)


def _long_positions(
    candidate: Runtime, reference: Runtime, probe: list[int], tolerance: Tolerance
) -> Check:
    """Half of the probe at the beginning of the context, half at its end, by their numbers alone.

    Rotary attention sees differences of positions, so only the jump shows whether the far ones are
    right.
    """
    start = min(candidate.rope_context, reference.rope_context) - len(probe)
    ids = np.array([probe], np.int64)
    half = len(probe) // 2
    positions = [*range(half), *range(start + half, start + len(probe))]
    ours = candidate.logits(ids, positions=positions)[0]
    theirs = reference.logits(ids, positions=positions)[0]
    value = float(kl_divergence(theirs, ours).mean())
    return Check(name="long_positions", value=value, limit=tolerance.kl_mean)


def _greedy_text_equal(
    candidate: Runtime, reference: Runtime, probe: list[int], tolerance: Tolerance
) -> Check:
    """Share of greedy tokens, made with the cache, that the judge would choose in their place.

    The judge reads prompt and answer whole: transformers for float32, else the bundle itself.
    """
    candidate.reset()
    limit = min(_GREEDY_TOKENS, candidate.rope_context - len(probe))
    if limit < 1:
        probe, limit = probe[: len(probe) // 2], max(1, len(probe) // 4)
    answer = Generation(
        runtime=candidate,
        prompt_ids=probe,
        sampling=Sampling(),
        max_tokens=limit,
        ignore_eos=True,
    )
    made = answer.run().token_ids
    judge = reference if tolerance.greedy_against == "transformers" else candidate
    known = read_text_files(candidate.folder).tokenizer.size
    rows = _whole(judge, [*probe, *made])[len(probe) - 1 : -1, :known]
    best = rows.max(axis=1)
    chosen = rows[np.arange(len(made)), made]
    is_exact = judge is reference and not _reads_in_int8(candidate)
    rounded = _TIE_QUANTIZED * max(1.0, math.sqrt(tolerance.self_kl / _KL_OF_IT))
    tie = _TIE if is_exact else rounded
    share = float((chosen >= best - tie).mean())
    return Check(
        name="greedy_text_equal",
        value=share,
        limit=1.0,
        is_floor=True,
        judge=tolerance.greedy_against,
    )
