"""``validate --long``: every YaRN factor at the ends of all contexts, by position numbers alone.

Rotary attention sees differences of positions. So half of the tokens stand at the beginning, half
around a far position, with nothing between: no long prompt has to be read.

The first tokens behind the gap have nothing near them, which no text has. On the 0.5B checkpoint
the very first amplifies all rounding a hundred times (with factor 4, 0.006 in float32 logits, and a
KL divergence of 1.7 with 8 bits), the others far less. So the median over the far tokens counts,
which a wrong table moves as a whole (0.12 with 8 bits). Rounding to 8 bits alone reaches 0.0034
there with factor 4, which the limit for texts, 0.003, does not allow.
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


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far logits around a position are from the judge's: medians over the tokens there.

    Attributes:
        factor: YaRN's.
        position: the middle of the far tokens, or the end that is near it.
        kl_median: in nats.
        abs_diff_median: of each token's largest difference.
    """

    factor: float
    position: int
    kl_median: float
    abs_diff_median: float


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
        reference.use_rope(factor)
        of_factor = [
            _distance(candidate, reference, ids, position) for position in _ends(candidate)
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


def _distance(candidate: Runtime, reference: Runtime, ids: TokenIds, position: int) -> Distance:
    count = ids.shape[1]
    half = count // 2
    far = count - half
    start = max(half, min(position - far // 2, candidate.rope_context - far))
    positions = [*range(half), *range(start, start + far)]
    ours = candidate.logits(ids, positions=positions)[0]
    theirs = reference.logits(ids, positions=positions)[0]
    return Distance(
        factor=candidate.rope_factor,
        position=position,
        kl_median=float(np.median(kl_divergence(theirs, ours)[half:])),
        abs_diff_median=float(np.median(np.abs(ours - theirs)[half:].max(axis=-1))),
    )


def _limits(found: list[Distance], tolerance: Tolerance) -> list[Check]:
    """The worst position of one factor."""
    name = f"long_factor_{found[0].factor:g}"
    worst = max(each.kl_median for each in found)
    checks = [Check(name=name, value=worst, limit=tolerance.kl_mean)]
    if tolerance.max_abs_diff is not None:
        worst = max(each.abs_diff_median for each in found)
        name = f"{name}_abs_diff"
        checks.append(Check(name=name, value=worst, limit=tolerance.max_abs_diff))
    return checks


def _largest(one: Logits, other: Logits) -> float:
    return float(np.abs(one - other).max())


def _named(check: Check, name: str) -> Check:
    values: dict[str, Any] = vars(check) | {"name": name}
    return Check(**values)
