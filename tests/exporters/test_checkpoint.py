"""Checkpoints are read as safetensors reads them; damaged and unfit ones are refused by name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from qwen2x.exporters.checkpoint import INDEX, open_checkpoint
from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import CheckpointError
from tests.exporters.refusal import refused_export
from tests.tiny_checkpoint import write_tiny_checkpoint

SHARDED = 300_000
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[dict[str, Any]], object]
CUTTABLE = pytest.mark.skipif(os.name == "nt", reason="Windows cuts no file that is mapped")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "bundle"


def change_tensors(source: Path, change: Change) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_header(source: Path, change: Change) -> None:
    """Rewrites the JSON header of the only file; the data stays as it is."""
    path = source / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# What is read


@pytest.mark.parametrize("max_shard_bytes", [None, SHARDED])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_is_read_as_the_safetensors_library_reads_it(
    dtype: str, max_shard_bytes: int | None, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(
        tmp_path / "source", dtype=dtype, max_shard_bytes=max_shard_bytes, is_tied=False
    )
    theirs = {}
    for path in source.glob("*.safetensors"):
        theirs |= {name: value.float().numpy() for name, value in load_torch(path).items()}
    with open_checkpoint(source) as checkpoint:
        assert set(checkpoint.tensors) == set(theirs)
        for name, expected in theirs.items():
            np.testing.assert_array_equal(checkpoint.rows(name), expected)
            part = checkpoint.rows(name, 3, 11)
            assert part.dtype == np.float32
            np.testing.assert_array_equal(part, expected[3:11])
        assert checkpoint.bytes == sum(
            value.size * (4 if dtype == "float32" else 2) for value in theirs.values()
        )


def test_subnormal_and_extreme_numbers_survive_the_reading(source: Path) -> None:
    bits = np.array([0x0001, 0x8001, 0x007F, 0x7F7F, 0xFF7F, 0x8000, 0x3F80, 0x0080], np.uint16)
    change_tensors(
        source, lambda t: t[Q_PROJ].reshape(-1)[:8].__setitem__(..., bits.view(bfloat16))
    )
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    with open_checkpoint(source) as checkpoint:
        row = checkpoint.rows(Q_PROJ, 0, 1)[0, :8]
    np.testing.assert_array_equal(row.view(np.uint32), expected.view(np.uint32))


def test_finite_weights_whose_sum_overflows_are_no_infinity(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype="float32")
    change_tensors(source, lambda tensors: tensors[Q_PROJ].fill(3e38))
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.rows(Q_PROJ).max() == np.float32(3e38)


def test_a_stored_head_that_equals_the_tied_embedding_is_no_obstacle(
    source: Path, tmp_path: Path
) -> None:
    key = "model.embed_tokens.weight"
    change_tensors(source, lambda tensors: tensors.update({"lm_head.weight": tensors[key].copy()}))
    export(source, out=tmp_path / "bundle")


def test_shards_of_the_hubs_cache_are_links_and_are_followed(tmp_path: Path) -> None:
    real = write_tiny_checkpoint(tmp_path / "real", max_shard_bytes=SHARDED)
    plain = export(real, out=tmp_path / "plain")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(real.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    linked = export(snapshot, out=tmp_path / "linked")
    assert linked.manifest["files"] == plain.manifest["files"]
    assert linked.manifest["source"]["sha256"] == plain.manifest["source"]["sha256"]
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())


def test_a_missing_tokenizer_is_fine_for_an_export(source: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    export(source, out=tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "tokenizer.json").exists()


def test_a_vocabulary_padded_beyond_the_tokenizer_is_fine(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", vocab_size=2112)
    assert export(source, out=tmp_path / "bundle").manifest["config"]["vocab_size"] == 2112


def test_tensors_at_odd_offsets_are_read(source: Path) -> None:
    names = (Q_PROJ, "model.norm.weight")
    with open_checkpoint(source) as checkpoint:
        expected = [checkpoint.rows(name) for name in names]
        parity = checkpoint.tensors[Q_PROJ].offset % 2
    # JSON may be followed by spaces.
    path = source / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    path.write_bytes(
        struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :]
    )
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.tensors[Q_PROJ].offset % 2 != parity
        for name, values in zip(names, expected, strict=True):
            np.testing.assert_array_equal(checkpoint.rows(name), values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_belong_to_the_caller(dtype: str, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype=dtype)
    before = (source / "model.safetensors").read_bytes()
    with open_checkpoint(source) as checkpoint:
        first = checkpoint.rows(Q_PROJ)
        first += 1
        np.testing.assert_array_equal(checkpoint.rows(Q_PROJ) + 1, first)
    assert np.isfinite(first).all()
    assert (source / "model.safetensors").read_bytes() == before


def test_many_threads_read_the_same_as_one(source: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        chunks = [
            (name, row) for name, t in checkpoint.tensors.items() for row in range(t.shape[0])
        ]
        alone = [checkpoint.rows(name, row, row + 1) for name, row in chunks]
        with ThreadPoolExecutor(8) as pool:
            together = pool.map(lambda chunk: checkpoint.rows(*chunk, chunk[1] + 1), chunks)
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other)


def test_reading_stops_with_an_error_while_the_checkpoint_stays_usable(source: Path) -> None:
    change_tensors(source, lambda tensors: tensors[Q_PROJ].__setitem__((0, 0), np.nan))
    with open_checkpoint(source) as checkpoint:
        with pytest.raises(CheckpointError):
            checkpoint.rows(Q_PROJ)
        assert np.isfinite(checkpoint.rows(Q_PROJ, 1, 2)).all()


@CUTTABLE
@pytest.mark.parametrize("kept", [0, 1000])
def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(
    kept: int, source: Path
) -> None:
    with open_checkpoint(source) as checkpoint:
        os.truncate(source / "model.safetensors", checkpoint.tensors[Q_PROJ].offset + kept)
        with pytest.raises(CheckpointError, match=f"{Q_PROJ} ends after {kept} of 32768 bytes"):
            checkpoint.rows(Q_PROJ)


@CUTTABLE
def test_a_file_that_is_emptied_while_it_is_read_is_an_error_and_no_crash(source: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        os.truncate(source / "model.safetensors", 0)
        with pytest.raises(CheckpointError, match=f"{Q_PROJ} ends after 0 of 32768 bytes"):
            checkpoint.rows(Q_PROJ)


# What is refused: each leaves nothing behind


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, out: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", vocab_size=2015)
    (source / "generation_config.json").write_text('{"eos_token_id": 2013}', "utf-8")
    message = refused_export(source, out)
    assert "<|im_end|>" in message
    assert "id 2015" in message
    assert "vocab_size 2015" in message
    assert "use the tokenizer that belongs" in message


@pytest.mark.parametrize("text", ['{"model": {}}', '{"model": {"vocab": []}}', "{"])
def test_a_damaged_tokenizer_is_refused(text: str, source: Path, out: Path) -> None:
    (source / "tokenizer.json").write_text(text, "utf-8")
    assert "tokenizer.json" in refused_export(source, out)


def test_missing_surplus_and_misshaped_tensors_come_in_one_message(source: Path, out: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((1, 1), np.float32)
        tensors[Q_PROJ] = np.zeros((128, 64), np.float32)

    change_tensors(source, change)
    message = refused_export(source, out)
    assert "the weights do not fit config.json" in message
    assert "2 missing: model.layers.1.self_attn.k_proj.bias, model.norm.weight" in message
    assert "1 surplus: model.layers.2.mlp.up_proj.weight" in message
    assert f"1 misshaped: {Q_PROJ} is [128, 64], expected [128, 128]" in message


def test_a_long_list_of_missing_tensors_is_cut(tmp_path: Path, out: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}), "utf-8")
    message = refused_export(source, out)
    assert "36 missing" in message
    assert "and 24 more" in message


def test_an_untied_model_without_head_is_told_about_tying(tmp_path: Path, out: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text("utf-8"))
    text = json.dumps(config | {"tie_word_embeddings": False})
    (source / "config.json").write_text(text, "utf-8")
    message = refused_export(source, out)
    assert "1 missing: lm_head.weight; set tie_word_embeddings to true" in message


def test_a_tied_model_with_a_different_head_is_refused(source: Path, out: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        head = tensors["model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        tensors["lm_head.weight"] = head

    change_tensors(source, change)
    message = refused_export(source, out)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "set tie_word_embeddings to false" in message


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.bool_])
def test_weights_that_are_no_small_floats_are_refused(dtype: Any, source: Path, out: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(dtype)}))
    message = refused_export(source, out)
    names = {np.int8: "I8", np.float64: "F64", np.bool_: "BOOL"}
    assert f"{Q_PROJ} in model.safetensors has dtype {names[dtype]}" in message
    assert "expected F32, F16, BF16" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.1.mlp.down_proj.weight"])
def test_the_tensor_that_holds_nan_or_infinity_is_named(
    name: str, bits: int | None, value: float, source: Path, out: Path
) -> None:
    change_tensors(source, lambda tensors: tensors[name].__setitem__((100, 7), value))
    message = refused_export(source, out, bits=bits, method="rtn")
    assert message.startswith(f"{name} holds NaN or infinity (rows 0..127, model.safetensors)")
    assert "expected finite weights: fetch the checkpoint again" in message


def test_numbers_beyond_float16_name_their_tensor_and_the_way_out(source: Path, out: Path) -> None:
    change_tensors(source, lambda tensors: tensors[Q_PROJ].__setitem__((1, 2), -70000.0))
    message = refused_export(source, out, device="cuda", dtype="float16")
    assert message == (
        f"{Q_PROJ} holds values beyond float16 (largest 7.014e+04); "
        "choose --dtype bfloat16 or float32"
    )
    export(source, out=out, device="cuda", dtype="bfloat16")


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(
    tmp_path: Path, out: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", hidden_size=96)
    message = refused_export(source, out, bits=4, method="rtn", group_size=128)
    assert message == (
        "group size 128 does not divide the 96 columns of model.embed_tokens; choose 32"
    )
    source = write_tiny_checkpoint(tmp_path / "odd", hidden_size=80, head_dim=32)
    assert "export it without --bits" in refused_export(source, out, bits=4, method="rtn")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "bits must be one of 4, 8, got 3"),
        ({"bits": 0}, "bits must be one of 4, 8, got 0"),
        (
            {"bits": 4, "method": "rtn", "group_size": 16},
            "group size must be one of 32, 64, 128, got 16",
        ),
        ({"method": "awq"}, "got 'awq'"),
        (
            {"max_context": 513},
            "must be in 1..512 for this model with --yarn 1, got 513",
        ),
        ({"max_context": 0}, "must be in 1..512 for this model with --yarn 1, got 0"),
        ({"dtype": "float16"}, "choose --dtype float32"),
        ({"device": "npu"}, "choose --device cpu or cuda"),
        (
            {"device": "cuda", "dtype": "float32", "bits": 4, "method": "rtn"},
            "choose --dtype bfloat16 or float16",
        ),
        ({"target": "gguf"}, "got 'gguf'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], words: str, source: Path, out: Path
) -> None:
    assert words in refused_export(source, out, **options)


# Damaged files


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 200_000])
def test_a_cut_file_is_refused(kept: int, source: Path, out: Path) -> None:
    os.truncate(source / "model.safetensors", kept)
    message = refused_export(source, out)
    assert message.startswith("model.safetensors is not an intact safetensors file (")
    assert f"it has {kept} bytes: fetch it again" in message


def test_a_file_that_goes_on_after_its_tensors_is_refused(source: Path, out: Path) -> None:
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 16)
    assert "is not an intact safetensors file" in refused_export(source, out)


@pytest.mark.parametrize("length", [1 << 20, 1 << 40, (1 << 64) - 1, 0, 3])
def test_an_absurd_header_length_is_refused(length: int, source: Path, out: Path) -> None:
    with (source / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", length))
    assert "is not an intact safetensors file" in refused_export(source, out)


def test_overlapping_tensors_are_refused(source: Path, out: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        name = "model.layers.0.self_attn.v_proj.weight"
        other = "model.layers.0.self_attn.k_proj.weight"
        header[name]["data_offsets"] = header[other]["data_offsets"]

    change_header(source, change)
    assert "is not an intact safetensors file" in refused_export(source, out)


@pytest.mark.parametrize("offsets", [[0, 1 << 40], [-8, 8], [1 << 62, (1 << 62) + 32768]])
def test_a_header_that_claims_more_than_the_file_holds_is_refused(
    offsets: list[int], source: Path, out: Path
) -> None:
    change_header(source, lambda header: header[Q_PROJ].update({"data_offsets": offsets}))
    assert "is not an intact safetensors file" in refused_export(source, out)


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 40], [-128, 128], [128, 129], []])
def test_a_header_whose_shape_is_not_its_bytes_is_refused(
    shape: list[int], source: Path, out: Path
) -> None:
    change_header(source, lambda header: header[Q_PROJ].update({"shape": shape}))
    assert "is not an intact safetensors file" in refused_export(source, out)


def test_a_header_with_the_same_name_twice_is_refused(source: Path, out: Path) -> None:
    path = source / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = json.dumps({Q_PROJ: header[Q_PROJ]})[1:-1]
    text = json.dumps(header)[:-1] + ", " + entry + "}"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])
    message = refused_export(source, out)
    assert "is not an intact safetensors file" in message
    assert Q_PROJ in message


def test_a_name_with_a_line_break_stays_on_one_line(source: Path, out: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({"a\nb": np.zeros(1, np.float32)}))
    assert r"1 surplus: 'a\nb'" in refused_export(source, out)


def test_a_file_that_is_a_pickle_inside_is_refused(source: Path, out: Path) -> None:
    (source / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 100)
    assert "is not an intact safetensors file" in refused_export(source, out)


def test_pickle_weights_are_refused_unopened(source: Path, out: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02")
    message = refused_export(source, out)
    assert "pytorch_model.bin" in message
    assert "can run code when opened" in message
    assert "expected safetensors: convert them" in message


def test_a_folder_without_weights_is_refused(source: Path, out: Path) -> None:
    (source / "model.safetensors").unlink()
    assert f"has no weights; expected model.safetensors or {INDEX}" in refused_export(source, out)
