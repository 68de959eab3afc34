from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen2x.runtimes.compare import compare
from qwen2x.runtimes.runtime import Logits, TokenIds
from qwen2x.runtimes.surprises import Surprises

VOCAB = 50


class Fixed:
    """Gives rows of a table, picked by token id."""

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table = table

    def logits(self, token_ids: TokenIds) -> Logits:
        return self.table[token_ids]


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return shifted


def test_the_worst_positions_of_all_blocks_are_kept_worst_first() -> None:
    random = np.random.default_rng(0)
    kl = random.random(200)
    rows = log_softmax(random.standard_normal((200, VOCAB)))
    surprises = Surprises()
    for start in range(0, 200, 64):
        block = slice(start, start + 64)
        surprises.add(start, kl[block], rows[block], rows[block])
    expected = np.argsort(-kl)[:8].tolist()
    assert [surprise.position for surprise in surprises.worst] == expected
    assert [surprise.kl for surprise in surprises.worst] == kl[expected].tolist()
    for surprise in surprises.worst:
        best = np.argsort(-rows[surprise.position])[:3]
        assert [token for token, _ in surprise.reference] == best.tolist()
        shares = [share for _, share in surprise.candidate]
        np.testing.assert_allclose(shares, np.exp(rows[surprise.position][best]))


def test_what_is_no_number_is_worst() -> None:
    rows = log_softmax(np.random.default_rng(0).standard_normal((20, VOCAB)))
    kl = np.full(20, 0.5)
    kl[13] = np.nan
    surprises = Surprises()
    surprises.add(0, kl, rows, rows)
    assert surprises.worst[0].position == 13
    assert surprises.worst[0].kl == np.inf


def test_a_comparison_counts_positions_over_its_windows() -> None:
    random = np.random.default_rng(0)
    reference = random.standard_normal((VOCAB, VOCAB)).astype(np.float32)
    candidate = reference.copy()
    candidate[7, 3] += 20  # whatever follows token 7, the candidate says 3
    windows = [[1, 2, 4], [5, 7, 6]]
    found = compare(Fixed(reference), Fixed(candidate), windows)
    worst = found.worst[0]
    assert worst.position == 4
    assert worst.kl == max(found.kl)
    assert worst.candidate[0][0] == 3
    assert worst.candidate[0][1] > 0.99
    assert worst.reference[0][0] == int(reference[7].argmax())
    assert "worst" not in found.figures()
    assert "kl" not in found.figures()
    assert found.figures()["kl_max"] == found.kl_max
