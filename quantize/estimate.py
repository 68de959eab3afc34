"""What a model has lost on a text, from hidden states behind its last layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.divergence import Divergence, Head, Normalizers, normalize, probabilities_of
from qwen2x.quantize.groups import Float


class _Best:
    """The token of the largest logit at each position."""

    def __init__(self, positions: int) -> None:
        self._logit = np.full(positions, -np.inf, np.float32)
        self.token = np.zeros(positions, np.int64)

    def add(self, start: int, logits: Float) -> None:
        best = logits.argmax(axis=1)
        value = logits[np.arange(len(logits)), best]
        better = value > self._logit
        self.token[better] = start + best[better]
        self._logit[better] = value[better]


def estimate_loss(
    exact: Float,
    rounded: Float,
    next_tokens: NDArray[np.int64],
    heads: tuple[Head, Head],
) -> dict[str, Any]:
    """KL divergence and its like, of a model whose weights alone are rounded.

    Args:
        exact: normed hidden states of the float model, float32 [positions, hidden].
        rounded: of the rounded one.
        next_tokens: what the text says, int64 [positions].
        heads: the float model's and the rounded one's.

    Returns:
        ``kl_mean``, ``kl_p99``, ``kl_max`` in nats, ``top1_agreement``, ``perplexity``,
        ``perplexity_reference`` and ``positions``.
    """
    count = len(exact)
    normalizers = normalize(exact, heads[0])
    divergence, bests = Divergence(normalizers), (_Best(count), _Best(count))
    logits_of_next = np.zeros((2, count))
    for (start, rows), (_, own_rows) in zip(heads[0].parts(), heads[1].parts(), strict=True):
        logits, own = exact @ rows.T, rounded @ own_rows.T
        divergence.add(probabilities_of(logits, normalizers), logits, own)
        here = (next_tokens >= start) & (next_tokens < start + len(rows))
        for index, some in enumerate((logits, own)):
            bests[index].add(start, some)
            logits_of_next[index, here] = some[here, next_tokens[here] - start]
    each = divergence.each()
    return {
        "kl_mean": float(each.mean()),
        "kl_p99": float(np.quantile(each, 0.99)),
        "kl_max": float(each.max()),
        "top1_agreement": float((bests[0].token == bests[1].token).mean()),
        "perplexity": _perplexity(logits_of_next[1], divergence.own),
        "perplexity_reference": _perplexity(logits_of_next[0], normalizers),
        "positions": count,
    }


def _perplexity(logits: NDArray[np.float64], normalizers: Normalizers) -> float:
    return float(np.exp((normalizers.logarithms - logits).mean()))
