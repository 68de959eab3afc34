"""Checkpoints in several files: the index and its shards must belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from qwen2x.exporters.checkpoint import INDEX, find_shards
from qwen2x.exporters.exporter import export
from tests.exporters.refusal import refused_export
from tests.tiny_checkpoint import write_tiny_checkpoint

SHARDED = 300_000
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "bundle"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "sharded", max_shard_bytes=SHARDED)


def change_index(source: Path, change: Change) -> None:
    path = source / INDEX
    index = json.loads(path.read_text("utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), "utf-8")


def test_a_missing_shard_is_named(sharded: Path, out: Path) -> None:
    first, *others = find_shards(sharded)
    (sharded / first).unlink()
    message = refused_export(sharded, out)
    assert message == (
        f"1 of {len(others) + 1} shards named in {INDEX} are missing: {first}; fetch them"
    )


def test_a_shard_whose_link_points_nowhere_is_missing(sharded: Path, out: Path) -> None:
    first = find_shards(sharded)[0]
    (sharded / first).unlink()
    (sharded / first).symlink_to("nowhere")
    assert f"are missing: {first}" in refused_export(sharded, out)


@pytest.mark.parametrize("outside", ["../elsewhere.safetensors", "/etc/passwd", "sub/x", ".."])
def test_an_index_that_points_outside_is_refused(outside: str, sharded: Path, out: Path) -> None:
    shutil.copyfile(sharded / find_shards(sharded)[0], sharded.parent / "elsewhere.safetensors")
    change_index(sharded, lambda index: index.update({Q_PROJ: outside}))
    message = refused_export(sharded, out)
    assert outside in message
    assert "outside its folder" in message or "missing" in message


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
def test_a_damaged_index_is_refused(text: str, sharded: Path, out: Path) -> None:
    (sharded / INDEX).write_text(text, "utf-8")
    assert INDEX in refused_export(sharded, out)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path, out: Path) -> None:
    last = find_shards(sharded)[-1]
    change_index(sharded, lambda index: index.update({"model.embed_tokens.weight": last}))
    message = refused_export(sharded, out)
    assert "names tensors that their shards do not hold: model.embed_tokens.weight" in message


def test_a_tensor_stored_in_two_shards_is_refused(sharded: Path, out: Path) -> None:
    first, second, *_ = find_shards(sharded)
    tensors = load_file(sharded / second)
    name = next(iter(load_file(sharded / first)))
    tensors[name] = load_file(sharded / first)[name]
    save_file(tensors, sharded / second)
    message = refused_export(sharded, out)
    assert f"{name} is stored twice, in {first} and {second}; expected each tensor once" == message


def test_a_single_file_beside_a_foreign_index_is_refused(sharded: Path, out: Path) -> None:
    other = write_tiny_checkpoint(sharded.parent / "other", seed=1)
    shutil.copyfile(other / "model.safetensors", sharded / "model.safetensors")
    message = refused_export(sharded, out)
    assert f"holds model.safetensors and an {INDEX} that names other files" in message
    assert "remove the other" in message


def test_an_index_of_the_single_file_is_fine(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    names = load_file(source / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / INDEX).write_text(json.dumps(index), "utf-8")
    export(source, out=tmp_path / "bundle")


def test_the_order_of_shards_and_tensors_does_not_matter(sharded: Path, tmp_path: Path) -> None:
    one = write_tiny_checkpoint(tmp_path / "one")
    tensors = load_file(one / "model.safetensors")
    names = sorted(tensors, key=lambda name: name[::-1])
    for shard in find_shards(sharded):
        (sharded / shard).unlink()
    parts = {"model-z.safetensors": names[::2], "model-a.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, sharded / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    expected = export(one, out=tmp_path / "a").manifest["files"]
    assert export(sharded, out=tmp_path / "b").manifest["files"] == expected
