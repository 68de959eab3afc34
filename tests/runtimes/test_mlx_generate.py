"""Steps that are queued ahead, against the same model without them, and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.generate import Generation, generate
from qwen2x.runtimes.runtime import Runtime, SamplesAhead, open_runtime
from qwen2x.runtimes.sampler import Sampler, Sampling
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import EXAMPLE

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

GREEDY = Sampling()
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=3)
PROMPT = np.random.default_rng(0).integers(0, 2016, 90).tolist()


@pytest.fixture(scope="module")
def opened(make_bundle: MakeBundle) -> Iterator[Runtime]:
    with open_runtime(make_bundle(target="mlx", dtype="float32"), prefill_chunk=32) as runtime:
        yield runtime


@pytest.fixture
def runtime(opened: Runtime) -> Runtime:
    opened.reset()
    assert isinstance(opened, SamplesAhead)
    return opened


def by_host(runtime: Runtime, prompt: list[int], sampling: Sampling, count: int) -> list[int]:
    """Token by token, chosen on the host."""
    runtime.reset()
    sampler = Sampler(sampling, prompt)
    tokens = [sampler.choose(runtime.prefill(prompt)[:2016])]
    while len(tokens) < count:
        tokens.append(sampler.choose(runtime.decode(tokens[-1])[:2016]))
    runtime.reset()
    return tokens


def ahead(
    runtime: Any, prompt: list[int], sampling: Sampling, limit: int, known: int = 2016
) -> Any:
    return runtime.sample_ahead(prompt, sampling, context=prompt, known=known, limit=limit)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("length", [1, 32, 33, 90])
def test_tokens_are_those_of_the_host(runtime: Runtime, sampling: Sampling, length: int) -> None:
    expected = by_host(runtime, PROMPT[:length], sampling, 40)
    assert list(ahead(runtime, PROMPT[:length], sampling, 40)) == expected
    assert runtime.cached_ids == PROMPT[:length] + expected[:-1]


def test_text_is_that_of_transformers(runtime: Runtime, example_torch: Runtime) -> None:
    for question in ("Who are you?", "Hello"):
        runtime.reset()
        example_torch.reset()
        ours = generate(runtime, question, max_tokens=40, sampling=GREEDY).run()
        theirs = generate(example_torch, question, max_tokens=40, sampling=GREEDY).run()
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        assert ours.prefill_s > 0
        assert ours.decode_s > 0


@pytest.mark.parametrize("taken", [1, 2, 5, 20])
def test_a_runtime_that_was_left_goes_on_as_if_nothing_had_been_queued(
    runtime: Runtime, taken: int
) -> None:
    expected = by_host(runtime, PROMPT, GREEDY, 30)
    tokens = ahead(runtime, PROMPT, GREEDY, 30)
    assert [next(tokens) for _ in range(taken)] == expected[:taken]
    assert runtime.cached_ids == PROMPT + expected[: taken - 1]
    tokens.close()
    assert runtime.cached_ids == PROMPT + expected[: taken - 1]
    rest = ahead(runtime, [expected[taken - 1]], GREEDY, 30 - taken)
    assert list(rest) == expected[taken:]


@pytest.mark.parametrize("end", ["stop string", "end token", "closed"])
def test_answers_that_end_early_leave_a_cache_that_the_next_turn_shares(
    runtime: Runtime, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(runtime, "Who are you?", max_tokens=30, sampling=GREEDY, ignore_eos=True).run()
    runtime.reset()
    answer = generate(
        runtime,
        "Who are you?",
        max_tokens=30,
        sampling=GREEDY,
        stop=whole.text[8:12] if end == "stop string" else (),
    )
    if end == "end token":
        monkeypatch.setattr(runtime, "eos_token_ids", (whole.token_ids[9],))
    if end == "closed":
        pieces = iter(answer)
        for _ in range(6):
            next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    else:
        answer.run()
        assert answer.finish_reason == "stop"
    given = answer.token_ids
    assert given == whole.token_ids[: len(given)]
    kept = given if end == "end token" else given[:-1]
    assert runtime.cached_ids == answer.prompt_ids + kept
    monkeypatch.undo()
    again = generate(runtime, "Who are you?", max_tokens=30, sampling=GREEDY, ignore_eos=True).run()
    assert again.cached_tokens == len(again.prompt_ids) - 1
    assert again.token_ids == whole.token_ids


def test_the_context_is_the_limit(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(target="mlx", dtype="float32", max_context=40)
    with open_runtime(bundle) as short:
        answer = generate(short, "Hello", sampling=GREEDY, raw=True, ignore_eos=True).run()
        assert len(answer.prompt_ids) + len(answer.token_ids) == 40
        short.reset()
        with pytest.raises(RequestError, match="41 positions are needed, the context has 40"):
            next(ahead(short, PROMPT[:30], GREEDY, 12))
        assert short.cached_ids == []


def test_the_last_token_is_not_run(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    forward = runtime._forward

    def counted(token_ids: Any, past: int, keep: int) -> Any:
        runs.append(past)
        return forward(token_ids, past, keep)

    monkeypatch.setattr(runtime, "_forward", counted)
    assert len(list(ahead(runtime, PROMPT[:5], GREEDY, 4))) == 4
    assert runs == [0, 5, 6, 7]


def test_a_step_is_queued_before_the_last_token_is_taken(
    runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    queue = runtime._queue

    def seen(*args: Any) -> Any:
        events.append("queued")
        return queue(*args)

    monkeypatch.setattr(runtime, "_queue", seen)
    for _ in ahead(runtime, PROMPT[:5], GREEDY, 4):
        events.append("taken")
    assert events == ["queued", "queued", "taken", "queued", "taken", "queued", "taken", "taken"]


def test_rows_of_a_padded_vocabulary_are_never_chosen(runtime: Runtime) -> None:
    hot = Sampling(temperature=100.0, seed=0)
    assert max(ahead(runtime, PROMPT[:4], hot, 60, known=50)) < 50


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_logits_that_are_not_finite_are_refused(
    runtime: Any, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = runtime._forward

    def broken(token_ids: Any, past: int, keep: int) -> Any:
        rows = forward(token_ids, past, keep)
        return rows * (np.nan if past >= 7 else 1)

    monkeypatch.setattr(runtime, "_forward", broken)
    answer = Generation(runtime=runtime, prompt_ids=PROMPT[:5], sampling=sampling, max_tokens=9)
    with pytest.raises(RequestError, match="not finite; validate the bundle"):
        answer.run()
    assert len(answer.token_ids) == 3
    assert runtime.cached_ids == PROMPT[:5] + answer.token_ids


def test_ctrl_c_between_tokens_leaves_a_usable_runtime(
    runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_host(runtime, PROMPT, GREEDY, 12)
    queue = runtime._queue
    left = [4]

    def interrupted(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return queue(*args)

    tokens: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_queue", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens.extend(ahead(runtime, PROMPT, GREEDY, 12))
    assert tokens == expected[: len(tokens)]
    assert runtime.cached_ids == PROMPT + tokens[:-1]
    assert list(ahead(runtime, tokens[-1:], GREEDY, 12 - len(tokens))) == expected[len(tokens) :]


def test_queued_steps_do_not_copy_the_cache(make_bundle: MakeBundle) -> None:
    with open_runtime(make_bundle(target="mlx", dtype="float32")) as runtime:
        cache: Any = runtime._buffers  # type: ignore[attr-defined]
        tokens = ahead(runtime, PROMPT * 6, GREEDY, 200)
        next(tokens)
        size = cache.capacity * cache.layout.bytes_per_position
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        assert len(list(tokens)) == 199
        # One of the twelve buffers would be a twelfth of size.
        assert cache.capacity * cache.layout.bytes_per_position == size
        assert mx.get_peak_memory() - before < size / 12


def test_a_runtime_may_be_used_by_another_thread_than_the_one_that_opened_it(
    runtime: Runtime, example_torch: Runtime
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate(runtime, "Hello", max_tokens=9, sampling=GREEDY).run).result()
        first = pool.submit(runtime.decode, 300).result()
    runtime.truncate(runtime.cache_length - 1)
    np.testing.assert_allclose(runtime.decode(300), first, atol=1e-5)
    example_torch.reset()
    expected = generate(example_torch, "Hello", max_tokens=9, sampling=GREEDY).run()
    assert answer.text == expected.text


def test_the_trained_model_answers_alike_in_four_bits_by_both_ways(
    make_bundle: MakeBundle,
) -> None:
    with open_runtime(make_bundle(EXAMPLE, target="mlx", bits=4, method="rtn")) as runtime:
        prompt = PROMPT[:20]
        assert list(ahead(runtime, prompt, DRAWN, 20)) == by_host(runtime, prompt, DRAWN, 20)
