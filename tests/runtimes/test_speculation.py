"""The judge of speculation is plain decoding, and for chance the distribution itself."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.cache_bookkeeping import CacheBookkeeping
from qwen2x.runtimes.draft_model import DraftModel
from qwen2x.runtimes.generate import Generation, generate
from qwen2x.runtimes.runtime import Logits, Runtime, TokenIds, open_runtime
from qwen2x.runtimes.sampler import Sampler, Sampling
from qwen2x.runtimes.speculation import Costs, SpeculationCounts, guess_ahead
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

GREEDY = Sampling()
# Repetitive, so that there is something to look up.
PROMPTS = ["Who are you?", "one two three, one two three, one two three, one", list(range(50)) * 3]


@pytest.fixture
def runtime(example_runtime: Runtime) -> Runtime:
    example_runtime.reset()
    return example_runtime


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be guessed is run, however little it pays here."""
    monkeypatch.setattr(Costs, "best_length", lambda self, chances, seconds: len(chances))


def answer(runtime: Runtime, prompt: Any, **options: Any) -> Generation:
    runtime.reset()
    settings: dict[str, Any] = {"max_tokens": 60, "sampling": GREEDY, "ignore_eos": True} | options
    return generate(runtime, prompt, **settings).run()


@pytest.mark.parametrize("prompt", PROMPTS, ids=["question", "words", "ids"])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.usefixtures("always")
def test_greedy_text_is_that_of_plain_decoding(
    runtime: Runtime, prompt: Any, penalty: float
) -> None:
    sampling = Sampling(repetition_penalty=penalty)
    plain = answer(runtime, prompt, sampling=sampling)
    ahead = answer(runtime, prompt, sampling=sampling, speculate=True)
    assert plain.speculation is None
    assert (ahead.token_ids, ahead.text) == (plain.token_ids, plain.text)
    counts = ahead.speculation
    assert counts is not None
    assert 0 <= counts.accepted <= counts.drafted
    # Each pass gives one token that was not guessed, and the prompt's gives one more.
    assert counts.passes + counts.accepted in (59, 60)
    if penalty == 1:
        assert counts.accepted > 20


def test_where_it_decides_itself_the_text_is_the_same_too(runtime: Runtime) -> None:
    for prompt in PROMPTS:
        plain = answer(runtime, prompt, max_tokens=120)
        assert answer(runtime, prompt, max_tokens=120, speculate=True).text == plain.text


@pytest.mark.usefixtures("always")
def test_a_seed_gives_the_text_that_it_gives_without(runtime: Runtime) -> None:
    for seed in range(12):
        sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=seed)
        plain = answer(runtime, PROMPTS[1], sampling=sampling)
        ahead = answer(runtime, PROMPTS[1], sampling=sampling, speculate=True)
        assert ahead.token_ids == plain.token_ids


class Chain(CacheBookkeeping):
    """A runtime whose logits depend on the last token alone."""

    def __init__(self, folder: Path, table: Logits) -> None:
        super().__init__()
        self.folder, self.table = folder, table
        self.vocab_size, self.max_context, self.eos_token_ids = len(table), 1 << 20, ()

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        return self.table[token_ids[0, -keep:]]

    def _truncate_cache(self, length: int) -> None:
        pass


class Stubborn:
    """Guesses the same tokens again and again."""

    seconds_per_token = 0.0

    def __init__(self, guesses: Sequence[int]) -> None:
        self._guesses = list(guesses)

    def observe(self, token_id: int) -> None:
        pass

    def chances(self, limit: int) -> list[float]:
        return [1.0] * min(limit, len(self._guesses))

    def draft(self, count: int) -> list[int]:
        return self._guesses[:count]


