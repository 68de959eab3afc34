"""The judge is transformers: its logits processors, in the order in which generate runs them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.sampler import Sampler, Sampling, read_sampling
from tests.tiny_checkpoint import EXAMPLE

Logits = NDArray[np.float32]
# transformers computes probabilities in float32, the sampler in float64.
FLOAT32_PROBABILITY = 2e-6
VOCAB = 300


def theirs(logits: Logits, context: list[int], sampling: Sampling) -> NDArray[np.float64]:
    """Transformers' distribution over the vocabulary."""
    steps: list[Any] = [
        TemperatureLogitsWarper(float(sampling.temperature)),
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
        *([MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
    ]
    if sampling.repetition_penalty != 1:
        steps.insert(0, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    ids, scores = torch.tensor([context]), torch.tensor(logits[None])
    for step in steps:
        scores = step(ids, scores)
    return np.asarray(scores.double().softmax(-1)[0].numpy())


def ours(logits: Logits, context: list[int], sampling: Sampling) -> NDArray[np.float64]:
    sampler = Sampler(sampling, context)
    whole = np.zeros(len(logits))
    ids, probabilities = sampler._distribution(sampler._penalize(logits))
    whole[ids] = probabilities
    return whole


def random_logits(seed: int, size: int = VOCAB) -> Logits:
    return (3 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


STEPS: dict[str, dict[str, Any]] = {
    "temperature low": {"temperature": 0.3},
    "temperature high": {"temperature": 7.5},
    "top_k 1": {"top_k": 1},
    "top_k 20": {"top_k": 20},
    "top_k beyond the vocabulary": {"top_k": 1000},
    "top_p small": {"top_p": 0.05},
    "top_p 0.8": {"top_p": 0.8},
    "top_p 0.999": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "min_p 1": {"min_p": 1.0},
    "penalty up": {"repetition_penalty": 1.3},
    "penalty down": {"repetition_penalty": 0.7},
    "as Qwen2.5-Instruct ships": {
        "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1
    },
    "all": {
        "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("seed", range(5))
def test_distributions_are_those_of_transformers(settings: dict[str, Any], seed: int) -> None:
    sampling = Sampling(**{"temperature": 1.0, **settings})
    logits = random_logits(seed)
    context = np.random.default_rng(seed).integers(0, VOCAB, 40).tolist()
    expected = theirs(logits, context, sampling)
    np.testing.assert_allclose(
        ours(logits, context, sampling), expected, atol=FLOAT32_PROBABILITY, rtol=1e-4
    )


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.1, 1),
    min_p=st.floats(0, 0.5),
    penalty=st.floats(0.6, 2),
)
def test_all_steps_together_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    logits, context = random_logits(seed, 60), [1, 5, 5, 59]
    expected, found = theirs(logits, context, sampling), ours(logits, context, sampling)
    by_one_alone = (expected > 0) != (found > 0)
    # At a top_p of nearly 1, float32 tells the unlikeliest tokens from none no more.
    if (expected + found)[by_one_alone].sum() > 1e-6:
        # A token that sits on the edge of top_p or min_p by float32's last digits; both are right.
        both = np.sort(np.abs(expected - found))
        assert (both > 1e-5).sum() <= np.count_nonzero(expected) + 1
        assert abs(np.count_nonzero(expected) - np.count_nonzero(found)) == 1
        return
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 3}, {"top_k": 10}, {"top_p": 0.3}, {"top_p": 0.9}, {"min_p": 0.5}, {"min_p": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("seed", range(5))
def test_ties_are_kept_and_cut_as_often_as_in_transformers(
    settings: dict[str, Any], seed: int
) -> None:
    # Which of several equal tokens top_p keeps is up to the sort; how many is not.
    sampling = Sampling(temperature=1.0, **settings)
    logits = np.round(random_logits(seed) / 2).astype(np.float32)
    expected = np.sort(theirs(logits, [0], sampling))
    np.testing.assert_allclose(
        np.sort(ours(logits, [0], sampling)), expected, atol=FLOAT32_PROBABILITY
    )


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.9999, 1 - 1e-12])
def test_top_p_over_a_large_flat_vocabulary_is_that_of_a_whole_sort(top_p: float) -> None:
    # Flat enough that the tokens that are sorted first do not reach top_p.
    logits = (0.3 * np.random.default_rng(3).standard_normal(20_000)).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < top_p]
    found = np.flatnonzero(ours(logits, [], Sampling(temperature=1.0, top_p=top_p)))
    np.testing.assert_array_equal(found, np.sort(kept))


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    sampler = Sampler(Sampling())
    assert sampler.choose(np.array([0, 3, 1, 3], np.float32)) == 1


def test_the_penalty_follows_the_tokens_that_were_chosen() -> None:
    # Without it the same token would be chosen forever.
    logits = np.array([1.0, 2.0, 1.9, -5.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=3.0), [3])
    assert [sampler.choose(logits) for _ in range(4)] == [1, 2, 0, 1]
    np.testing.assert_array_equal(logits, np.array([1.0, 2.0, 1.9, -5.0], np.float32))


def test_the_penalty_equals_transformers_over_a_whole_text() -> None:
    sampling = Sampling(repetition_penalty=1.4)
    context = [5, 9, 9, 250]
    sampler = Sampler(sampling, context)
    for step in range(60):
        logits = random_logits(100 + step)
        scores = RepetitionPenaltyLogitsProcessor(1.4)(
            torch.tensor([context]), torch.tensor(logits[None])
        )
        token_id = sampler.choose(logits)
        assert token_id == int(scores.argmax())
        context.append(token_id)


def test_a_context_with_tokens_beyond_the_logits_is_no_error() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), [1, 500, 7])
    assert sampler.choose(np.array([0.5, 4.0, 2.5], np.float32)) == 2


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(random_logits(step)) for step in range(30)]

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 6}, {"min_p": 0.05}], ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    sampling = Sampling(temperature=1.3, seed=5, **settings)
    logits, draws = random_logits(4, 12), 20_000
    sampler = Sampler(sampling)
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=12)
    expected = draws * theirs(logits, [], sampling)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = (np.square(counts[kept] - expected[kept]) / expected[kept]).sum()
    # The 99.99th percentile of chi-square with 11 degrees of freedom; fewer tokens have less.
    assert chi_square < 37.4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, top_p=0.9, seed=0))
    for seed in range(20):
        logits = random_logits(seed)
        assert sampler.choose(logits) == logits.argmax()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(temperature: float, value: float) -> None:
    logits = random_logits(0)
    logits[17] = value
    with pytest.raises(RequestError, match="not finite"):
        Sampler(Sampling(temperature=temperature)).choose(logits)
    with pytest.raises(RequestError, match="not finite"):
        Sampler(Sampling(temperature=temperature)).choose(np.full(5, -np.inf, np.float32))


