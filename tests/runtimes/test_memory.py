"""Memory of long prompts: pieces by their size, room made at once, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters.bundle import open_bundle
from qwen2x.quantize.errors import BackendError, RequestError
from qwen2x.runtimes import memory, onnx_cache
from qwen2x.runtimes.footprint import LIBRARY_BYTES, footprint_of
from qwen2x.runtimes.generate import generate
from qwen2x.runtimes.memory_needs import Chunking, MemoryNeeds
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.sampler import Sampling
from tests.runtimes.conftest import MakeBundle

IDS = np.random.default_rng(0).integers(0, 2000, 300).tolist()
NEEDS = MemoryNeeds(per_position=1000, per_token=100, per_score=1)
# By backend, what export and open_runtime are given.
BACKENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "onnx": ({}, {"threads": 1}),
    "mlx": ({"target": "mlx", "dtype": "float32"}, {}),
    "mlx-int8": ({"target": "mlx", "dtype": "float32"}, {"kv_bits": 8}),
}
ROUNDING = 1e-4


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def opened(make: MakeBundle, source: Path, backend: str, **options: Any) -> Runtime:
    export, opening = BACKENDS[backend]
    return open_runtime(make(source, **export), **opening, **options)


def test_pieces_become_smaller_where_attention_takes_more() -> None:
    chunking = Chunking(most=512, memory_bytes=512 * 1000, needs=NEEDS)
    sizes = [chunking.size(past) for past in (0, 388, 389, 2000, 10_000, 10**6)]
    assert sizes == [512, 512, 256, 128, 32, 16]
    for past in (0, 1000, 7000):
        assert NEEDS.work_bytes(chunking.size(past), past + chunking.size(past)) <= 512 * 1000


def test_pieces_cover_a_prompt_and_depend_on_what_is_before_alone() -> None:
    chunking = Chunking(most=64, memory_bytes=20_000, needs=NEEDS)
    pieces = list(chunking.pieces(0, 1000))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 1000
    assert all(one[1] == other[0] for one, other in pairwise(pieces))
    assert list(chunking.pieces(0, pieces[4][1])) == pieces[:5]
    behind = [(a + pieces[4][1], b + pieces[4][1]) for a, b in chunking.pieces(pieces[4][1], 300)]
    assert behind[:3] == pieces[5:8]
    assert chunking.work_bytes(0, 1000) <= 20_000


def test_a_budget_changes_no_logits(
    make_bundle: MakeBundle, random_checkpoint: Path, backend: str
) -> None:
    with opened(make_bundle, random_checkpoint, backend, prefill_memory=400_000) as runtime:
        told: list[tuple[int, int]] = []
        runtime.on_prefill = lambda done, total: told.append((done, total))
        pieced = runtime.append(IDS)
    with opened(make_bundle, random_checkpoint, backend) as runtime:
        whole = runtime.append(IDS)
    assert np.abs(pieced - whole).max() <= ROUNDING
    dones = [done for done, _ in told]
    assert dones[0] == 0
    assert dones[-1] == len(IDS)
    assert dones == sorted(set(dones))
    assert len(dones) > 3
    assert {total for _, total in told} == {len(IDS)}


def test_generation_tells_of_a_prompt_to_its_end_and_of_short_ones_nothing(
    make_bundle: MakeBundle, random_checkpoint: Path, backend: str
) -> None:
    greedy = Sampling(temperature=0)
    with opened(make_bundle, random_checkpoint, backend, prefill_chunk=64) as runtime:
        told: list[tuple[int, int]] = []
        runtime.on_prefill = lambda done, total: told.append((done, total))
        generate(runtime, IDS, max_tokens=4, sampling=greedy).run()
        dones = [*range(0, len(IDS), 64), len(IDS)]
        assert told == [(done, len(IDS)) for done in dones]
        told.clear()
        generate(runtime, [*IDS, 5], max_tokens=4, sampling=greedy).run()
        assert told == []


def test_a_prompt_makes_room_once(make_bundle: MakeBundle, random_checkpoint: Path) -> None:
    """Growing in steps needed copies, and memory for them, while a long prompt was read."""
    with opened(make_bundle, random_checkpoint, "onnx", prefill_chunk=32) as runtime:
        cache: Any = runtime._cache  # type: ignore[attr-defined]
        grown: list[int] = []
        grow = cache._grow
        cache._grow = lambda past, total: (grown.append(total), grow(past, total))
        generate(runtime, IDS, max_tokens=200, sampling=Sampling(temperature=0)).run()
        assert grown == [300]
        assert cache.capacity == 512


def test_room_for_an_answer_is_made_as_it_comes(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    """A step may attend to all of the buffer, so it is kept short, and never beyond the answer."""
    with opened(make_bundle, random_checkpoint, "onnx") as runtime:
        cache: Any = runtime._cache  # type: ignore[attr-defined]
        runtime.reserve(400)
        assert cache.capacity == 0
        runtime.prefill(IDS[:250])
        assert cache.capacity == 256
        before = runtime.logits(np.array([IDS[:257]]))[0, -1]
        for token in IDS[250:257]:
            after = runtime.decode(token)
        assert cache.capacity == 512
        np.testing.assert_allclose(after, before, atol=1e-4)


def test_a_compiled_step_keeps_its_cache_short(
    make_bundle: MakeBundle, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees all of it, so room for an answer to come would slow every token down."""
    with opened(make_bundle, random_checkpoint, "mlx") as runtime:
        monkeypatch.setattr(runtime, "_is_compiled", True)
        runtime.append(IDS[:10])
        runtime.reserve(500)
        assert runtime._buffers.capacity == 256  # type: ignore[attr-defined]
        monkeypatch.setattr("qwen2x.runtimes.mlx_cache.free_bytes", lambda: 1000)
        with pytest.raises(RequestError, match="a KV cache for 500 positions needs"):
            runtime.reserve(500)


