"""One YaRN factor per request: which one, what it changes, and that two never mix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters.bundle import MANIFEST, open_bundle
from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.distance import check_distance
from qwen2x.runtimes.generate import generate
from qwen2x.runtimes.rope_choice import choose_rope
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.sampler import Sampling
from qwen2x.runtimes.tolerance import tolerance_for
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import write_tiny_checkpoint

GREEDY = Sampling()
NATIVE, FACTORS = 64, (1.0, 2.0, 4.0)
# Sums in another order; 4e-6 seen over logits of size 4. The issue asks for 2e-3.
FLOAT32 = 5e-5
BACKENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "onnx": ({}, {"threads": 1, "prefill_chunk": 7}),
    "mlx": ({"target": "mlx", "dtype": "float32"}, {"prefill_chunk": 7, "device": "cpu"}),
    "mlx graph": (
        {"target": "mlx", "dtype": "float32", "graph": True},
        {"graph": True, "device": "cpu"},
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("yarn") / "source", dtype="float32", max_position_embeddings=NATIVE
    )


@pytest.fixture(scope="module", params=BACKENDS)
def opened(
    request: pytest.FixtureRequest, source: Path, make_bundle: MakeBundle
) -> Iterator[Runtime]:
    exported, opening = BACKENDS[request.param]
    if "target" in exported:
        pytest.importorskip("mlx.core", reason="mlx is not installed")
    bundle = make_bundle(source, yarn=FACTORS, **exported)
    with open_runtime(bundle, **opening) as runtime:
        yield runtime


@pytest.fixture
def runtime(opened: Runtime) -> Runtime:
    opened.use_rope(1)
    opened.reset()
    return opened


@pytest.fixture(scope="module")
def judge(source: Path) -> Iterator[Runtime]:
    with open_runtime(source, backend="torch", threads=1, yarn=FACTORS) as runtime:
        yield runtime


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 2000, count).tolist()
    return ids


def near(ours: Any, theirs: Any) -> None:
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= FLOAT32


# What a factor is


def test_a_runtime_says_which_factors_reach_how_far(runtime: Runtime, judge: Runtime) -> None:
    for each in (runtime, judge):
        assert dict(each.rope_contexts) == {1: 64, 2: 128, 4: 256}
        assert each.max_context == 256
    assert (runtime.rope_factor, runtime.rope_context) == (1, 64)


@pytest.mark.parametrize("factor", FACTORS)
def test_a_chunked_prompt_as_long_as_the_context_is_transformers(
    runtime: Runtime, judge: Runtime, factor: float
) -> None:
    ids = tokens(int(factor) * NATIVE)
    runtime.use_rope(factor)
    judge.use_rope(factor)
    whole = judge.logits(np.array([ids]))[0]
    near(runtime.prefill(ids[:-1]), whole[-2])
    near(runtime.decode(ids[-1]), whole[-1])
    near(runtime.logits(np.array([ids]))[0], whole)
    with pytest.raises(RequestError, match=f"has {len(ids)} with YaRN factor {factor:g}"):
        runtime.decode(0)


def test_another_factor_empties_the_cache_and_the_same_one_does_not(runtime: Runtime) -> None:
    first = runtime.prefill(tokens(9))
    runtime.use_rope(1)
    assert runtime.cache_length == 9
    runtime.use_rope(4)
    assert runtime.cache_length == 0
    assert np.abs(runtime.prefill(tokens(9)) - first).max() > 1e-3
    runtime.use_rope(1)
    np.testing.assert_array_equal(runtime.prefill(tokens(9)), first)


def test_a_factor_that_is_not_there_is_refused(runtime: Runtime) -> None:
    runtime.prefill(tokens(3))
    with pytest.raises(
        RequestError, match=r"factor 8 is not there, expected one of 1, 2, 4.*--yarn 1,2,4,8"
    ):
        runtime.use_rope(8)
    assert (runtime.rope_factor, runtime.cache_length) == (1, 3)


@pytest.mark.parametrize("name", BACKENDS)
def test_factor_one_is_bit_for_bit_the_bundle_without_yarn(
    name: str, source: Path, make_bundle: MakeBundle
) -> None:
    exported, opening = BACKENDS[name]
    if "target" in exported:
        pytest.importorskip("mlx.core", reason="mlx is not installed")
    several = make_bundle(source, yarn=FACTORS, **exported)
    plain = make_bundle(source, yarn=(1.0,), **exported)
    ids = tokens(40)
    with open_runtime(several, **opening) as ours, open_runtime(plain, **opening) as theirs:
        for factor in (4, 1):  # also after another one
            ours.use_rope(factor)
            ours.prefill(ids)
        ours.reset()
        np.testing.assert_array_equal(ours.prefill(ids), theirs.prefill(ids))
        np.testing.assert_array_equal(ours.decode(7), theirs.decode(7))


# Which one a request gets


@pytest.mark.parametrize(
    ("prompt", "limit", "factor", "room"),
    [
        (1, 63, 1, 63),
        (32, 32, 1, 32),
        (32, 33, 2, 33),
        (64, 1, 2, 1),
        (127, 1, 2, 1),
        (128, 1, 4, 1),
        (1, 255, 4, 255),
        # Without a limit: the smallest with room for a quarter of the smallest context.
        (1, None, 1, 63),
        (48, None, 1, 16),
        (49, None, 2, 79),
        (112, None, 2, 16),
        (113, None, 4, 143),
        (241, None, 4, 15),
        (255, None, 4, 1),
    ],
)
def test_auto_is_the_smallest_factor_that_reaches(
    runtime: Runtime, prompt: int, limit: int | None, factor: float, room: int
) -> None:
    chosen = choose_rope(runtime.rope_contexts, prompt, limit)
    assert (chosen.factor, chosen.max_tokens) == (factor, room)


@pytest.mark.parametrize(
    ("prompt", "limit", "yarn", "words"),
    [
        (250, 7, "auto", "250 tokens, the context 256 with YaRN factor 4, with 7 .*--yarn 1,2,4,8"),
        (256, None, "auto", "256 tokens, the context 256 .*at least one.*--yarn 1,2,4,8"),
        (2000, 1, "auto", "shorten the prompt or ask for fewer tokens.*--yarn 1,2,4,32"),
        (60, 5, 1, "the context 64 with YaRN factor 1, with 5 .*or choose --yarn 2"),
        (128, None, 2.0, "the context 128 with YaRN factor 2.*or choose --yarn 4"),
        (1, 1, 3, "factor 3 is not there, expected one of 1, 2, 4.*--yarn 1,2,3,4"),
    ],
)
def test_what_no_factor_reaches_is_refused_with_the_one_that_would(
    runtime: Runtime, prompt: int, limit: int | None, yarn: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        choose_rope(runtime.rope_contexts, prompt, limit, yarn)


def test_a_forced_factor_is_taken_for_a_short_prompt(runtime: Runtime) -> None:
    answer = generate(runtime, tokens(5), max_tokens=3, sampling=GREEDY, yarn=4).run()
    assert (answer.rope_factor, runtime.rope_factor) == (4, 4)


def test_the_answer_is_that_of_the_factor_alone(runtime: Runtime, judge: Runtime) -> None:
    prompt = tokens(100)
    ours = generate(runtime, prompt, max_tokens=9, sampling=GREEDY, ignore_eos=True).run()
    theirs = generate(judge, prompt, max_tokens=9, sampling=GREEDY, ignore_eos=True).run()
    assert (ours.rope_factor, theirs.rope_factor) == (2, 2)
    assert ours.token_ids == theirs.token_ids


def test_a_conversation_that_outgrows_its_factor_is_read_again(runtime: Runtime) -> None:
    first = generate(runtime, tokens(40), max_tokens=9, sampling=GREEDY, ignore_eos=True).run()
    assert (first.rope_factor, first.prefilled_again) == (1, 0)
    history = [*first.prompt_ids, *first.token_ids, *tokens(30, seed=1)]
    again = generate(runtime, history, max_tokens=9, sampling=GREEDY, ignore_eos=True).run()
    assert (again.rope_factor, again.cached_tokens) == (2, 0)
    assert again.prefilled_again == 48  # all but the last token, which was not run
    runtime.reset()
    alone = generate(runtime, history, max_tokens=9, sampling=GREEDY, ignore_eos=True).run()
    assert alone.token_ids == again.token_ids
    longer = [*alone.prompt_ids, *alone.token_ids, 5]
    third = generate(runtime, longer, max_tokens=9, sampling=GREEDY, ignore_eos=True).run()
    assert (third.rope_factor, third.prefilled_again) == (2, 0)
    assert third.cached_tokens == len(longer) - 2


def test_a_prefix_is_not_reused_across_factors(runtime: Runtime) -> None:
    prompt = tokens(20)
    generate(runtime, prompt, max_tokens=2, sampling=GREEDY, yarn=4).run()
    answer = generate(runtime, prompt, max_tokens=2, sampling=GREEDY, yarn=2).run()
    assert (answer.cached_tokens, answer.prefilled_again) == (0, 20)
    same = generate(runtime, prompt, max_tokens=2, sampling=GREEDY, yarn=2).run()
    assert (same.cached_tokens, same.prefilled_again) == (19, 0)


# Bundles and checkpoints


def test_a_config_with_yarn_keeps_its_factor_and_gains_the_plain_rope(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE}
    source = write_tiny_checkpoint(
        tmp_path / "source", dtype="float32", max_position_embeddings=NATIVE, rope_scaling=scaling
    )
    bundle = export(source, out=tmp_path / "bundle").bundle
    rope = open_bundle(bundle).manifest["rope"]
    assert (rope["factors"], rope["contexts"]) == ([1, 4], [64, 256])
    assert rope["default_factor"] == 1
    with (
        open_runtime(bundle, threads=1) as ours,
        open_runtime(source, backend="torch", yarn=[1]) as theirs,
    ):
        assert ours.rope_factor == theirs.rope_factor == 4
        for factor in (4, 1):
            ours.use_rope(factor)
            theirs.use_rope(factor)
            ids = np.array([tokens(60)])
            near(ours.logits(ids), theirs.logits(ids))


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_a_bundle_of_before_has_one_factor(target: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "old"
    export(source, target=target, out=out, dtype="float32")
    path = out / MANIFEST
    manifest = json.loads(path.read_text("utf-8"))
    for name in ("contexts", "default_factor", "original_context"):
        del manifest["rope"][name]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with open_runtime(out, device="cpu") as runtime:
        assert dict(runtime.rope_contexts) == {1: 64}
        assert len(generate(runtime, tokens(3), max_tokens=2).run().token_ids) <= 2
        with pytest.raises(RequestError, match="3 tokens, the context 64, with 62"):
            generate(runtime, tokens(3), max_tokens=62)


@pytest.mark.parametrize(
    "changes",
    [{"contexts": [64]}, {"contexts": [0, 128, 256]}, {"factors": [2, 1, 4]}, {"contexts": "x"}],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    changes: dict[str, Any], source: Path, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    from qwen2x.quantize.errors import BundleError

    made = make_bundle(source, yarn=FACTORS)
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((tmp_path / MANIFEST).read_text("utf-8"))
    manifest["rope"] |= changes
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match=r"qwen2x\.json is damaged"):
        open_bundle(tmp_path)


def test_a_length_that_the_config_lacks_reaches_pytorch_too(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(
        tmp_path / "source", dtype="float32", max_position_embeddings=131072, rope_theta=1e6,
        rope_scaling={"type": "yarn", "factor": 4.0},
    )  # fmt: skip
    bundle = export(source, out=tmp_path / "bundle", original_context=32768).bundle
    told = open_bundle(bundle).original_context
    assert told == 32768
    ids, places = np.array([tokens(40)]), [*range(20), *range(131052, 131072)]
    with (
        open_runtime(bundle, threads=1) as ours,
        open_runtime(source, backend="torch", original_context=told) as theirs,
    ):
        near(ours.logits(ids, positions=places), theirs.logits(ids, positions=places))


# validate --long


def test_every_end_of_every_context_is_looked_at(runtime: Runtime, judge: Runtime) -> None:
    tolerance = tolerance_for("float", "float32")
    judge.use_rope(2)
    checks, found = check_distance(runtime, judge, tokens(50), tolerance, lambda step: None)
    assert {check.name: check.verdict for check in checks if check.verdict != "pass"} == {}
    names = [check.name for check in checks]
    for factor in (1, 2, 4):
        for suffix in ("", "_abs_diff", "_gap", "_gap_abs_diff", "_chunked"):
            assert f"long_factor_{factor}{suffix}" in names
    assert "back_at_first_factor" in names
    assert ("first_factor_equals_plain" in names) == (runtime.backend == "onnx")
    places = {(place.factor, place.position) for place in found}
    assert places == {
        (1, 0), (1, 63), (2, 0), (2, 63), (2, 64), (2, 127),
        (4, 0), (4, 63), (4, 64), (4, 127), (4, 128), (4, 255),
    }  # fmt: skip
    assert all((place.gap_kl_wrong is None) == (place.position == 0) for place in found)
    assert judge.rope_factor == 2


def test_frequencies_of_another_factor_fail_its_check(
    source: Path, make_bundle: MakeBundle, judge: Runtime
) -> None:
    """As the wrong segment of a stacked table gives them."""
    tolerance = tolerance_for("float", "float32")
    with open_runtime(make_bundle(source, yarn=FACTORS), threads=1) as runtime:
        inputs = runtime._rope_inputs  # type: ignore[attr-defined]

        def mixed_up(rows: int) -> Any:
            factor, runtime.rope_factor = runtime.rope_factor, 2.0
            try:
                return inputs(rows)
            finally:
                runtime.rope_factor = factor

        runtime._rope_inputs = mixed_up  # type: ignore[attr-defined]
        checks, _ = check_distance(runtime, judge, tokens(50), tolerance, lambda step: None)
    failed = {check.name for check in checks if check.verdict == "fail"}
    assert {"long_factor_1", "long_factor_4", "long_factor_1_gap", "long_factor_4_gap"} <= failed
    assert not failed & {"long_factor_2", "long_factor_2_gap"}


@pytest.mark.parametrize("scheme", ["float", "int4-g32"])
def test_positions_that_are_ignored_fail_by_the_gap(
    scheme: str, source: Path, make_bundle: MakeBundle, judge: Runtime
) -> None:
    """Which nothing else shows: tokens in a row have the same logits wherever they stand."""
    options: dict[str, Any] = {"bits": 4, "method": "rtn"} if scheme != "float" else {}
    tolerance = tolerance_for(scheme, "float32")
    with open_runtime(make_bundle(source, yarn=FACTORS, **options), threads=1) as runtime:
        checks, _ = check_distance(runtime, judge, tokens(50), tolerance, lambda step: None)
        assert {check.name for check in checks if check.verdict == "fail"} == set()
        logits = runtime.logits
        runtime.logits = lambda ids, positions=None: logits(ids)  # type: ignore[method-assign, misc]
        checks, _ = check_distance(runtime, judge, tokens(50), tolerance, lambda step: None)
    failed = {check.name for check in checks if check.verdict == "fail"}
    assert {f"long_factor_{factor}_gap" for factor in (1, 2, 4)} <= failed
    assert not failed & {f"long_factor_{factor}" for factor in (1, 2, 4)}
