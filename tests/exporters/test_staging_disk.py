"""A bundle appears whole or not at all: on a full, a small or a forbidden disk."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters import weight_writer
from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import BundleError, InputError
from tests.exporters.children import FILLS_THE_DISK, can_mount, run_child
from tests.exporters.refusal import listing, refused_export
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture
def _disk(tmp_path: Path) -> None:
    if not can_mount(tmp_path / "mounted"):
        pytest.skip("this user may not mount a disk")


@pytest.mark.usefixtures("_disk")
@pytest.mark.parametrize("bits", [None, 4])
def test_a_disk_that_is_really_full_leaves_nothing_behind(
    bits: int | None, source: Path, out: Path
) -> None:
    done = run_child(FILLS_THE_DISK, source, out, on_disk="size=256k", bits=bits)
    assert done.returncode == 0, done.stderr
    message, left = json.loads(done.stdout)
    assert message == f"cannot write {out}: the disk is full; make room or choose another disk"
    assert left == []


@pytest.mark.usefixtures("_disk")
def test_too_little_room_is_told_before_anything_is_written(source: Path, out: Path) -> None:
    program = """
try:
    run()
except InputError as error:
    print(json.dumps([str(error), os.listdir(Path(out).parent)]))
"""
    done = run_child(program, source, out, on_disk="size=256k")
    message, left = json.loads(done.stdout)
    assert message.startswith(f"{out} needs 0.00 GB, 0.00 GB are free; make room")
    assert left == []


@pytest.mark.usefixtures("_disk")
def test_a_read_only_disk_is_refused(source: Path, out: Path) -> None:
    program = """
try:
    run()
except InputError as error:
    print(str(error))
"""
    done = run_child(program, source, out, on_disk="ro")
    assert done.stdout.strip() == (
        f"cannot write {out}: that disk is read-only; choose another folder"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full; make room or choose another disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "no permission to write there; choose another folder"),
        (errno.EROFS, "that disk is read-only"),
    ],
)
@pytest.mark.parametrize("call", [1, 20])
def test_a_refused_write_leaves_nothing_behind(
    call: int, code: int, words: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    write = weight_writer._DataFiles.write

    def refuse(self: Any, region: Any, row: int, values: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(code, os.strerror(code))
        write(self, region, row, values)

    monkeypatch.setattr(weight_writer._DataFiles, "write", refuse)
    assert words in refused_export(source, tmp_path / "new" / "bundle")


def test_an_error_that_is_our_fault_keeps_its_own_type_and_leaves_nothing(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(weight_writer._DataFiles, "write", fail)
    with pytest.raises(OSError, match="input/output error") as caught:
        export(source, out=out)
    assert not isinstance(caught.value, BundleError)
    assert list(out.parent.iterdir()) == []


def test_a_file_on_the_way_to_the_bundle_is_refused(source: Path, out: Path) -> None:
    out.write_text("mine", encoding="utf-8")
    for below in (out / "bundle", out / "deep" / "er"):
        with pytest.raises(BundleError, match="a part of that path is a file; choose another"):
            export(source, out=below)


def test_a_name_that_is_too_long_is_refused(source: Path, out: Path) -> None:
    with pytest.raises(BundleError, match="that name is too long; choose a shorter one"):
        export(source, out=out.with_name("x" * 250))
    assert list(out.parent.iterdir()) == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's own is root's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def nobody(open_folder: Path) -> Iterator[Callable[[], None]]:
    """A switch that takes root's powers from this process for the rest of the test."""
    is_root = os.geteuid() == 0
    yield lambda: os.seteuid(65534) if is_root else None
    if is_root:
        os.seteuid(0)
    for path in (open_folder, *open_folder.iterdir()):
        os.chmod(path, 0o755)


def make_readable(source: Path) -> None:
    """For everybody, and writable for nobody; safetensors gives its files to their owner alone."""
    for path in source.iterdir():
        os.chmod(path, 0o444)
    os.chmod(source, 0o555)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_folder_without_permission_is_refused(
    nobody: Callable[[], None], open_folder: Path
) -> None:
    source = write_tiny_checkpoint(open_folder / "source")
    make_readable(source)
    locked, closed = open_folder / "locked", open_folder / "closed"
    locked.mkdir(mode=0o555)
    closed.mkdir(mode=0o000)
    nobody()
    for out in (locked / "bundle", locked / "deep" / "er", closed / "bundle"):
        with pytest.raises(BundleError, match=f"cannot write {out}: no permission to write there"):
            export(source, out=out)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_source_that_may_only_be_read_is_exported(
    nobody: Callable[[], None], open_folder: Path
) -> None:
    source = write_tiny_checkpoint(open_folder / "source")
    free = open_folder / "free"
    free.mkdir()
    os.chmod(free, 0o777)
    make_readable(source)
    before = listing(source)
    nobody()
    with pytest.raises(PermissionError):
        (source / "probe").touch()
    export(source, out=free / "bundle", bits=4, method="rtn")
    open_bundle(free / "bundle", verify=True)
    assert listing(source) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_weights_that_may_not_be_read_are_refused_as_such(
    nobody: Callable[[], None], open_folder: Path
) -> None:
    source = write_tiny_checkpoint(open_folder / "source")
    make_readable(source)
    os.chmod(source / "model.safetensors", 0o000)
    nobody()
    with pytest.raises(
        InputError, match=r"model\.safetensors cannot be read \(Permission denied\)"
    ):
        export(source, out=open_folder / "bundle")