@pytest.mark.parametrize("backend", ["onnx", "mlx"])
def test_a_cache_beyond_the_memory_is_refused_with_what_fits(
    make_bundle: MakeBundle, random_checkpoint: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2 layers of 2 heads of 32 columns, keys and values in float32.
    each = 2 * 2 * 2 * 32 * 4
    with opened(make_bundle, random_checkpoint, backend) as runtime:
        for module in ("onnx_cache.free_bytes", "mlx_cache.free_bytes"):
            monkeypatch.setattr(f"qwen2x.runtimes.{module}", lambda *device: 100 * each)
        with pytest.raises(RequestError) as caught:
            generate(runtime, IDS[:50], max_tokens=300).run()
        assert "a KV cache for 512 positions needs" in str(caught.value)
        assert "enough for 100 positions; shorten the prompt, ask for fewer" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert runtime.cached_ids == []


def test_reserving_beyond_the_context_is_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, backend: str
) -> None:
    with opened(make_bundle, random_checkpoint, backend) as runtime:
        runtime.reserve(512)
        with pytest.raises(RequestError, match="513 positions are needed, the context has 512"):
            runtime.reserve(513)


def test_a_budget_of_nothing_is_refused(make_bundle: MakeBundle, random_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match="prefill_memory must be 1 or more, got 0"):
        open_runtime(make_bundle(random_checkpoint), prefill_memory=0)


def test_a_footprint_is_what_the_runtime_takes(
    make_bundle: MakeBundle, random_checkpoint: Path, backend: str
) -> None:
    export, opening = BACKENDS[backend]
    bundle = open_bundle(make_bundle(random_checkpoint, **export))
    footprint = footprint_of(
        bundle, prompt_tokens=300, new_tokens=100, device="cpu", kv_bits=opening.get("kv_bits")
    )
    with opened(make_bundle, random_checkpoint, backend) as runtime:
        runtime.append(IDS)
        taken = sum(
            values.nbytes
            for values in runtime.export_cache(300).values()  # type: ignore[attr-defined]
        )
    assert footprint.positions == 400
    assert footprint.cache_bytes == 400 * taken / 300
    # ONNX Runtime's attention on a CPU is faster in smaller pieces.
    size = 256 if backend.startswith("onnx") else 300
    assert footprint.chunks == (size, size)
    assert footprint.peak_bytes == (
        footprint.cache_bytes + footprint.work_bytes + bundle.weight_bytes + LIBRARY_BYTES
    )


def test_a_control_group_leaves_what_it_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 1 << 40)
    for name, text in (
        ("memory.max", "1000000\n"),
        ("memory.current", "600000\n"),
        ("memory.stat", "anon 500000\ninactive_file 50000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert memory.free_host_bytes() == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_host_bytes() == 1 << 40


def test_where_nobody_tells_of_memory_nothing_is_refused() -> None:
    memory.require_memory(10**9, taken=0, bytes_per_position=10**6, free=None)
    assert onnx_cache.free_bytes("cuda") is None
