"""A cache, a step and its candidates that stay on a device, rehearsed on the CPU's provider.

The judges are the plain runtime of the same bundle, and ``Sampler`` on whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters.bundle import open_bundle
from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes import onnx_device
from qwen2x.runtimes.bench import bench
from qwen2x.runtimes.onnx_device import DeviceRuntime, open_onnx
from qwen2x.runtimes.onnx_provider import PROVIDERS
from qwen2x.runtimes.profile import profile
from qwen2x.runtimes.runtime import Runtime, SamplesAhead, open_runtime
from qwen2x.runtimes.sampler import NOT_FINITE, Sampler, Sampling
from tests.runtimes.conftest import MakeBundle

BUNDLES: dict[str, dict[str, Any]] = {
    "float32": {"device": "cpu"},
    "float16": {"device": "cuda", "dtype": "float16"},
    "int8 cache": {"device": "cpu", "kv_bits": 8},
}
# The same graph on the same inputs; a mask of the whole capacity changes no sum.
SAME = 1e-5
# A prompt read in chunks against one read token by token, whose cache may hold float16 or int8.
STEPPED = 5e-3
PROMPT = np.random.default_rng(0).integers(0, 2016, 120).tolist()
SETTINGS = {
    "greedy": Sampling(),
    "penalized": Sampling(repetition_penalty=1.3),
    "rewarded": Sampling(repetition_penalty=0.8),
    "top-k": Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=1),
    "top-k, penalized": Sampling(temperature=0.7, top_k=20, repetition_penalty=1.2, seed=2),
    "everything": Sampling(temperature=1.0, seed=3),
    "more than the candidates": Sampling(temperature=1.0, top_k=200, min_p=0.01, seed=4),
}


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(
    request: pytest.FixtureRequest, make_bundle: MakeBundle, random_checkpoint: Path
) -> Path:
    return make_bundle(random_checkpoint, **BUNDLES[request.param])


def open_rehearsal(bundle: Path, **options: Any) -> DeviceRuntime:
    return DeviceRuntime(open_bundle(bundle), device="cpu", threads=1, is_captured=False, **options)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[DeviceRuntime]:
    with open_rehearsal(bundle, prefill_chunk=32) as runtime:
        yield runtime


@pytest.fixture
def runtime(opened: DeviceRuntime) -> DeviceRuntime:
    opened.reset()
    return opened


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[Runtime]:
    with open_runtime(bundle, device="cpu", threads=1, prefill_chunk=32) as runtime:
        yield runtime


def chosen_by_rows(runtime: Runtime, sampling: Sampling, known: int, limit: int) -> list[int]:
    """What the loop without ``sample_ahead`` gives."""
    runtime.reset()
    sampler = Sampler(sampling, PROMPT)
    logits = runtime.prefill(PROMPT)
    tokens = []
    for _ in range(limit):
        tokens.append(sampler.choose(logits[:known]))
        logits = runtime.decode(tokens[-1])
    return tokens


def test_a_step_gives_what_the_plain_runtime_gives(runtime: DeviceRuntime, plain: Runtime) -> None:
    plain.reset()
    np.testing.assert_allclose(runtime.prefill(PROMPT), plain.prefill(PROMPT), atol=SAME)
    for token in PROMPT[:5]:
        np.testing.assert_allclose(runtime.decode(token), plain.decode(token), atol=SAME)
    assert runtime.cached_ids == plain.cached_ids


def test_a_step_is_right_where_the_cache_grows_and_after_it_was_cut(
    runtime: DeviceRuntime, plain: Runtime
) -> None:
    plain.reset()
    for token in (PROMPT * 3)[:270]:
        last = runtime.decode(token)
    np.testing.assert_allclose(last, plain.prefill((PROMPT * 3)[:270]), atol=STEPPED)
    for one in (runtime, plain):
        one.truncate(250)
    np.testing.assert_allclose(runtime.decode(7), plain.decode(7), atol=STEPPED)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("known", [2048, 2016])
def test_choices_are_those_of_whole_rows(
    runtime: DeviceRuntime, plain: Runtime, name: str, known: int
) -> None:
    options: dict[str, Any] = {"context": PROMPT, "known": known, "limit": 12}
    tokens = list(runtime.sample_ahead(PROMPT, SETTINGS[name], **options))
    assert tokens == chosen_by_rows(plain, SETTINGS[name], known, 12)
    assert runtime.cached_ids == [*PROMPT, *tokens[:-1]]


def test_candidates_decide_the_usual_settings(
    runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object) -> None:
        raise AssertionError("a whole row was fetched")

    monkeypatch.setattr(onnx_device.DecodeStep, "logits", refuse)
    for name in ("greedy", "penalized", "top-k", "top-k, penalized"):
        runtime.reset()
        tokens = runtime.sample_ahead(PROMPT, SETTINGS[name], context=PROMPT, known=2048, limit=8)
        assert len(list(tokens)) == 8


def test_an_answer_that_is_left_leaves_its_tokens_in_the_cache(runtime: DeviceRuntime) -> None:
    answer = runtime.sample_ahead(PROMPT, Sampling(), context=PROMPT, known=2048, limit=50)
    with closing(answer):
        tokens = list(islice(answer, 3))
    assert runtime.cached_ids == [*PROMPT, *tokens[:2]]
    more = runtime.sample_ahead(tokens[2:], Sampling(), context=PROMPT, known=2048, limit=3)
    again = list(more)
    runtime.reset()
    whole = runtime.sample_ahead(PROMPT, Sampling(), context=PROMPT, known=2048, limit=6)
    assert [*tokens, *again] == list(whole)


def test_memory_of_the_cache_stays_where_it_is(runtime: DeviceRuntime) -> None:
    runtime.prefill(PROMPT)
    addresses = [buffer.data_ptr() for buffer in runtime._cache._buffers.values()]
    runtime.reset()
    runtime.prefill(PROMPT)
    assert [buffer.data_ptr() for buffer in runtime._cache._buffers.values()] == addresses


def test_a_cache_as_large_as_the_context_does_not_move(runtime: DeviceRuntime) -> None:
    options: dict[str, Any] = {"context": PROMPT, "known": 2048, "limit": 393}
    answers, generations = [], []
    for _ in range(2):
        runtime.reset()
        answers.append(list(runtime.sample_ahead(PROMPT, Sampling(), **options)))
        generations.append(runtime._cache.generation)
    assert generations[0] == generations[1]
    assert answers[0] == answers[1]


def test_a_step_follows_buffers_that_moved(runtime: DeviceRuntime, plain: Runtime) -> None:
    plain.reset()
    for one in (runtime, plain):
        one.append(PROMPT)
        one.decode(1)
    runtime._cache._grow(runtime.cache_length, runtime._cache.capacity)
    np.testing.assert_allclose(runtime.decode(2), plain.decode(2), atol=SAME)


def test_an_answer_beyond_the_context_is_refused(runtime: DeviceRuntime) -> None:
    with pytest.raises(RequestError, match="the context has 512"):
        next(runtime.sample_ahead(PROMPT, Sampling(), context=PROMPT, known=2048, limit=394))


def test_the_last_position_of_the_context_is_reached(runtime: DeviceRuntime) -> None:
    tokens = runtime.sample_ahead(PROMPT, Sampling(), context=PROMPT, known=2048, limit=393)
    assert len(list(tokens)) == 393


def test_logits_that_are_not_finite_are_refused(
    runtime: DeviceRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, broken = np.arange(64), np.full(64, np.nan, np.float32)
    monkeypatch.setattr(onnx_device.DecodeStep, "candidates", lambda self: (ids, broken))
    row = np.full((1, 2048), np.nan, np.float32)
    monkeypatch.setattr(onnx_device.DecodeStep, "logits", lambda self: row)
    with pytest.raises(RequestError, match=NOT_FINITE[:20]):
        next(runtime.sample_ahead([1], Sampling(), context=[1], known=2048, limit=1))


def test_bench_measures_it(runtime: DeviceRuntime) -> None:
    assert isinstance(runtime, SamplesAhead)
    speed = bench(runtime, PROMPT, 16, 4, 1)
    assert speed.decode_tokens_per_s > 0


def test_whole_rows_and_several_rows_of_logits_are_there_too(
    runtime: DeviceRuntime, plain: Runtime
) -> None:
    ids = np.array([PROMPT[:20], PROMPT[20:40]])
    np.testing.assert_allclose(runtime.logits(ids), plain.logits(ids), atol=SAME)
    plain.reset()
    np.testing.assert_allclose(
        runtime.append(PROMPT[:40], keep=3), plain.append(PROMPT[:40], keep=3), atol=SAME
    )


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_device_with_memory_of_its_own_gets_this_runtime(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, is_recorded: bool
) -> None:
    monkeypatch.setitem(PROVIDERS, "cpu", replace(PROVIDERS["cpu"], has_own_memory=True))
    monkeypatch.setattr(onnx_device, "DeviceRuntime", lambda bundle, **options: options)
    options: Any = open_onnx(open_bundle(bundle), device="cpu", record=is_recorded)
    assert options["is_captured"] is not is_recorded
    assert options["device"] == "cpu"


def test_its_runs_are_recorded(bundle: Path) -> None:
    with open_rehearsal(bundle, record=True) as runtime:
        found = profile(runtime, PROMPT, 16, 4, 1)
    assert found.decode.operators
    assert found.prefill.graph_s > 0


def test_an_export_for_the_host_gets_the_plain_runtime(bundle: Path) -> None:
    with open_onnx(open_bundle(bundle), device="cpu", threads=1) as runtime:
        assert not isinstance(runtime, SamplesAhead)