@pytest.mark.usefixtures("always")
def test_sampled_texts_are_distributed_as_the_model_says() -> None:
    """Of 8 tokens after each of 6: chi-square of 24,000 texts of three tokens."""
    random = np.random.default_rng(0)
    table = (1.5 * random.standard_normal((6, 6))).astype(np.float32)
    chances = np.exp(table.astype(np.float64))
    chances /= chances.sum(axis=1, keepdims=True)
    chain: Any = Chain(EXAMPLE, table)
    sampler = Sampler(Sampling(temperature=1.0, seed=5))
    counts, texts = SpeculationCounts(), 24_000
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(texts):
        chain.reset()
        logits = chain.prefill([0])
        guessed = guess_ahead(chain, logits, sampler, Stubborn([2, 3]), counts, known=6, limit=4)
        # The first one is no guess; the next three are two guesses' places and the one behind.
        found[tuple(next(guessed) for _ in range(4))] += 1
    assert 0.05 < counts.accepted / counts.drafted < 0.6
    expected = {
        (a, b, c, d): texts * chances[0, a] * chances[a, b] * chances[b, c] * chances[c, d]
        for a in range(6) for b in range(6) for c in range(6) for d in range(6)
    }  # fmt: skip
    frequent = [text for text, count in expected.items() if count >= 8]
    rest = sum(count for text, count in expected.items() if text not in frequent)
    rest_found = texts - sum(found[text] for text in frequent)
    statistic = sum((found[text] - expected[text]) ** 2 / expected[text] for text in frequent)
    statistic += (rest_found - rest) ** 2 / rest
    # Mean and spread of chi-square with so many degrees of freedom; the seed is fixed.
    freedom = len(frequent)
    assert freedom > 300
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.usefixtures("always")
def test_an_end_token_within_a_draft_ends_the_text(
    tmp_path: Path, make_bundle: MakeBundle, runtime: Runtime
) -> None:
    plain = answer(runtime, PROMPTS[2], max_tokens=40)
    end = plain.token_ids[25]
    source = tmp_path / "source"
    shutil.copytree(EXAMPLE, source)
    (source / "generation_config.json").write_text(f'{{"eos_token_id": {end}}}', encoding="utf-8")
    with open_runtime(make_bundle(source), threads=1) as other:
        whole = answer(other, PROMPTS[2], ignore_eos=False)
        ahead = answer(other, PROMPTS[2], ignore_eos=False, speculate=True)
        assert ahead.token_ids == whole.token_ids
        assert ahead.finish_reason == whole.finish_reason == "stop"
        assert other.cached_ids == [*ahead.prompt_ids, *ahead.token_ids]


@pytest.mark.usefixtures("always")
def test_a_stop_string_within_a_draft_ends_the_text_before_it(runtime: Runtime) -> None:
    whole = answer(runtime, PROMPTS[1]).text
    for stop in (whole[12:15], whole[30:33]):
        plain = answer(runtime, PROMPTS[1], stop=stop)
        cached = list(runtime.cached_ids)
        ahead = answer(runtime, PROMPTS[1], stop=stop, speculate=True)
        assert (ahead.text, ahead.token_ids) == (plain.text, plain.token_ids)
        assert ahead.finish_reason == "stop"
        assert runtime.cached_ids == cached


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("limit", range(1, 9))
def test_no_more_tokens_come_than_were_asked_for(runtime: Runtime, limit: int) -> None:
    plain = answer(runtime, PROMPTS[2], max_tokens=limit)
    ahead = answer(runtime, PROMPTS[2], max_tokens=limit, speculate=True)
    assert ahead.token_ids == plain.token_ids
    assert ahead.finish_reason == "length"
    assert runtime.cached_ids == [*ahead.prompt_ids, *ahead.token_ids[:-1]]


@pytest.mark.usefixtures("always")
def test_a_context_is_filled_to_its_end(make_bundle: MakeBundle, random_checkpoint: Path) -> None:
    with open_runtime(make_bundle(random_checkpoint, max_context=48), threads=1) as short:
        plain = answer(short, list(range(300, 312)) * 3, max_tokens=None)
        ahead = answer(short, list(range(300, 312)) * 3, max_tokens=None, speculate=True)
        assert ahead.token_ids == plain.token_ids
        assert len(ahead.token_ids) == 12


@pytest.mark.usefixtures("always")
def test_an_answer_that_was_left_keeps_what_was_given_and_no_guess(runtime: Runtime) -> None:
    whole = answer(runtime, PROMPTS[2])
    for taken in (3, 10, 11, 12):
        runtime.reset()
        left = generate(runtime, PROMPTS[2], max_tokens=60, sampling=GREEDY, speculate=True)
        pieces = iter(left)
        for _ in range(taken):
            next(pieces)
        pieces.close()  # type: ignore[attr-defined]
        assert left.token_ids == whole.token_ids[:taken]
        assert runtime.cached_ids == [*left.prompt_ids, *left.token_ids[:-1]]
        assert answer(runtime, PROMPTS[2], speculate=True).token_ids == whole.token_ids
    # The second of two turns goes on from there.
    runtime.truncate(30)
    again = generate(runtime, PROMPTS[2], max_tokens=60, sampling=GREEDY, ignore_eos=True)
    assert again.run().token_ids == whole.token_ids


@pytest.fixture(scope="module")
def draft(make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """Another random model with the example's tokenizer."""
    source = write_tiny_checkpoint(tmp_path_factory.mktemp("draft") / "source", seed=3)
    with open_runtime(make_bundle(source), threads=1) as opened:
        yield opened


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, seed=2)], ids=str)
def test_a_draft_model_that_knows_nothing_changes_nothing(
    runtime: Runtime, draft: Runtime, sampling: Sampling
) -> None:
    for prompt in PROMPTS:
        plain = answer(runtime, prompt, sampling=sampling)
        ahead = answer(runtime, prompt, sampling=sampling, speculate=draft)
        assert ahead.token_ids == plain.token_ids
        assert ahead.speculation is not None
        assert ahead.speculation.accepted < ahead.speculation.drafted / 4


