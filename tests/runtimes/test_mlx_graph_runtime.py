"""``decode.mlxfn`` run: bit for bit what our own modules give. Both are judged by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters.bundle import MANIFEST, describe_files, write_manifest
from qwen2x.quantize.errors import BackendError, BundleError, RequestError
from qwen2x.runtimes.runtime import Logits, Runtime, open_runtime
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import write_tiny_checkpoint

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

GRAPH = "decode.mlxfn"
# Against transformers: other orders of summing, over logits of size 5.
FLOAT32_LOGITS = 5e-5
PROMPT = np.random.default_rng(0).integers(0, 2016, 600).tolist()
# Around one token, what is worth a chunk (8), a chunk (128), and beyond the smallest cache (256).
LENGTHS = (1, 7, 8, 9, 127, 128, 129, 300)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({}, {"dtype": "float32"}),
    "float32 untied": ({"is_tied": False}, {"dtype": "float32"}),
    "float32 yarn": ({"rope_scaling": YARN}, {"dtype": "float32"}),
    "bfloat16": ({}, {}),
    "4 bits bfloat16": ({"num_hidden_layers": 1}, {"bits": 4, "method": "rtn"}),
    "4 bits untied": ({"is_tied": False}, {"bits": 4, "method": "rtn", "dtype": "float32"}),
    "8 bits": ({}, {"bits": 8, "group_size": 128, "dtype": "float32"}),
    "8 bits untied": ({"is_tied": False, "num_hidden_layers": 1}, {"bits": 8, "dtype": "float32"}),
}


@pytest.fixture(scope="module")
def folder(make_bundle: MakeBundle, random_checkpoint: Path) -> Path:
    return make_bundle(random_checkpoint, target="mlx", dtype="float32", graph=True)


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[tuple[Runtime, Runtime]]:
    with open_runtime(folder, graph=True) as graph, open_runtime(folder) as eager:
        yield graph, eager


@pytest.fixture
def graph(opened: tuple[Runtime, Runtime]) -> Runtime:
    opened[0].reset()
    return opened[0]


@pytest.fixture
def eager(opened: tuple[Runtime, Runtime]) -> Runtime:
    opened[1].reset()
    return opened[1]


def same(found: Logits, wanted: Logits) -> None:
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


def near(found: Logits, wanted: Logits) -> None:
    np.testing.assert_allclose(found, wanted, atol=FLOAT32_LOGITS, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_gives_the_bits_of_our_own_modules_whatever_the_padding(
    variant: str, tmp_path: Path
) -> None:
    from qwen2x.exporters.exporter import export

    changes, options = VARIANTS[variant]
    source = write_tiny_checkpoint(tmp_path / "source", **changes)
    folder = export(source, "mlx", out=tmp_path / "folder", graph=True, **options).bundle
    with open_runtime(folder, graph=True) as graph, open_runtime(folder) as eager:
        for length in LENGTHS:
            graph.reset()
            eager.reset()
            same(graph.prefill(PROMPT[:length]), eager.prefill(PROMPT[:length]))
            for token in PROMPT[length : length + 2]:
                same(graph.decode(token), eager.decode(token))


def test_the_graph_computes_what_transformers_does(graph: Runtime, random_torch: Runtime) -> None:
    expected = random_torch.logits(np.array([PROMPT[:300]]))[0]
    near(graph.prefill(PROMPT[:200]), expected[199])
    near(np.stack([graph.decode(token) for token in PROMPT[200:300]]), expected[200:])
    assert graph.cached_ids == PROMPT[:300]


def test_the_cache_grows_through_all_capacities_to_the_last_position(
    graph: Runtime, eager: Runtime
) -> None:
    capacities = []
    for length in (100, 28, 1, 127, 1, 100, 155):
        start = graph.cache_length
        chunk = PROMPT[start : start + length]
        same(graph.append(chunk), eager.append(chunk))
        capacities.append(graph._buffers[0].shape[2])  # type: ignore[attr-defined]
    assert graph.cache_length == graph.max_context == 512
    # A chunk needs room for its padding: 156 to 256 tokens behind 129 may still end beyond 256.
    assert capacities == [256, 256, 256, 512, 512, 512, 768]
    with pytest.raises(RequestError, match="513 positions are needed, the context has 512"):
        graph.decode(1)
    graph.truncate(511)
    eager.truncate(511)
    same(graph.decode(7), eager.decode(7))


@pytest.mark.parametrize("keep", [1, 2, 7, 8, 9, 60, 129, 140])
def test_append_keeps_the_last_rows(graph: Runtime, eager: Runtime, keep: int) -> None:
    rows = graph.append(PROMPT[:140], keep=keep)
    assert rows.shape == (keep, 2048)
    near(rows, eager.append(PROMPT[:140], keep=keep))


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(
    graph: Runtime, eager: Runtime
) -> None:
    graph.prefill(PROMPT[:260])
    graph.append([5, 6, 7, 8] * 10)
    for length in (250, 131, 50):
        graph.truncate(length)
    eager.prefill(PROMPT[:50])
    same(graph.decode(PROMPT[50]), eager.decode(PROMPT[50]))
    same(graph.append(PROMPT[51:70]), eager.append(PROMPT[51:70]))
    graph.reset()
    eager.reset()
    assert graph._buffers == []  # type: ignore[attr-defined]
    same(graph.prefill(PROMPT[:3]), eager.prefill(PROMPT[:3]))


def test_positions_that_jump_are_those_of_transformers(
    graph: Runtime, random_torch: Runtime
) -> None:
    ids = np.array([PROMPT[:30], PROMPT[30:60]])
    jump = [*range(8), *range(512 - 22, 512)]
    near(graph.logits(ids, positions=jump), random_torch.logits(ids, positions=jump))
    assert graph.cache_length == 0


def test_rows_of_a_batch_equal_each_row_alone(graph: Runtime, random_torch: Runtime) -> None:
    lengths = [20, 9, 1]
    padded = np.full((3, 20), 2015)
    for row, length in enumerate(lengths):
        padded[row, :length] = PROMPT[:length]
    found = graph.logits(padded, lengths=lengths)
    expected = random_torch.logits(np.array([PROMPT[:20]]))[0]
    for row, length in enumerate(lengths):
        near(found[row, :length], expected[:length])


def test_a_step_does_not_copy_the_cache(graph: Runtime) -> None:
    """The list of buffers was held while a step ran, so every step copied all of them."""
    graph.prefill(PROMPT[:250])
    graph.append(PROMPT[:20])
    buffers: list[Any] = graph._buffers  # type: ignore[attr-defined]
    size = sum(part.nbytes for part in buffers)

    def peak_of(tokens: list[int]) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for token in tokens:
            graph.decode(token)
        return int(mx.get_peak_memory() - before)

    # Of four buffers, so a copy of one of them would be a quarter of size.
    assert peak_of(PROMPT[:100]) < size / 5
    held = [part[:, :, :1] for part in buffers]
    mx.eval(held)
    held = list(buffers)
    assert peak_of(PROMPT[:1]) > size / 2, "the figure above would not show a copy"
    assert held


def test_growing_holds_one_buffer_twice(graph: Runtime) -> None:
    graph.prefill(PROMPT[:120])
    for token in PROMPT[120:256]:
        graph.decode(token)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    graph.decode(PROMPT[256])
    size = sum(part.nbytes for part in graph._buffers)  # type: ignore[attr-defined]
    # From half of size to size, and one of the four that are left behind; logits beside.
    assert size / 2 < mx.get_peak_memory() - before < (1 / 2 + 1 / 8 + 1 / 16) * size


@pytest.mark.parametrize("where", ["eval", "array"])
def test_ctrl_c_in_a_step_leaves_the_cache_as_it_was(
    graph: Runtime, eager: Runtime, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from qwen2x.runtimes import mlx_graph_runtime

    class Interrupted:
        """``mlx.core``, one of whose functions never comes to its end."""

        def __getattr__(self, name: str) -> Any:
            if name == where:
                raise KeyboardInterrupt
            return getattr(mx, name)

    graph.prefill(PROMPT[:10])
    eager.prefill(PROMPT[:10])
    with monkeypatch.context() as patch:
        patch.setattr(mlx_graph_runtime, "mx", Interrupted())
        for interrupted in ([9], [7] * 20, [7] * 200):
            with pytest.raises(KeyboardInterrupt):
                graph.append(interrupted)
    assert graph.cached_ids == PROMPT[:10]
    same(graph.decode(PROMPT[10]), eager.decode(PROMPT[10]))
    same(graph.append(PROMPT[11:300]), eager.append(PROMPT[11:300]))


def test_facts_are_those_of_the_bundle(graph: Runtime, eager: Runtime, folder: Path) -> None:
    for name in ("backend", "device", "dtype", "vocab_size", "max_context", "eos_token_ids",
                 "weight_bytes", "bits_per_weight", "folder"):  # fmt: skip
        assert getattr(graph, name) == getattr(eager, name), name
    with open_runtime(folder, graph=True) as closed:
        closed.prefill(PROMPT[:3])
    closed.close()


def changed(folder: Path, copy: Path, **graph: Any) -> Path:
    """A copy whose manifest says other things of the graph, and agrees with the files."""
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["graph"] |= graph
    write_manifest(copy, manifest | {"files": describe_files(copy, without=[MANIFEST])})
    return copy


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"mlx": "0.31.0"}, r"was traced with mlx 0\.31\.0, here is \d+\.\d+"),
        ({"device": "tpu"}, r"was traced with device tpu, here is (cpu|metal|cuda)"),
    ],
)
def test_a_graph_of_another_mlx_or_device_is_refused_with_what_to_do(
    folder: Path, tmp_path: Path, facts: dict[str, str], said: str
) -> None:
    copy = changed(folder, tmp_path / "copy", **facts)
    with pytest.raises(BackendError, match=said) as caught:
        open_runtime(copy, graph=True)
    assert "export it again with --to mlx --graph here, or run it without" in str(caught.value)
    assert "\n" not in str(caught.value)
    with open_runtime(copy) as runtime:
        assert np.isfinite(runtime.prefill([1])).all()


def test_a_graph_that_mlx_cannot_read_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "cut")
    content = (copy / GRAPH).read_bytes()
    for size in (0, 100, len(content) // 2):
        (copy / GRAPH).write_bytes(content[:size])
        again = changed(copy, tmp_path / str(size))
        with pytest.raises(BundleError, match=f"{GRAPH} cannot be read") as caught:
            open_runtime(again, graph=True)
        assert "\n" not in str(caught.value)


def test_a_graph_that_is_not_there_is_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, folder: Path
) -> None:
    without = make_bundle(random_checkpoint, target="mlx", dtype="float32")
    with pytest.raises(BackendError, match=f"has no {GRAPH}; export it again with --to mlx"):
        open_runtime(without, graph=True)
    with pytest.raises(BackendError, match="which is a graph anyway; leave out --graph"):
        open_runtime(make_bundle(random_checkpoint), graph=True)
    with pytest.raises(BackendError, match="not for a graph"):
        open_runtime(folder, graph=True, kv_bits=8)
