"""The judge is PyTorch's own arithmetic in float64."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.compare import compare, kl_divergence, windows_of
from qwen2x.runtimes.runtime import Logits, TokenIds

Floats = NDArray[np.float32]
# float64 here and there; differences and cosines begin in float32.
SAME = {"rel": 1e-9, "abs": 1e-12}
FROM_FLOAT32 = {"rel": 1e-5}
VOCAB = 200


class Fixed:
    """Gives rows of a table, picked by token id, so that windows can be told apart."""

    def __init__(self, table: Floats) -> None:
        self.table = table

    def logits(self, token_ids: TokenIds) -> Logits:
        return self.table[token_ids]


def tables(noise: float = 0.3) -> tuple[Floats, Floats]:
    random = np.random.default_rng(0)
    reference = (3 * random.standard_normal((VOCAB, VOCAB))).astype(np.float32)
    return reference, reference + (noise * random.standard_normal((VOCAB, VOCAB))).astype("f4")


@pytest.mark.parametrize("length", [2, 64, 65, 150])
def test_figures_are_those_of_torch(length: int) -> None:
    one, other = tables()
    ids = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    windows = [ids, ids[: length // 2 + 1]]
    found = compare(Fixed(one), Fixed(other), windows)
    rows = np.concatenate([np.array(window) for window in windows])
    p, q = (torch.tensor(table[rows]).double() for table in (one, other))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    losses = [
        torch.nn.functional.cross_entropy(
            torch.tensor(table[np.array(window)]).double()[:-1],
            torch.tensor(window)[1:],
            reduction="none",
        )
        for table in (one, other)
        for window in windows
    ]
    assert found.positions == len(rows)
    assert found.kl == pytest.approx(kl.tolist(), **SAME)
    assert found.kl_mean == pytest.approx(float(kl.mean()), **SAME)
    assert found.kl_p99 == pytest.approx(float(kl.quantile(0.99)), **SAME)
    assert found.kl_max == pytest.approx(float(kl.max()), **SAME)
    reference_losses, candidate_losses = torch.cat(losses[:2]), torch.cat(losses[2:])
    assert found.perplexity_reference == pytest.approx(float(reference_losses.mean().exp()), **SAME)
    assert found.perplexity == pytest.approx(float(candidate_losses.mean().exp()), **SAME)
    assert found.max_abs_diff == pytest.approx(float((p - q).abs().max()), **FROM_FLOAT32)
    assert found.mean_abs_diff == pytest.approx(float((p - q).abs().mean()), **FROM_FLOAT32)
    cosine = torch.nn.functional.cosine_similarity(p, q).mean()
    assert found.cosine == pytest.approx(float(cosine), **FROM_FLOAT32)
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(top1))
    tops = zip(p.topk(10).indices.tolist(), q.topk(10).indices.tolist(), strict=True)
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in tops])
    assert found.top10_overlap == pytest.approx(overlap)
    assert found.all_finite


def test_the_same_logits_differ_in_nothing() -> None:
    one, _ = tables()
    found = compare(Fixed(one), Fixed(one), [list(range(100))])
    assert (found.kl_max, found.max_abs_diff) == (0, 0)
    assert (found.top1_agreement, found.top10_overlap) == (1, 1)
    assert found.perplexity == found.perplexity_reference


def test_divergence_counts_from_the_reference() -> None:
    one = np.array([[math.log(0.9), math.log(0.1)]], np.float32)
    other = np.array([[math.log(0.5), math.log(0.5)]], np.float32)
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl_divergence(one, other)[0] == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(other, one)[0] != pytest.approx(expected, rel=0.1)


def test_a_large_constant_does_not_matter() -> None:
    one, other = tables()
    moved = kl_divergence(one + np.float32(512), other - np.float32(512))
    np.testing.assert_allclose(moved, kl_divergence(one, other), rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, VOCAB])
def test_logits_that_are_not_finite_are_told_and_raise_nothing(value: float, count: int) -> None:
    one, other = tables()
    other[7, :count] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(Fixed(one), Fixed(other), [[1, 2, 7, 3]])
        assert not np.isfinite(kl_divergence(one[7:8], other[7:8])).all()
    assert not found.all_finite
    assert not math.isfinite(found.kl_mean)
    assert not math.isfinite(found.kl_max)
    assert not math.isfinite(found.max_abs_diff)
    assert found.perplexity_reference > 1


def test_different_vocabularies_are_refused() -> None:
    one, other = tables()
    with pytest.raises(RequestError, match=r"\(3, 200\) and \(3, 199\): not the same model"):
        compare(Fixed(one), Fixed(other[:, :199]), [[1, 2, 3]])


@pytest.mark.parametrize(
    ("length", "tokens", "window", "expected"),
    [
        (10, 1024, 512, [10]),
        (10, 10, 5, [5, 5]),
        (10, 9, 4, [4, 4]),
        (10, 6, 4, [4, 2]),
        (10, 2, 2, [2]),
        (1300, 1024, 512, [512, 512]),
    ],
)
def test_windows_cut_the_text_and_drop_a_single_rest(
    length: int, tokens: int, window: int, expected: list[int]
) -> None:
    found = windows_of(list(range(length)), tokens, window)
    assert [len(part) for part in found] == expected
    joined = [token for part in found for token in part]
    assert joined == list(range(len(joined)))


@pytest.mark.parametrize(
    ("length", "tokens", "window", "message"),
    [
        (10, 1, 5, "must be 2 or more, got 1 and 5"),
        (10, 5, 1, "must be 2 or more, got 5 and 1"),
        (10, -1, 5, "must be 2 or more"),
        (1, 5, 5, "the text has 1 tokens"),
        (0, 5, 5, "the text has 0 tokens"),
    ],
)
def test_windows_that_compare_nothing_are_refused(
    length: int, tokens: int, window: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        windows_of(list(range(length)), tokens, window)
