"""``decode.mlxfn``: what stands in the file and in the manifest, and what is refused."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen2x.exporters.bundle import MANIFEST, open_bundle
from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import BackendError, BundleError
from tests.exporters.judge import judge_logits, load_judge
from tests.exporters.refusal import refused_export
from tests.tiny_checkpoint import write_tiny_checkpoint

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

GRAPH = "decode.mlxfn"
# Against transformers: other orders of summing, over logits of size 5.
FLOAT32_LOGITS = 5e-5
TOKENS = np.random.default_rng(3).integers(0, 2016, (1, 20))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("source") / "source", dtype="float32")


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, with a graph; not to be changed."""
    out = tmp_path_factory.mktemp("graph") / "folder"
    return export(source, "mlx", out=out, graph=True).bundle


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    return content


def import_graph(folder: Path) -> tuple[Any, dict[str, Any]]:
    """As MLX itself imports it: the function, and the metadata."""
    function, metadata = mx.import_function(str(folder / GRAPH), return_metadata=True)
    return function, json.loads(metadata)


@pytest.mark.parametrize(
    ("max_context", "capacities"),
    [
        (1, [256]),
        (128, [256]),
        (129, [256, 512]),
        (512, [256, 512, 768]),
        (2048, [256, 512, 1024, 2048, 2304]),
        (32768, [256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 33024]),
    ],
)
def test_capacities_double_and_the_last_holds_the_context_and_a_chunk(
    max_context: int, capacities: list[int]
) -> None:
    from qwen2x.exporters.mlx_graph import CHUNK, capacities_of

    assert capacities_of(max_context) == capacities
    assert capacities[-1] >= max_context + CHUNK
    assert all(capacity % 256 == 0 for capacity in capacities)


def test_the_facts_stand_in_the_manifest_and_in_the_file_itself(folder: Path) -> None:
    _, metadata = import_graph(folder)
    assert metadata == manifest_of(folder)["graph"]
    assert metadata == {
        "mlx": version("mlx"),
        "device": metadata["device"],
        "dtype": "float32",
        "chunk": 128,
        "capacities": [256, 512, 768],
        "has_rope_inputs": False,
    }
    expected = "cpu" if mx.default_device().type == mx.cpu else ("metal", "cuda")
    assert metadata["device"] in expected


def test_the_graph_is_a_promised_file_without_weights(folder: Path) -> None:
    graph, weights = folder / GRAPH, folder / "model.safetensors"
    assert manifest_of(folder)["files"][GRAPH]["bytes"] == graph.stat().st_size
    assert graph.stat().st_size < weights.stat().st_size / 2
    # Its beginning is not to be found in the graph.
    embedding = load_file(weights)["model.embed_tokens.weight"]
    assert embedding.tobytes()[:64] not in graph.read_bytes()
    open_bundle(folder, verify=True)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"is_tied": False}, {"max_context": 100}),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            {"max_context": 300, "yarn": (4.0,)},
        ),
    ],
    ids=["tied", "untied", "yarn"],
)
def test_mlx_alone_runs_the_graph_as_its_docstring_says(
    changes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype="float32", **changes)
    folder = export(source, "mlx", out=tmp_path / "folder", graph=True, **options).bundle
    function, _ = import_graph(folder)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    expected = judge_logits(load_judge(source), TOKENS)[0]
    buffers = [mx.zeros((1, 2, 256, 32))] * 4
    padded = np.zeros((1, 128), np.int32)
    padded[:, :12] = TOKENS[:, :12]
    # A chunk that is not full, then token by token.
    places, zero = mx.arange(128, dtype=mx.int32), mx.array([0], mx.int32)
    logits, *buffers = function(
        mx.array(padded), places, zero, mx.array([11], mx.int32), *buffers, **weights
    )
    assert (logits.shape, logits.dtype) == ((1, 2048), mx.float32)
    np.testing.assert_allclose(np.array(logits[0]), expected[11], atol=FLOAT32_LOGITS, rtol=0)
    for place in range(12, 20):
        ids, offset = mx.array(TOKENS[:, place : place + 1], mx.int32), mx.array([place], mx.int32)
        logits, *buffers = function(ids, offset, offset, zero, *buffers, **weights)
        np.testing.assert_allclose(
            np.array(logits[0]), expected[place], atol=FLOAT32_LOGITS, rtol=0
        )


def test_the_same_export_without_a_graph_has_the_same_weights(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    plain = export(source, "mlx", out=tmp_path / "plain").bundle
    assert not (plain / GRAPH).exists()
    assert "graph" not in manifest_of(plain)
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        assert (plain / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_graph_that_is_cut_is_refused_when_the_folder_is_opened(
    size: int, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = (copy / GRAPH).read_bytes()
    (copy / GRAPH).write_bytes(content[:size])
    with pytest.raises(BundleError, match=rf"{GRAPH} has \d+ bytes, expected {len(content)}"):
        open_bundle(copy)


def test_a_changed_or_missing_graph_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = bytearray((copy / GRAPH).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / GRAPH).write_bytes(content)
    with pytest.raises(BundleError, match=f"{GRAPH} is not the file that was exported"):
        open_bundle(copy)
    (copy / GRAPH).unlink()
    with pytest.raises(BundleError, match=f"{GRAPH} is missing"):
        open_bundle(copy)


def test_a_graph_is_for_mlx_alone(source: Path, tmp_path: Path) -> None:
    said = refused_export(source, tmp_path / "new" / "out", graph=True)
    assert said == "--graph is for --to mlx; an ONNX bundle is a graph: leave it out"


def test_without_mlx_only_the_graph_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2x.exporters import mlx_export

    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'mlx'", name="mlx")

    monkeypatch.setattr(mlx_export.importlib, "import_module", fail)
    with pytest.raises(BackendError, match=r'--graph needs mlx .*pip install "qwen2x\[mlx\]"'):
        export(source, "mlx", out=tmp_path / "folder", graph=True)
    assert not (tmp_path / "folder").exists()
    assert export(source, "mlx", out=tmp_path / "folder").manifest["target"] == "mlx"
