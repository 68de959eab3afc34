"""Single tokens that attend by products. The judges are transformers and the one operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.onnx_decode import graph_with_products
from qwen2x.runtimes.batch import open_batch
from qwen2x.runtimes.onnx_runtime import OnnxRuntime
from qwen2x.runtimes.runtime import Logits, Runtime, open_runtime
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import write_tiny_checkpoint

IDS = [int(token) for token in np.random.default_rng(0).integers(0, 2016, 300)]
# Other orders of summing, over logits of size 5.
NEAR = 2e-4


@pytest.fixture(scope="module")
def bundle(make_bundle: MakeBundle, random_checkpoint: Path) -> Path:
    return make_bundle(random_checkpoint)


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Iterator[Runtime]:
    with open_runtime(bundle, threads=2) as opened:
        take_products(opened)
        yield opened


def take_products(runtime: Runtime, start: int = 0) -> None:
    assert isinstance(runtime, OnnxRuntime)
    assert runtime.has_products
    runtime.products_from = start


def steps(runtime: Runtime, ids: list[int]) -> Logits:
    return np.stack([runtime.decode(token).copy() for token in ids])


def test_steps_are_those_of_transformers(runtime: Runtime, random_torch: Runtime) -> None:
    runtime.reset()
    runtime.prefill(IDS[:250])
    # The cache grows from 256 to 300 positions and more on the way.
    expected = random_torch.logits(np.array([IDS]))[0, 250:]
    np.testing.assert_allclose(steps(runtime, IDS[250:]), expected, atol=NEAR, rtol=0)


def test_a_truncated_cache_is_overwritten(runtime: Runtime) -> None:
    runtime.reset()
    runtime.prefill(IDS[:100])
    expected = steps(runtime, IDS[100:110])
    runtime.truncate(100)
    steps(runtime, [5, 6, 7])
    runtime.truncate(100)
    np.testing.assert_array_equal(steps(runtime, IDS[100:110]), expected)


def test_keys_and_values_are_those_of_the_operator(bundle: Path, runtime: Runtime) -> None:
    with open_runtime(bundle, threads=1, room=300) as usual:
        assert isinstance(usual, OnnxRuntime)
        assert not usual.has_products
        caches = []
        for each in (usual, runtime):
            assert isinstance(each, OnnxRuntime)
            each.reset()
            each.prefill(IDS[:40])
            steps(each, IDS[40:60])
            caches.append(each.export_cache(60))
        for part, values in caches[0].items():
            np.testing.assert_allclose(caches[1][part], values, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"num_attention_heads": 4, "num_key_value_heads": 1},
    ],
)
def test_heads_may_share_keys_or_not(
    shape: dict[str, Any], tmp_path: Path, make_bundle: MakeBundle
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype="float32", **shape)
    with (
        open_runtime(make_bundle(source), threads=1) as ours,
        open_runtime(source, backend="torch", threads=1) as theirs,
    ):
        take_products(ours)
        ours.prefill(IDS[:20])
        expected = theirs.logits(np.array([IDS[:40]]))[0, 20:]
        np.testing.assert_allclose(steps(ours, IDS[20:40]), expected, atol=NEAR, rtol=0)


def test_each_yarn_factor_turns_as_it_does_in_prompts(
    tmp_path: Path, make_bundle: MakeBundle
) -> None:
    source = write_tiny_checkpoint(
        tmp_path / "source", dtype="float32", max_position_embeddings=32768, rope_theta=1e6
    )
    with open_runtime(make_bundle(source, yarn=(1.0, 4.0)), threads=1) as runtime:
        take_products(runtime)
        for factor in (4.0, 1.0):
            runtime.use_rope(factor)
            expected = runtime.logits(np.array([IDS[:40]]))[0, 20:]
            runtime.prefill(IDS[:20])
            np.testing.assert_allclose(steps(runtime, IDS[20:40]), expected, atol=NEAR, rtol=0)


def test_slots_of_other_lengths_run_together(runtime: Runtime, random_torch: Runtime) -> None:
    lengths = [30, 47, 64]
    with closing(open_batch(runtime, 3)) as batch:
        slots = [batch.open_slot() for _ in lengths]
        for slot, length in zip(slots, lengths, strict=True):
            slot.append(IDS[:length])
        taken: list[bool] = []
        chosen = runtime._by_products  # type: ignore[attr-defined]

        def watched(*args: Any) -> bool:
            taken.append(chosen(*args))
            return taken[-1]

        runtime._by_products = watched  # type: ignore[attr-defined]
        rows = batch.decode([(slot, IDS[n]) for slot, n in zip(slots, lengths, strict=True)])
        # Buffers of 256 positions are more than twice as long as these rows.
        take_products(runtime, 1)
        batch.decode([(slot, IDS[n + 1]) for slot, n in zip(slots, lengths, strict=True)])
        take_products(runtime)
        del runtime._by_products  # type: ignore[attr-defined]
    assert taken == [True, False]
    for row, length in zip(rows, lengths, strict=True):
        expected = random_torch.logits(np.array([IDS[: length + 1]]))[0, -1]
        np.testing.assert_allclose(row, expected, atol=NEAR, rtol=0)


def test_guesses_attend_as_single_tokens_do_on_both_sides_of_the_border(
    make_bundle: MakeBundle,
) -> None:
    with open_runtime(make_bundle(bits=8), threads=2) as runtime:
        take_products(runtime, 210)
        runtime.prefill(IDS[:200])
        expected = steps(runtime, IDS[200:224])
        runtime.reset()
        runtime.prefill(IDS[:200])
        # The second piece has tokens on both sides.
        pieces = [runtime.decode_guessed(IDS[start : start + 8]) for start in (200, 208, 216)]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)


def test_long_caches_take_products_and_short_ones_do_not(bundle: Path) -> None:
    with open_runtime(bundle, threads=1, record=True) as runtime:
        take_products(runtime, 210)
        runtime.prefill(IDS[:208])
        steps(runtime, IDS[208:211])
        assert isinstance(runtime, OnnxRuntime)
        runs = runtime.recorded_runs()[-3:]
    found = [{operator for _, operator, _ in run.nodes} for run in runs]
    assert [("ScatterElements" in each, "GroupQueryAttention" in each) for each in found] == [
        (False, True), (True, False), (True, False),
    ]  # fmt: skip
    # The branching has events of its own, which would count its nodes twice.
    assert not any("If" in each for each in found)


@pytest.mark.parametrize(
    "options", [{"bits": 8, "kv_bits": 8}, {"device": "cuda", "dtype": "float32"}]
)
def test_other_attention_is_left_alone(options: dict[str, Any], make_bundle: MakeBundle) -> None:
    folder = make_bundle(**options)
    assert graph_with_products(open_bundle(folder).folder / "model.onnx") is None
    with open_runtime(folder, device="cpu", threads=1) as runtime:
        assert isinstance(runtime, OnnxRuntime)
        assert not runtime.has_products
        assert np.isfinite(runtime.prefill(IDS[:5])).all()
