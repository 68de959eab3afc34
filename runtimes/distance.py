"""``validate --long``: every YaRN factor at the ends of all contexts, by position numbers alone.

Rotary attention sees differences of positions, so no long prompt has to be read. Two layouts:

- **In a row**: all tokens around the position, one behind the other. It is a text like any other,
  and has the limits of texts.
- **With a gap**: half of the tokens at the beginning, half around the position. The tokens behind
  the gap have nothing near them, which no text has, and the model amplifies whatever disturbs it:
  with noise of 0.3 % behind every product, transformers' own logits move there by 2 to 8 times the
  KL divergence of the other layout (0.5B, ``benchmarks/gap_noise.py``), single tokens by far more.
  So rounding has no limit of its own here.
  What must hold is that the logits are nearer to the judge's than to what wrong positions give:
  the judge with another factor, or with the gap closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qwen2x.runtimes.compare import kl_divergence
from qwen2x.runtimes.runtime import Logits, Runtime, TokenIds
from qwen2x.runtimes.tolerance import Tolerance
from qwen2x.runtimes.validate import Check, chunked_equals_whole

_PROBE = 48
# Below it two models are the same, whatever their positions.
_LEAST_KL = 1e-9


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far logits around a position are from the judge's.

    Attributes:
        factor: YaRN's.
        position: the middle of the tokens there, or the end that is near it.
        kl_mean: in nats, over tokens in a row.
        max_abs_diff: of all their logits.
        gap_kl_median: in nats, over the tokens behind a gap.
        gap_abs_diff_median: of each such token's largest difference.
        gap_kl_wrong: the least ``gap_kl_median`` with the judge at wrong positions; None at
            position 0, before which there is no gap.
    """

    factor: float
    position: int
    kl_mean: float
    max_abs_diff: float
    gap_kl_median: float
    gap_abs_diff_median: float
    gap_kl_wrong: float | None


@runtime_checkable
class GivesPlainLogits(Protocol):
    """A runtime that can run its model as if it knew no YaRN factor but the first."""

    def plain_logits(self, token_ids: TokenIds) -> Logits:
        """Logits float32 [batch, sequence, vocab] of int64 [batch, sequence]."""
        ...


def check_distance(
    candidate: Runtime,
    reference: Runtime,
    token_ids: Sequence[int],
    tolerance: Tolerance,
    on_step: Callable[[str], None],
) -> tuple[list[Check], list[Distance]]:
    """Checks of all factors that both have, and what they found at each position.

    Both are left with the factor that they had.
    """
    before = candidate.rope_factor, reference.rope_factor
    factors = [each for each in candidate.rope_contexts if each in reference.rope_contexts]
    first = next(iter(candidate.rope_contexts))
    probe = list(token_ids[: min(_PROBE, min(candidate.rope_contexts.values()))])
    ids = np.array([probe], np.int64)
    candidate.use_rope(first)
    at_first = candidate.logits(ids)
    checks, found = [], []
    for factor in factors:
        on_step(f"YaRN factor {factor:g}")
        candidate.use_rope(factor)
        of_factor = [
            _distance(candidate, reference, ids, position, factors) for position in _ends(candidate)
        ]
        checks += _limits(of_factor, tolerance)
        chunked = chunked_equals_whole(candidate, probe, tolerance)
        checks.append(_named(chunked, f"long_factor_{factor:g}_chunked"))
        found += of_factor
    candidate.use_rope(first)
    again = _largest(candidate.logits(ids), at_first)
    checks.append(Check(name="back_at_first_factor", value=again, limit=0))
    if isinstance(candidate, GivesPlainLogits):
        plain = _largest(candidate.plain_logits(ids), at_first)
        checks.append(Check(name="first_factor_equals_plain", value=plain, limit=0))
    candidate.use_rope(before[0])
    reference.use_rope(before[1])
    return checks, found


def _ends(runtime: Runtime) -> list[int]:
    """The first and last positions of every context that the factor in use reaches."""
    contexts = runtime.rope_contexts.values()
    ends = {0, *contexts, *(context - 1 for context in contexts)}
    return sorted(end for end in ends if end < runtime.rope_context)


def _distance(
    candidate: Runtime,
    reference: Runtime,
    ids: TokenIds,
    position: int,
    factors: Sequence[float],
) -> Distance:
    factor, count = candidate.rope_factor, ids.shape[1]
    half = count // 2

    def block(length: int, least: int) -> list[int]:
        """Around the position, within the context."""
        start = max(least, min(position - length // 2, candidate.rope_context - length))
        return list(range(start, start + length))

    def judged(places: list[int], by: float) -> Logits:
        reference.use_rope(by)
        logits: Logits = reference.logits(ids, positions=places)[0]
        return logits

    row, gap = block(count, 0), [*range(half), *block(count - half, half)]
    ours, theirs = candidate.logits(ids, positions=row)[0], judged(row, factor)
    behind, right = candidate.logits(ids, positions=gap)[0, half:], judged(gap, factor)[half:]
    closed = list(range(count))
    wrong = [judged(closed, factor)]
    contexts = reference.rope_contexts
    others = [each for each in factors if each != factor and gap[-1] < contexts[each]]
    wrong += [judged(gap, other) for other in others]
    medians = [float(np.median(kl_divergence(logits[half:], behind))) for logits in wrong]
    return Distance(
        factor=factor,
        position=position,
        kl_mean=float(kl_divergence(theirs, ours).mean()),
        max_abs_diff=_largest(theirs, ours),
        gap_kl_median=float(np.median(kl_divergence(right, behind))),
        gap_abs_diff_median=float(np.median(np.abs(behind - right).max(axis=-1))),
        gap_kl_wrong=None if gap == closed else min(medians),
    )


def _limits(found: list[Distance], tolerance: Tolerance) -> list[Check]:
    """The worst position of one factor."""
    name = f"long_factor_{found[0].factor:g}"
    worst = max(each.kl_mean for each in found)
    checks = [Check(name=name, value=worst, limit=tolerance.kl_mean)]
    shares = [
        each.gap_kl_median / max(each.gap_kl_wrong, _LEAST_KL)
        for each in found
        if each.gap_kl_wrong is not None
    ]
    if shares:
        checks.append(Check(name=f"{name}_gap", value=max(shares), limit=1))
    if tolerance.max_abs_diff is not None:
        for suffix, worst in (
            ("abs_diff", max(each.max_abs_diff for each in found)),
            ("gap_abs_diff", max(each.gap_abs_diff_median for each in found)),
        ):
            limit = tolerance.max_abs_diff
            checks.append(Check(name=f"{name}_{suffix}", value=worst, limit=limit))
    return checks


def _largest(one: Logits, other: Logits) -> float:
    return float(np.abs(one - other).max())


def _named(check: Check, name: str) -> Check:
    values: dict[str, Any] = vars(check) | {"name": name}
    return Check(**values)
