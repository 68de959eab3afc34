"""How far one runtime's logits are from another's, as a value.

KL divergence is of the reference's distribution to the candidate's, in nats, per position, over
the whole vocabulary; the method is that of llama.cpp's ``perplexity --kl-divergence``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.runtime import Logits, TokenIds
from qwen2x.runtimes.surprises import Surprise, Surprises

_ROWS_AT_ONCE = 64
_TOP = 10


class GivesLogits(Protocol):
    """All that a comparison asks of a runtime."""

    def logits(self, token_ids: TokenIds) -> Logits:
        """Float32 [batch, sequence, vocab]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Figures over all positions of a text; ``kl`` is per position, in nats.

    ``worst`` are the positions where it is largest.
    """

    positions: int
    max_abs_diff: float
    mean_abs_diff: float
    cosine: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top10_overlap: float
    perplexity: float
    perplexity_reference: float
    all_finite: bool
    kl: tuple[float, ...] = field(repr=False, default=())
    worst: tuple[Surprise, ...] = field(repr=False, default=())

    def figures(self) -> dict[str, Any]:
        """The figures by name, without what is told per position."""
        figures = asdict(replace(self, kl=(), worst=()))
        del figures["kl"], figures["worst"]
        return figures


def windows_of(token_ids: Sequence[int], tokens: int, window: int) -> list[list[int]]:
    """The first ``tokens`` tokens cut into windows, which a model reads one by one.

    Raises:
        RequestError: values out of range, or a text that is too short to compare anything.
    """
    if tokens < 2 or window < 2:
        raise RequestError(f"tokens and window must be 2 or more, got {tokens} and {window}")
    taken = list(token_ids[:tokens])
    if len(taken) < 2:
        raise RequestError(f"the text has {len(taken)} tokens; expected at least 2")
    cut = [taken[start : start + window] for start in range(0, len(taken), window)]
    return [part for part in cut if len(part) > 1]


def compare(
    reference: GivesLogits, candidate: GivesLogits, windows: Sequence[Sequence[int]]
) -> Difference:
    """Runs both over the same windows and gathers the figures."""
    gathered = _Gathered()
    for window in windows:
        ids = np.array([window], np.int64)
        gathered.add(reference.logits(ids)[0], candidate.logits(ids)[0], ids[0])
    return gathered.difference()


@np.errstate(invalid="ignore", over="ignore")
def kl_divergence(reference: Logits, candidate: Logits) -> NDArray[np.float64]:
    """Nats per row, float64 [rows], of logits [rows, vocab]."""
    parts = [
        _kl(_log_softmax(one), _log_softmax(other))
        for one, other in _row_blocks(reference, candidate)
    ]
    return np.concatenate(parts)


def top_tokens(row: Logits, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens of logits [vocab], likeliest first, with their logits."""
    best = np.argsort(-row, kind="stable")[:count]
    return [(int(token), float(row[token])) for token in best]


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nats per row of log-probabilities [rows, vocab]."""
    divergence: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return divergence


@dataclass
class _Gathered:
    kl: list[NDArray[np.float64]] = field(default_factory=list)
    max_abs: float = 0.0
    sum_abs: float = 0.0
    cosines: list[NDArray[np.float64]] = field(default_factory=list)
    top1: int = 0
    top10: int = 0
    rows: int = 0
    columns: int = 0
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    all_finite: bool = True
    surprises: Surprises = field(default_factory=Surprises)

    def add(self, reference: Logits, candidate: Logits, ids: TokenIds) -> None:
        if reference.shape != candidate.shape:
            raise RequestError(
                f"logits have shapes {reference.shape} and {candidate.shape}: not the same model"
            )
        row = 0
        for one, other in _row_blocks(reference, candidate):
            self._add_block(one, other, ids[row + 1 : row + 1 + len(one)])
            row += len(one)

    @np.errstate(invalid="ignore", over="ignore")
    def _add_block(self, reference: Logits, candidate: Logits, following: TokenIds) -> None:
        """Logits that are not finite give figures that are none, which no check passes."""
        self.all_finite &= bool(np.isfinite(candidate).all())
        difference = np.abs(reference - candidate)
        self.max_abs = float(np.maximum(self.max_abs, difference.max()))
        self.sum_abs += float(difference.sum(dtype=np.float64))
        start = self.rows
        self.rows += len(reference)
        self.columns = reference.shape[1]
        self.cosines.append(_cosine(reference, candidate))
        self.top1 += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        self.top10 += _shared_top(reference, candidate)
        p, q = _log_softmax(reference), _log_softmax(candidate)
        self.kl.append(_kl(p, q))
        self.surprises.add(start, self.kl[-1], p, q)
        picked = np.arange(len(following)), following
        self.reference_losses.extend((-p[picked]).tolist())
        self.losses.extend((-q[picked]).tolist())

    @np.errstate(invalid="ignore", over="ignore")
    def difference(self) -> Difference:
        kl = np.maximum(np.concatenate(self.kl), 0)
        return Difference(
            positions=self.rows,
            max_abs_diff=self.max_abs,
            mean_abs_diff=self.sum_abs / (self.rows * self.columns),
            cosine=float(np.concatenate(self.cosines).mean()),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            top1_agreement=self.top1 / self.rows,
            top10_overlap=self.top10 / (_TOP * self.rows),
            perplexity=float(np.exp(np.mean(self.losses))),
            perplexity_reference=float(np.exp(np.mean(self.reference_losses))),
            all_finite=self.all_finite,
            kl=tuple(kl.tolist()),
            worst=self.surprises.worst,
        )


def _row_blocks(reference: Logits, candidate: Logits) -> Iterator[tuple[Logits, Logits]]:
    """Rows in blocks, so that float64 copies of a large vocabulary stay small."""
    for start in range(0, len(reference), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        yield reference[rows], candidate[rows]


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalized: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def _cosine(one: Logits, other: Logits) -> NDArray[np.float64]:
    products = np.einsum("rv,rv->r", one, other, dtype=np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines: NDArray[np.float64] = products / np.maximum(norms, np.finfo(np.float32).tiny)
    return cosines


def _shared_top(one: Logits, other: Logits) -> int:
    top = [np.argpartition(values, -_TOP, axis=1)[:, -_TOP:] for values in (one, other)]
    return sum(len(np.intersect1d(left, right)) for left, right in zip(*top, strict=True))
