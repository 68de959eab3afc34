"""A MODEL that is a SOURCE is exported once, and again only when something of it changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.bundle_cache import cached_bundle
from qwen2x.exporters.cache_folder import cache_folder
from qwen2x.exporters.options import Options
from qwen2x.quantize.errors import InputError
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN2X_CACHE", str(tmp_path / "cache"))
    return write_tiny_checkpoint(tmp_path / "source")


def test_the_same_source_and_options_are_exported_once(source: Path) -> None:
    first = cached_bundle(source, Options(bits=4, method="rtn"))
    before = (first / "model.onnx_data").stat().st_mtime_ns
    assert cached_bundle(source, Options(bits=4, method="rtn")) == first
    assert (first / "model.onnx_data").stat().st_mtime_ns == before
    assert first.is_relative_to(cache_folder())
    assert open_bundle(first, verify=True).scheme == "int4-g32"


def test_every_option_has_a_bundle_of_its_own(source: Path) -> None:
    options = [
        Options(),
        Options(bits=4, method="rtn"),
        Options(bits=8),
        Options(bits=4, method="rtn", group_size=64),
        Options(max_context=64),
        Options(device="cuda", dtype="float16"),
    ]
    assert len({cached_bundle(source, item) for item in options}) == len(options)


def test_a_copy_of_the_source_finds_the_same_content(source: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "elsewhere" / "source")
    assert cached_bundle(other, Options()) == cached_bundle(source, Options())


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_a_changed_file_makes_a_new_bundle(name: str, source: Path) -> None:
    first = cached_bundle(source, Options())
    with (source / name).open("a", encoding="utf-8") as file:
        file.write("\n")
    second = cached_bundle(source, Options())
    assert second != first
    if name != "config.json":  # written anew, in our own layout
        assert (second / name).read_bytes() == (source / name).read_bytes()


def test_changed_weights_make_a_new_bundle(source: Path) -> None:
    first = cached_bundle(source, Options())
    write_tiny_checkpoint(source, seed=1)
    assert cached_bundle(source, Options()) != first


def test_damaged_notes_about_hashes_do_no_harm(source: Path) -> None:
    first = cached_bundle(source, Options())
    for text in ("", "{", "[]", "null"):
        (cache_folder() / "hashes.json").write_text(text, encoding="utf-8")
        assert cached_bundle(source, Options()) == first


def test_a_failed_export_leaves_no_bundle_in_the_cache(source: Path) -> None:
    with pytest.raises(InputError):
        cached_bundle(source, Options(bits=3))
    assert not (cache_folder() / "bundles").exists()


def test_a_cache_that_cannot_be_made_is_refused_with_its_place(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = source / "config.json" / "cache"
    monkeypatch.setenv("QWEN2X_CACHE", str(blocked))
    with pytest.raises(InputError, match=f"cannot write {blocked}.*a part of that path is a file"):
        cached_bundle(source, Options())


def test_the_cache_follows_the_users_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN2X_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "xdg")
    assert cache_folder() == Path("/xdg/qwen2x")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/srv/somebody")
    assert cache_folder() == Path("/srv/somebody/.cache/qwen2x")


def test_a_damaged_bundle_in_the_cache_is_made_again(source: Path) -> None:
    folder = cached_bundle(source, Options())
    (folder / "model.onnx").write_bytes(b"cut")
    assert cached_bundle(source, Options()) == folder
    open_bundle(folder, verify=True)
    assert [path.name for path in cache_folder().iterdir() if path.suffix == ".lock"] == []
