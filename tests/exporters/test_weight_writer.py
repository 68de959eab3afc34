"""Streaming gives the same bytes whatever the chunks, and says truly how far it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_model
from safetensors.torch import load_file

from qwen2x.exporters import weight_writer
from qwen2x.exporters.exporter import export
from tests.tiny_checkpoint import write_tiny_checkpoint

ELEMENTS = 4096  # smaller than every matrix, not a multiple of the 384 columns of down_proj


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "source", intermediate_size=384, dtype="float32")


@pytest.mark.parametrize(
    "options", [{}, {"bits": 4, "method": "rtn"}, {"bits": 8, "group_size": 128}]
)
@pytest.mark.parametrize("elements", [1, ELEMENTS, 100_000])
def test_the_size_of_chunks_does_not_change_a_byte(
    elements: int,
    options: dict[str, int],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = export(source, out=tmp_path / "whole", **options).manifest["files"]
    monkeypatch.setattr(weight_writer, "CHUNK_ELEMENTS", elements)
    assert export(source, out=tmp_path / "chunked", **options).manifest["files"] == expected


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_the_number_of_cores_does_not_change_a_byte(
    cores: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = export(source, out=tmp_path / "a", bits=4, method="rtn").manifest["files"]
    monkeypatch.setattr(weight_writer, "CHUNK_ELEMENTS", ELEMENTS)
    monkeypatch.setattr(weight_writer.os, "cpu_count", lambda: cores)
    assert export(source, out=tmp_path / "b", bits=4, method="rtn").manifest["files"] == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float_weights_are_those_of_the_checkpoint_bit_for_bit(
    device: str, source: Path, tmp_path: Path
) -> None:
    export(source, out=tmp_path / "bundle", device=device, dtype="float32")
    theirs = load_file(source / "model.safetensors")
    model = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False)
    load_external_data_for_model(model, str(tmp_path / "bundle"))
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    parts = {
        "self_attn.qkv_proj.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
        "self_attn.qkv_proj.bias": [f"self_attn.{part}_proj.bias" for part in "qkv"],
        "mlp.gate_up_proj.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    }
    seen = set()
    for name, values in stored.items():
        if name.startswith("/") or name == "num_logits_to_keep":
            continue
        prefix, _, tail = name.partition(".mlp.")
        tail = f"mlp.{tail}" if tail else ""
        if ".self_attn." in name:
            prefix, _, tail = name.partition(".self_attn.")
            tail = f"self_attn.{tail}"
        names = [f"{prefix}.{part}" for part in parts[tail]] if tail in parts else [name]
        np.testing.assert_array_equal(values, np.concatenate([theirs[key] for key in names]))
        seen.update(names)
    assert seen == set(theirs)


def test_bfloat16_weights_stay_as_they_are_in_a_bfloat16_bundle(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype="bfloat16")
    export(source, out=tmp_path / "bundle", device="cuda", dtype="bfloat16")
    data = (tmp_path / "bundle" / "model.onnx_data").read_bytes()
    stored = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert bytes(stored[name].view(dtype=torch.uint8).numpy()) in data


def test_progress_begins_at_nothing_grows_and_ends_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_writer, "CHUNK_ELEMENTS", ELEMENTS)
    calls: list[tuple[int, int]] = []
    made = export(
        source,
        out=tmp_path / "bundle",
        bits=4,
        method="rtn",
        progress=lambda done, total: calls.append((done, total)),
    )
    done = [call[0] for call in calls]
    total = made.manifest["weight_bytes"]
    assert {call[1] for call in calls} == {total}
    assert done[0] == 0
    assert done[-1] == total
    assert done == sorted(done)
    assert len(done) > 10


def test_the_gaps_between_weights_are_zero(source: Path, tmp_path: Path) -> None:
    export(source, out=tmp_path / "bundle", bits=4, method="rtn")
    data = (tmp_path / "bundle" / "model.onnx_data").read_bytes()
    model = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False)
    covered = np.zeros(len(data), bool)
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            start = int(entries["offset"])
            covered[start : start + int(entries["length"])] = True
    gaps = np.frombuffer(data, np.uint8)[~covered]
    assert gaps.size
    assert not gaps.any()
