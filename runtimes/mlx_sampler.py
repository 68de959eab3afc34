"""The sampler on MLX's device, where logits are: the rules and the draws of ``sampler.py``.

A choice is an array that is not computed yet, so that the next step can be queued behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from qwen2x.runtimes.sampler import Sampling

# What a choice is where the logits are not finite.
FAILED = -1
# Smaller ones are 0 in float32; the likeliest token gets all either way.
_LEAST_TEMPERATURE = 1e-35


class MlxSampler:
    """Chooses the tokens of one text.

    Probabilities are float64 on the CPU, as in ``Sampler``, and float32 on a GPU, which has none:
    there a draw within 1e-6 of the edge between two tokens may fall to the other one.

    Args:
        sampling: the settings.
        context: the prompt, for the repetition penalty.
        known: only the first so many tokens are chosen.
        dtype: of probabilities; by default the widest of MLX's default device.
    """

    def __init__(
        self,
        sampling: Sampling,
        context: Sequence[int],
        known: int,
        dtype: mx.Dtype | None = None,
    ) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._known = known
        is_cpu = mx.default_device().type == mx.cpu
        self._dtype = dtype or (mx.float64 if is_cpu else mx.float32)
        self._seen: mx.array | None = None
        if sampling.repetition_penalty != 1:
            seen = np.zeros(known, np.bool_)
            seen[[token for token in context if token < known]] = True
            self._seen = mx.array(seen)

    def choose(self, logits: mx.array) -> mx.array:
        """The next token, int32 [1]; ``FAILED`` where logits (float32 [vocab]) are not."""
        logits = self._penalize(logits[: self._known])
        best = logits.max()
        is_finite = mx.isfinite(best) & ~mx.isnan(logits).any()
        is_greedy = self._sampling.temperature == 0
        token = mx.argmax(logits) if is_greedy else self._draw(logits, best)
        if self._seen is not None:
            self._seen = self._seen | (mx.arange(self._known) == token)
        return mx.where(is_finite, token.astype(mx.int32), FAILED).reshape(1)

    def _penalize(self, logits: mx.array) -> mx.array:
        if self._seen is None:
            return logits
        penalty = self._sampling.repetition_penalty
        penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
        return mx.where(self._seen, penalized, logits)

    def _draw(self, logits: mx.array, best: mx.array) -> mx.array:
        """A token drawn with one uniform number of the host's generator."""
        sampling = self._sampling
        # float32, before temperature: ties at the k-th place stay in.
        is_kept = mx.ones(logits.shape, mx.bool_)
        if 0 < sampling.top_k < self._known:
            is_kept = logits >= mx.topk(logits, sampling.top_k).min()
        temperature = max(float(sampling.temperature), _LEAST_TEMPERATURE)
        below = logits.astype(self._dtype) - best.astype(self._dtype)
        weights = mx.where(is_kept, mx.exp(below / temperature), 0)
        ids = None
        if sampling.top_p < 1:
            ids = mx.argsort(-weights)
            weights, is_kept = weights[ids], is_kept[ids]
            probabilities = weights / weights.sum()
            before = mx.cumsum(probabilities) - probabilities
            is_kept = is_kept & ((before < sampling.top_p) | (mx.arange(self._known) == 0))
        if sampling.min_p > 0:
            is_kept = is_kept & (weights >= sampling.min_p * weights.max())
        place = self._place(mx.where(is_kept, weights, 0), is_kept)
        return place if ids is None else ids[place]

    def _place(self, weights: mx.array, is_kept: mx.array) -> mx.array:
        """The first kept place at which the running sum exceeds a point drawn below its end."""
        reached = mx.where(is_kept, mx.cumsum(weights), 0)
        end = reached.max()
        point = mx.array(self._random.random(), self._dtype) * end
        point = mx.minimum(point, end * (1 - 2 * mx.finfo(self._dtype).eps))
        return mx.argmax(is_kept & (reached > point))