def test_a_token_with_logit_minus_infinity_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.1], np.float32)
    sampler = Sampler(Sampling(temperature=50.0, seed=1))
    assert {sampler.choose(logits) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-0.1, 100.1, float("nan"), float("inf"), 10**400)],
        *[("temperature", value) for value in (True, "0.7", None, [1.0])],
        *[("top_k", value) for value in (-1, 2.5, True, "20")],
        *[("top_p", value) for value in (0, 0.0, -0.1, 1.0001, float("nan"), "0.8", True)],
        *[("min_p", value) for value in (-0.01, 1.01, float("nan"), False)],
        *[("repetition_penalty", value) for value in (0, -1, 101, float("nan"), True, "1")],
        *[("seed", value) for value in (-1, 1 << 64, 0.5, "7", True)],
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must be an? .*, got "):
        Sampling(**{name: value})


def test_numbers_of_numpy_and_the_ends_of_the_ranges_are_taken() -> None:
    Sampling(temperature=np.float32(0.5), top_k=np.int64(5), top_p=1, min_p=1, seed=(1 << 64) - 1)
    Sampling(temperature=100, top_k=10**400, repetition_penalty=100)


def test_the_defaults_are_those_that_qwen_ships() -> None:
    shipped = json.loads((EXAMPLE / "generation_config.json").read_text(encoding="utf-8"))
    instruct = {
        "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True,
        "eos_token_id": [151645, 151643], "repetition_penalty": 1.1, "temperature": 0.7,
        "top_p": 0.8, "top_k": 20,
    }  # fmt: skip
    expected = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    assert read_sampling(instruct) == expected
    theirs = GenerationConfig(**shipped)
    found = read_sampling(shipped)
    assert found.repetition_penalty == (theirs.repetition_penalty or 1.0)
    assert found.temperature == ((theirs.temperature or 1.0) if theirs.do_sample else 0.0)


def test_without_do_sample_the_default_is_greedy_but_keeps_the_penalty() -> None:
    generation = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}
    assert read_sampling(generation) == Sampling(repetition_penalty=1.1)
    assert read_sampling({}) == Sampling()
    assert read_sampling({"do_sample": True}) == Sampling(temperature=1.0)


def test_what_the_user_gives_wins_and_none_does_not() -> None:
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": None}
    found = read_sampling(generation, temperature=0.0, top_p=None, seed=3)
    assert found == Sampling(temperature=0.0, top_p=0.8, seed=3)


def test_a_damaged_generation_config_is_refused_in_one_line() -> None:
    with pytest.raises(RequestError, match=r"temperature must be a number in 0\.\.100, got 'hot'"):
        read_sampling({"do_sample": True, "temperature": "hot"})
