from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen2x.quantize.divergence import Divergence, Head, normalize, probabilities_of
from qwen2x.quantize.estimate import estimate_loss

Floats = NDArray[np.float32]
HIDDEN, VOCABULARY, POSITIONS = 24, 20_000, 50
# Logits of size 5 in float32, sums over 20,000 tokens.
CLOSE = 1e-5


def drawn(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def head_of(rows: Floats) -> Head:
    return Head(vocab_size=len(rows), read=lambda start, stop: rows[start:stop])


@pytest.fixture(scope="module")
def models() -> tuple[Floats, Floats, Floats, Floats]:
    """Inputs and heads, of one model and of one near it."""
    exact, head = drawn(0, POSITIONS, HIDDEN), drawn(1, VOCABULARY, HIDDEN)
    exact[7] *= 20  # logits of hundreds
    return exact, head, exact + 0.1 * drawn(2, *exact.shape), head + 0.05 * drawn(3, *head.shape)


def judged(models: tuple[Floats, Floats, Floats, Floats]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of both, in float64."""
    exact, head, own, own_head = (torch.from_numpy(part).double() for part in models)
    return torch.log_softmax(exact @ head.T, -1), torch.log_softmax(own @ own_head.T, -1)


def test_divergence_by_parts_of_the_vocabulary_is_that_of_torch(
    models: tuple[Floats, Floats, Floats, Floats],
) -> None:
    exact, head, own, own_head = models
    normalizers = normalize(exact, head_of(head))
    divergence = Divergence(normalizers)
    for start, rows in head_of(head).parts():
        logits = exact @ rows.T
        own_logits = own @ own_head[start : start + len(rows)].T
        divergence.add(probabilities_of(logits, normalizers), logits, own_logits)
    one, other = judged(models)
    expected = (one.exp() * (one - other)).sum(-1).numpy()
    np.testing.assert_allclose(divergence.each(), expected, rtol=1e-3, atol=CLOSE)


def test_an_estimate_is_what_torch_says(models: tuple[Floats, Floats, Floats, Floats]) -> None:
    exact, head, own, own_head = models
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, POSITIONS)
    found = estimate_loss(exact, own, tokens, (head_of(head), head_of(own_head)))
    one, other = judged(models)
    each = (one.exp() * (one - other)).sum(-1)
    rows = torch.arange(POSITIONS)
    expected = {
        "kl_mean": float(each.mean()),
        "kl_p99": float(np.quantile(each.numpy(), 0.99)),
        "kl_max": float(each.max()),
        "top1_agreement": float((one.argmax(-1) == other.argmax(-1)).double().mean()),
        "perplexity": float((-other[rows, tokens]).mean().exp()),
        "perplexity_reference": float((-one[rows, tokens]).mean().exp()),
        "positions": POSITIONS,
    }
    assert 0 < expected["top1_agreement"] < 1
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_model_does_not_differ_from_itself(
    models: tuple[Floats, Floats, Floats, Floats],
) -> None:
    exact, head, _, _ = models
    tokens = np.zeros(POSITIONS, np.int64)
    found = estimate_loss(exact, exact, tokens, (head_of(head), head_of(head)))
    assert found["kl_max"] <= CLOSE
    assert found["top1_agreement"] == 1
    assert found["perplexity"] == pytest.approx(found["perplexity_reference"])
