"""The files of an MLX folder: their layout, how they are streamed, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from qwen2x.exporters import mlx_export, weight_writer
from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.exporter import export
from qwen2x.exporters.mlx_weights import lay_out
from qwen2x.exporters.weights import FLOAT_TYPES
from qwen2x.quantize.scheme import Scheme
from tests.exporters.children import run_child
from tests.exporters.refusal import refused_export
from tests.tiny_checkpoint import random_tensors, write_tiny_checkpoint, write_weights

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 60_000
# Of the tiny checkpoint with a head of its own: counted by hand, layer by layer.
PARAMETERS = 2 * 2048 * 128 + 128 + 2 * (2 * 128 + 256 * 129 + 128 * 128 + 3 * 128 * 256)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "source", is_tied=False, dtype="float32")


@pytest.fixture
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = functools.partial(lay_out, max_shard_bytes=SHARD_BYTES)
    monkeypatch.setattr(mlx_export, "lay_out", limited)


def stored(folder: Path) -> dict[str, NDArray[Any]]:
    """Every tensor, as the safetensors library reads it."""
    shards = sorted(folder.glob("*.safetensors"))
    return {name: values for shard in shards for name, values in load_file(shard).items()}


def modules_of(tensors: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]


# Files


def read_head(path: Path) -> tuple[dict[str, Any], int]:
    """The header by the letter of the format, and where the data begin."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header, 8 + length


@pytest.mark.parametrize(
    "options", [{}, {"bits": 4, "method": "rtn"}, {"bits": 8, "dtype": "float16"}]
)
@pytest.mark.parametrize("vocab_size", [2048, 2017])
def test_a_file_is_a_header_and_its_tensors_without_holes(
    vocab_size: int, options: dict[str, Any], tmp_path: Path
) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    source = write_tiny_checkpoint(tmp_path / "source", vocab_size=vocab_size, is_tied=False)
    path = export(source, "mlx", out=tmp_path / "folder", **options).bundle / "model.safetensors"
    header, begin = read_head(path)
    assert header.pop("__metadata__") == {"format": "mlx"}
    assert begin % 8 == 0
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        size = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}[entry["dtype"]]
        assert start == end, name
        assert stop - start == size * int(np.prod(entry["shape"]))
        # A reader may map the file and look at numbers where they lie.
        assert (begin + start) % size == 0
        end = stop
    assert path.stat().st_size == begin + end
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "mlx"}
        assert sorted(file.keys()) == sorted(header)
    by_mlx = mx.load(str(path))
    for name, values in load_file(path).items():
        assert list(by_mlx[name].shape) == list(values.shape) == header[name]["shape"]
        same_bits = by_mlx[name].view(mx.uint8), mx.array(values.view(np.uint8))
        assert mx.array_equal(*same_bits), name


def check_index(folder: Path) -> dict[str, str]:
    index = json.loads((folder / INDEX).read_text("utf-8"))
    assert index.keys() == {"metadata", "weight_map"}
    weight_map: dict[str, str] = index["weight_map"]
    assert list(weight_map) == sorted(weight_map)
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert weight_map == {name: file for file, tensors in files.items() for name in tensors}
    tensors = stored(folder)
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())
    assert index["metadata"]["total_parameters"] == PARAMETERS
    return weight_map


@pytest.mark.parametrize(
    "options", [{}, {"bits": 4, "method": "rtn"}, {"bits": 8, "group_size": 128}]
)
def test_the_index_names_every_tensor_size_and_parameter(
    options: dict[str, int], source: Path, tmp_path: Path
) -> None:
    folder = export(source, "mlx", out=tmp_path / "folder", **options).bundle
    assert set(check_index(folder).values()) == {"model.safetensors"}