@pytest.mark.usefixtures("always")
def test_a_draft_model_that_is_the_model_is_always_right(
    runtime: Runtime, make_bundle: MakeBundle
) -> None:
    with open_runtime(make_bundle(), threads=1) as twin:
        plain = answer(runtime, PROMPTS[0])
        ahead = answer(runtime, PROMPTS[0], speculate=twin)
        assert ahead.token_ids == plain.token_ids
        assert ahead.speculation is not None
        assert ahead.speculation.accepted >= 0.9 * ahead.speculation.drafted > 40
        # The next answer begins with what the draft's cache holds.
        assert answer(runtime, PROMPTS[1], speculate=twin).text == answer(runtime, PROMPTS[1]).text


def test_a_draft_model_stops_where_its_context_ends(draft: Runtime) -> None:
    draft.reset()
    guesses = DraftModel(draft, [1] * (draft.max_context - 2), 2016)
    assert len(guesses.chances(5)) == 2
    assert len(guesses.draft(2)) == 2
    guesses.observe(1)
    guesses.observe(1)
    assert guesses.chances(5) == []


def test_a_draft_of_another_tokenizer_is_refused(
    runtime: Runtime, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    path = source / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<|im_start|>", "<|im_begin|>"), encoding="utf-8")
    with (
        open_runtime(make_bundle(source), threads=1) as other,
        pytest.raises(RequestError, match=r"has another tokenizer.*<\|im_.*same family"),
    ):
        generate(runtime, "Hello", speculate=other)


def test_a_tokenizer_that_is_only_written_otherwise_is_the_same(
    runtime: Runtime, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    with (source / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n\n")
    with open_runtime(make_bundle(source), threads=1) as other:
        assert generate(runtime, "Hello", max_tokens=3, speculate=other).run().token_ids


@pytest.mark.usefixtures("always")
def test_torch_guesses_ahead_too(example_torch: Runtime) -> None:
    plain = answer(example_torch, PROMPTS[1], max_tokens=30)
    ahead = answer(example_torch, PROMPTS[1], max_tokens=30, speculate=True)
    assert ahead.token_ids == plain.token_ids
    assert ahead.speculation is not None
    assert ahead.speculation.drafted > 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("options", [{}, {"graph": True}], ids=["eager", "graph"])
def test_mlx_guesses_ahead_too(make_bundle: MakeBundle, options: dict[str, Any]) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    bundle = make_bundle(target="mlx", dtype="float32", **options)
    with open_runtime(bundle, **options) as runtime:
        for sampling in (GREEDY, Sampling(temperature=0.7, seed=1)):
            plain = answer(runtime, PROMPTS[1], max_tokens=30, sampling=sampling)
            ahead = answer(runtime, PROMPTS[1], max_tokens=30, sampling=sampling, speculate=True)
            assert ahead.token_ids == plain.token_ids
            assert ahead.speculation is not None
            assert ahead.speculation.drafted > 0


def costs_of(single: float, pair: float | None = None) -> Costs:
    costs = Costs()
    costs.record(1, single)
    for _ in range(20 if pair else 0):
        costs.record(2, pair or 0)
    return costs


def test_how_much_is_guessed_follows_chances_and_costs() -> None:
    assert Costs().best_length([1.0] * 15, 0.0) == 0
    assert costs_of(0.01).best_length([], 0.0) == 0
    assert costs_of(0.01).best_length([0.2] * 15, 0.0) == 0
    cheap = [costs_of(0.01, 0.011).best_length([chance] * 15, 0.0) for chance in (0.3, 0.6, 0.9)]
    assert 0 < cheap[0] < cheap[1] < cheap[2] <= 15
    assert costs_of(0.01, 0.011).best_length([1.0] * 15, 0.0) == 15
    # A row that costs a whole pass, or a guess that does.
    assert costs_of(0.01, 0.02).best_length([0.99] * 15, 0.0) == 0
    assert costs_of(0.01, 0.011).best_length([0.9] * 15, 0.01) == 0


def test_bad_measurements_are_forgotten() -> None:
    costs = costs_of(0.01, 0.011)
    for _ in range(9):
        costs.record(2, 10.0)
    assert costs.best_length([0.95] * 15, 0.0) == 0
    for _ in range(300):
        costs.record(1, 0.01)
    assert costs.best_length([0.95] * 15, 0.0) > 0
