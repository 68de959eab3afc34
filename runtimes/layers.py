"""Where hidden states of two runtimes part: layer by layer, to hunt a wrong logit down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.runtime import TokenIds

Hidden = NDArray[np.float32]


class GivesHiddenStates(Protocol):
    """A runtime that shows its residual stream."""

    def hidden_states(self, token_ids: TokenIds) -> Hidden:
        """Float32 [layers + 1, sequence, hidden] for int64 [1, sequence].

        The first is the embedding, the others are the residual stream after layer 0, 1, ...
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """How far a candidate's residual stream is from the reference's behind one layer.

    Attributes:
        layer: ``embed_tokens``, ``layers.0``, ...
        relative_error: length of the difference over the reference's length, mean over positions.
        worst: the largest of these, and the position where it is.
        worst_position: see above.
        cosine: mean over positions.
    """

    layer: str
    relative_error: float
    worst: float
    worst_position: int
    cosine: float


def compare_layers(
    reference: GivesHiddenStates, candidate: GivesHiddenStates, token_ids: TokenIds
) -> list[LayerDifference]:
    """Runs the same tokens int64 [1, sequence] through both.

    Raises:
        RequestError: the two have other layers or sizes.
    """
    theirs, ours = reference.hidden_states(token_ids), candidate.hidden_states(token_ids)
    if theirs.shape != ours.shape:
        raise RequestError(
            f"hidden states have shapes {theirs.shape} and {ours.shape}: not the same model"
        )
    pairs = zip(theirs, ours, strict=True)
    return [_difference(index, one, other) for index, (one, other) in enumerate(pairs)]


def first_beyond(differences: list[LayerDifference], limit: float) -> LayerDifference | None:
    """The first layer whose relative error exceeds the limit, or is no number."""
    return next((item for item in differences if not item.relative_error <= limit), None)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def _difference(index: int, reference: Hidden, candidate: Hidden) -> LayerDifference:
    one, other = reference.astype(np.float64), candidate.astype(np.float64)
    length = np.linalg.norm(one, axis=-1)
    relative = np.linalg.norm(other - one, axis=-1) / length
    cosine = (one * other).sum(-1) / (length * np.linalg.norm(other, axis=-1))
    worst = int(relative.argmax())
    return LayerDifference(
        layer="embed_tokens" if index == 0 else f"layers.{index - 1}",
        relative_error=float(relative.mean()),
        worst=float(relative[worst]),
        worst_position=worst,
        cosine=float(cosine.mean()),
    )