@pytest.mark.parametrize("options", [{}, {"bits": 4, "method": "rtn"}])
def test_shards_keep_to_the_limit_and_codes_stay_with_their_scales(
    options: dict[str, int], source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    one = export(source, "mlx", out=tmp_path / "one", **options).bundle
    request.getfixturevalue("_small_shards")
    many = export(source, "mlx", out=tmp_path / "many", **options).bundle
    weight_map = check_index(many)
    count = len(set(weight_map.values()))
    assert count > 3
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    assert sorted(path.name for path in many.glob("*.safetensors")) == names
    for name in names:
        tensors = load_file(many / name)
        weights = {part.rpartition(".")[0] for part in tensors}
        size = sum(values.nbytes for values in tensors.values())
        assert size <= SHARD_BYTES or len(weights) == 1, name
    for module in modules_of(weight_map):
        assert len({weight_map[f"{module}.{part}"] for part in ("weight", "scales", "biases")}) == 1
    expected = stored(one)
    found = stored(many)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == values.tobytes() for name, values in expected.items())
    assert [name for name in open_bundle(many, verify=True).manifest["files"] if "-of-" in name]


@pytest.mark.parametrize("limit", [1, 1000, 50_000, 10**6, 1 << 40])
def test_whatever_the_limit_every_tensor_has_one_place(limit: int) -> None:
    tensors = {f"m{i}.weight": (8 * i, 64) for i in range(1, 30)} | {"norm.weight": (64,)}
    scheme = Scheme(bits=4, group_size=32)
    layout = lay_out(tensors, FLOAT_TYPES["bfloat16"], lambda _: scheme, limit)
    sizes = dict.fromkeys((file.name for file in layout.files), 0)
    for weight in layout.weights:
        sizes[weight.values.file] += weight.bytes
    assert [file.size - len(file.head) for file in layout.files] == list(sizes.values())
    assert len(layout.weight_map) == 3 * 29 + 1
    assert all(sizes.values())


# Streaming


def files_but_manifest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "qwen2x.json"
    }


