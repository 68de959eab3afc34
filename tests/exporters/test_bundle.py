"""A bundle's manifest tells the truth, and a bundle that was changed is refused with one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters import bundle as bundle_module
from qwen2x.exporters.bundle import is_bundle, open_bundle, write_manifest
from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import BundleError
from tests.tiny_checkpoint import write_tiny_checkpoint

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    source = write_tiny_checkpoint(root / "source", max_shard_bytes=300_000)
    export(source, out=root / "bundle", bits=4, method="rtn")
    return root / "bundle"


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


@pytest.fixture
def with_large_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, original: Path) -> Path:
    """A bundle whose data file counts as large: only samples of it are hashed on opening."""
    monkeypatch.setattr(bundle_module, "_SMALL", 200_000)
    export(original.parent / "source", out=tmp_path / "large", bits=4, method="rtn")
    return tmp_path / "large"


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "qwen2x.json").read_text("utf-8"))
    return manifest


def change_manifest(folder: Path, change: Change) -> None:
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "qwen2x.json").write_text(json.dumps(manifest), "utf-8")


def refusal(folder: Path, *, verify: bool = False) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder, verify=verify)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What it says


def test_the_manifest_lists_every_file_with_its_true_size_and_hash(original: Path) -> None:
    files = manifest_of(original)["files"]
    # The model card is its owner's to write on, and not promised.
    unlisted = {"qwen2x.json", "README.md"}
    assert set(files) == {path.name for path in original.iterdir()} - unlisted
    for name, entry in files.items():
        data = (original / name).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_the_manifest_names_its_source_with_true_hashes(original: Path) -> None:
    source = original.parent / "source"
    stated = manifest_of(original)["source"]
    assert stated["id"] == "source"
    names = {"config.json", *(path.name for path in source.glob("*.safetensors"))}
    assert stated["sha256"] == {
        name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in names
    }


def test_the_manifest_holds_what_the_contract_promises(original: Path) -> None:
    manifest = manifest_of(original)
    assert manifest["format_version"] == 1
    promised = {
        "target", "device", "source", "config", "scheme", "method", "bits_per_weight", "rope",
        "inputs", "outputs", "cache", "eos_token_ids", "files", "quality", "versions",
    }  # fmt: skip
    assert promised <= set(manifest)
    assert {
        "theta", "factors", "original_max_position_embeddings", "attention_factors", "max_context",
    } <= set(manifest["rope"])  # fmt: skip
    assert manifest["cache"] == {
        "layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "dtype": "float32",
        "layout": "shared",
    }
    assert manifest["config"] == json.loads(
        (original.parent / "source" / "config.json").read_text("utf-8")
    )
    assert manifest["eos_token_ids"] == [2015, 2013]
    assert manifest["inputs"][:3] == ["input_ids", "attention_mask", "position_ids"]
    assert manifest["optional_inputs"] == ["num_logits_to_keep"]
    assert manifest["outputs"][0] == "logits"


@pytest.mark.parametrize(
    "options", [{}, {"bits": 4, "method": "rtn"}, {"bits": 8, "group_size": 64}]
)
@pytest.mark.parametrize("is_tied", [True, False])
def test_bits_per_weight_count_every_stored_byte_of_the_matrices(
    is_tied: bool, options: dict[str, int], tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", is_tied=is_tied)
    manifest = export(source, out=tmp_path / "bundle", **options).manifest
    # Norms and biases are the only vectors: 2 layers of 2 norms and 256 biases, and the last norm.
    vectors = 2 * (2 * 128 + 256) + 128
    matrices = manifest["parameters"] - vectors
    stored = manifest["weight_bytes"] - 4 * vectors
    assert manifest["bits_per_weight"] == pytest.approx(8 * stored / matrices, abs=1e-4)
    assert manifest["weight_bytes"] <= (tmp_path / "bundle" / "model.onnx_data").stat().st_size
    parts = manifest["by_kind"]
    assert sum(part["bytes"] for part in parts.values()) == manifest["weight_bytes"]
    assert sum(part["parameters"] for part in parts.values()) == manifest["parameters"]


def test_two_exports_of_one_source_are_byte_for_byte_the_same(
    original: Path, tmp_path: Path
) -> None:
    export(original.parent / "source", out=tmp_path / "again", bits=4, method="rtn")
    assert manifest_of(tmp_path / "again")["files"] == manifest_of(original)["files"]


def test_companion_files_are_those_of_the_source(original: Path) -> None:
    source = original.parent / "source"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (original / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((original / "config.json").read_text("utf-8")) == json.loads(
        (source / "config.json").read_text("utf-8")
    )


def test_an_untouched_bundle_opens_and_says_what_it_is(bundle: Path) -> None:
    assert is_bundle(bundle)
    opened = open_bundle(bundle, verify=True)
    assert (opened.target, opened.device, opened.dtype) == ("onnx", "cpu", "float32")
    assert opened.scheme == "int4-g32"
    assert opened.max_context == 512
    assert opened.vocab_size == 2048


def test_recording_quality_keeps_the_bundle_valid(bundle: Path) -> None:
    write_manifest(bundle, manifest_of(bundle) | {"quality": {"verdict": "pass"}})
    assert open_bundle(bundle, verify=True).manifest["quality"] == {"verdict": "pass"}
    assert not list(bundle.glob(".*"))


def test_files_of_the_user_beside_those_of_the_bundle_do_no_harm(bundle: Path) -> None:
    (bundle / "README.md").write_text("mine", encoding="utf-8")
    open_bundle(bundle, verify=True)


# What is refused


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    message = refusal(tmp_path)
    assert message == (
        f"{tmp_path} is no bundle (it has no qwen2x.json); make one with qwen2x export"
    )
    assert "is no bundle" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    assert refusal(bundle) == f"{bundle / name} is missing; export the bundle again"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named_with_both_sizes(
    name: str, change: int, bundle: Path
) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size + change)
    assert refusal(bundle) == (
        f"{bundle / name} has {size + change} bytes, expected {size}; export the bundle again"
    )


def test_a_single_changed_bit_in_a_small_file_is_noticed_at_once(bundle: Path) -> None:
    for name in ("model.onnx_data", "tokenizer.json"):
        flip_bit(bundle / name, at=12_345)
        expected = f"{bundle / name} is not the file that was exported; export the bundle again"
        assert refusal(bundle) == expected
        flip_bit(bundle / name, at=12_345)
    open_bundle(bundle)


def flip_bit(path: Path, *, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_large_file_swapped_for_one_of_its_size_is_noticed_at_once(
    with_large_files: Path, original: Path, tmp_path: Path
) -> None:
    assert "sample_sha256" in manifest_of(with_large_files)["files"]["model.onnx_data"]
    open_bundle(with_large_files, verify=True)
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    export(other, out=tmp_path / "other-bundle", bits=4, method="rtn")
    shutil.copyfile(
        tmp_path / "other-bundle" / "model.onnx_data", with_large_files / "model.onnx_data"
    )
    assert "model.onnx_data is not the file that was exported" in refusal(with_large_files)


def test_a_single_changed_bit_in_a_large_file_is_noticed_with_verify(
    with_large_files: Path,
) -> None:
    flip_bit(with_large_files / "model.onnx_data", at=30_000)
    open_bundle(with_large_files)
    assert "is not the file that was exported" in refusal(with_large_files, verify=True)


def test_a_large_file_without_its_sample_hash_is_refused(with_large_files: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        del manifest["files"]["model.onnx_data"]["sample_sha256"]

    change_manifest(with_large_files, change)
    assert "is not the file that was exported" in refusal(with_large_files)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file", "..", ".", ""])
def test_a_path_that_leaves_the_folder_is_refused(name: str, bundle: Path) -> None:
    (bundle.parent / "secret").write_text("x", encoding="utf-8")
    change_manifest(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    message = refusal(bundle)
    assert message == f"{bundle / 'qwen2x.json'} names {name!r}, which lies outside the bundle"


@pytest.mark.parametrize("name", ["model.onnx_data", "model.onnx", "qwen2x.json"])
def test_a_link_in_the_place_of_a_file_is_refused(name: str, bundle: Path) -> None:
    (bundle / name).rename(bundle.parent / "elsewhere")
    (bundle / name).symlink_to(bundle.parent / "elsewhere")
    message = refusal(bundle)
    assert message == (
        f"{bundle / name} is a link; a bundle's files must lie in it: copy the file there"
    )


def test_a_folder_in_the_place_of_a_file_is_refused(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").mkdir()
    assert "tokenizer.json is missing" in refusal(bundle)


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_version_is_refused_with_both_versions(version: Any, bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest.update({"format_version": version}))
    message = refusal(bundle)
    assert message == (
        f"{bundle} has format version {version}, expected 1; export it again with this qwen2x"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "{}", "\x00\xff", "[" * 100_000, '{"files": {}}']
)
def test_a_damaged_manifest_is_refused(text: str, bundle: Path) -> None:
    (bundle / "qwen2x.json").write_bytes(text.encode("latin-1"))
    message = refusal(bundle)
    assert message.startswith(f"{bundle / 'qwen2x.json'} is damaged (")
    assert message.endswith("); export the bundle again")


KEYS = ["target", "device", "dtype", "scheme", "config", "rope", "cache", "files", "eos_token_ids"]
STRUCTURED = ["target", "config", "rope", "cache", "files", "eos_token_ids"]


@pytest.mark.parametrize("key", KEYS)
def test_a_manifest_that_lacks_something_is_refused_at_once(key: str, bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest.pop(key))
    assert "is damaged (" in refusal(bundle)


@pytest.mark.parametrize("key", STRUCTURED)
def test_a_manifest_with_null_for_something_is_refused_at_once(key: str, bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest.update({key: None}))
    assert "is damaged (" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_manifest_that_does_not_vouch_for_the_model_is_refused(name: str, bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest["files"].pop(name))
    assert f"is damaged (KeyError('{name}'))" in refusal(bundle)


@pytest.mark.parametrize("entry", [None, [], {}, {"bytes": 5}, {"bytes": "x", "sha256": "y"}])
def test_a_damaged_entry_of_a_file_is_refused(entry: Any, bundle: Path) -> None:
    change_manifest(bundle, lambda manifest: manifest["files"].update({"model.onnx": entry}))
    assert "is damaged (" in refusal(bundle)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"eos_token_ids": "ab"}, "eos_token_ids is 'ab'"),
        ({"cache": {}}, "layers"),
        ({"rope": {"max_context": 1 << 40}}, "max_context"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "bundle"
    export(write_tiny_checkpoint(tmp_path / "source", num_hidden_layers=1), out=folder)
    manifest = json.loads((folder / "qwen2x.json").read_text("utf-8"))
    (folder / "qwen2x.json").write_text(json.dumps(manifest | changes), "utf-8")
    with pytest.raises(BundleError, match="is damaged") as refused:
        open_bundle(folder)
    assert said in str(refused.value)


def test_a_linked_companion_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    export(write_tiny_checkpoint(tmp_path / "source", num_hidden_layers=1), out=folder)
    (tmp_path / "evil").write_text("{{ 1 }}", "utf-8")
    (folder / "special.jinja").symlink_to(tmp_path / "evil")
    with pytest.raises(BundleError, match="is a link"):
        open_bundle(folder)