@pytest.mark.usefixtures("_small_shards")
@pytest.mark.parametrize(("elements", "cores"), [(1, 2), (4096, 1), (4096, 64), (100_000, 2)])
@pytest.mark.parametrize("options", [{}, {"bits": 4, "method": "rtn", "dtype": "bfloat16"}])
def test_neither_chunks_nor_cores_change_a_byte(
    options: dict[str, Any],
    elements: int,
    cores: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = export(source, "mlx", out=tmp_path / "whole", **options).manifest["files"]
    monkeypatch.setattr(weight_writer, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(weight_writer.os, "cpu_count", lambda: cores)
    again = export(source, "mlx", out=tmp_path / "chunked", **options)
    assert again.manifest["files"] == expected


SMALL_STEPS = f"""
import functools
import qwen2x.exporters.mlx_export as mlx_export
mlx_export.lay_out = functools.partial(mlx_export.lay_out, max_shard_bytes={SHARD_BYTES})
weight_writer.CHUNK_ELEMENTS = 4096
weight_writer._SYNC_BYTES = 1
"""
DIES = {
    "in the middle of the weights": """
run(progress=lambda done, total: die() if done > total / 2 else None)
""",
    "between a chunk's codes and what scales them": """
write = weight_writer._DataFiles.write
calls = []
def write_or_die(self, region, row, values):
    calls.append(1)
    if len(calls) > 200 and len(region.shape) == 2 and region.dtype.kind != "u":
        die()
    write(self, region, row, values)
weight_writer._DataFiles.write = write_or_die
run()
""",
    "before the index is written": """
mlx_export.MlxPlan.write_structure = lambda self, *arguments: die()
run()
""",
}


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    rows = Checkpoint.rows

    def counted(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Any:
        names.append(name)
        return rows(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "rows", counted)
    return names


def drop_a_shard(partial: Path) -> None:
    sorted(partial.glob("*.safetensors"))[1].unlink()


def damage_the_heads(partial: Path) -> None:
    for path in partial.glob("*.safetensors"):
        path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


@pytest.mark.usefixtures("_small_shards")
@pytest.mark.parametrize(
    ("moment", "damage", "goes_on"),
    [
        *((moment, None, True) for moment in DIES),
        ("in the middle of the weights", drop_a_shard, False),
        ("in the middle of the weights", damage_the_heads, True),
    ],
)
def test_an_export_that_was_killed_is_gone_on_with(
    moment: str,
    damage: Callable[[Path], None] | None,
    goes_on: bool,
    source: Path,
    tmp_path: Path,
    rows_read: list[str],
) -> None:
    out = tmp_path / "bundles" / "folder"
    out.parent.mkdir()
    export(source, "mlx", out=tmp_path / "undisturbed", bits=4, method="rtn")
    needed = len(rows_read)
    rows_read.clear()
    killed = run_child(SMALL_STEPS + DIES[moment], source, out, target="mlx", bits=4, method="rtn")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    if damage:
        damage(out.with_name(f".{out.name}.partial"))
    export(source, "mlx", out=out, bits=4, method="rtn")
    assert (len(rows_read) < needed) is goes_on
    assert files_but_manifest(out) == files_but_manifest(tmp_path / "undisturbed")
    open_bundle(out, verify=True)
    assert [path.name for path in out.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("bits", [None, 4])
def test_no_heavy_library_takes_part(bits: int | None, source: Path, tmp_path: Path) -> None:
    program = """
run()
heavy = {"mlx", "mlx_lm", "onnx", "onnxruntime", "torch", "transformers"}
print(json.dumps(sorted(heavy & sys.modules.keys())))
"""
    done = run_child(program, source, tmp_path / "folder", target="mlx", bits=bits)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda"}, "an MLX folder is for every device, got --device cuda; leave it out"),
        ({"device": "cpu", "bits": 4, "method": "rtn"}, "got --device cpu; leave it out"),
        ({"dtype": "int8"}, "no MLX folder for --dtype int8; choose float32 or"),
        (
            {"bits": 4, "method": "rtn", "group_size": 128},
            "group size 128 does not divide the 192 columns",
        ),
        ({"bits": 8, "group_size": 128}, "choose 32 or 64"),
        ({"bits": 3}, "bits must be one of 4, 8, got 3"),
        (
            {"bits": 4, "method": "rtn", "group_size": 16},
            "group size must be one of 32, 64, 128, got 16",
        ),
        ({"max_context": 0}, "must be in 1..512 for this model with --yarn 1, got 0"),
        (
            {"max_context": 513},
            "must be in 1..512 for this model with --yarn 1, got 513",
        ),
        ({"method": "best"}, "method must be auto or rtn"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(
        tmp_path / "source", hidden_size=192, num_attention_heads=6, num_key_value_heads=3
    )
    message = refused_export(source, tmp_path / "new" / "folder", target="mlx", **options)
    assert words in message


def test_an_unknown_target_is_refused(source: Path, tmp_path: Path) -> None:
    message = refused_export(source, tmp_path / "new" / "folder", target="mlxfn")
    assert message == "target must be onnx or mlx, got 'mlxfn'"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("bits", "value", "words"),
    [
        (None, 70_000.0, "holds values beyond float16 (largest 7e+04)"),
        # The codes' far end is beyond float16, though no weight is.
        (4, 60_000.0, "needs biases beyond float16 (largest"),
        (8, -65_504.0, "needs biases beyond float16 (largest"),
        (4, 1e7, "needs scales that float16 cannot hold"),
        (4, 1e-7, "needs scales that float16 cannot hold"),
    ],
)
def test_weights_beyond_float16_are_refused(
    bits: int | None, value: float, words: str, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype="float32")
    config = json.loads((source / "config.json").read_text("utf-8"))
    tensors = random_tensors(config, 0, "float32")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][5, 32:64] = value / 1000
    tensors[name][5, 40] = value
    write_weights(source, tensors)
    out = tmp_path / "new" / "folder"
    message = refused_export(source, out, target="mlx", bits=bits, method="rtn", dtype="float16")
    assert message.startswith(f"{name} {words}")
    assert "choose --dtype bfloat16" in message
