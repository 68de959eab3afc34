"""A bundle appears whole or not at all: killed, resumed, locked, in the place of another."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters import staging, weight_writer
from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.exporter import export
from qwen2x.exporters.staging import KEY_FILE, require_space, stage_folder
from qwen2x.quantize.errors import BundleError
from tests.exporters.children import child, environment, run_child
from tests.exporters.refusal import listing
from tests.tiny_checkpoint import write_tiny_checkpoint

KILLED = -signal.SIGKILL
# Small chunks and a sync after every weight, so that a tiny export has a middle.
SMALL_STEPS = """
weight_writer.CHUNK_ELEMENTS = 4096
weight_writer._SYNC_BYTES = 1
"""
DIES = {
    "in the middle of the weights": """
run(progress=lambda done, total: die() if done > total / 2 else None)
""",
    "in the middle of writing a chunk": """
write = weight_writer._DataFiles.write
calls = []
def write_half(self, region, row, values):
    calls.append(1)
    if len(calls) == 250:
        file = self._opened[region.file]
        file.seek(region.offset + row * region.row_bytes)
        file.write(values.tobytes()[: values.nbytes // 2])
        file.flush()
        die()
    write(self, region, row, values)
weight_writer._DataFiles.write = write_half
run()
""",
    "while the journal grows": """
sync = weight_writer._DataFiles.sync
def sync_and_die(self):
    sync(self)
    if len(self.finished()) == 10:
        self._journal.write("model.layers.1.mlp.gate_up_")
        self._journal.flush()
        die()
weight_writer._DataFiles.sync = sync_and_die
run()
""",
    "while the tokenizer is copied": """
def copy(one, two):
    Path(two).write_bytes(b"half")
    die()
bundle_writer.shutil.copyfile = copy
run()
""",
    "while the manifest is written": """
def write(folder, manifest):
    (folder / ".qwen2x.json.new").write_text("{")
    die()
bundle_writer.write_manifest = write
run()
""",
    "just before the journal goes": """
write = bundle_writer.write_manifest
bundle_writer.write_manifest = lambda folder, manifest: (write(folder, manifest), die())
run()
""",
    "just before the folder gets its name": """
Path.rename = lambda self, target: die()
run()
""",
}
# At these points the weights have not all been noted as written.
WRITES_AGAIN = {"just before the folder gets its name"}


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that exports of this process read, one per chunk."""
    names: list[str] = []
    rows = Checkpoint.rows

    def counted(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Any:
        names.append(name)
        return rows(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "rows", counted)
    return names


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, which holds the time that it took."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "qwen2x.json"
    }


def leave_partial(source: Path, out: Path, **options: Any) -> Path:
    """What a killed export leaves."""
    program = SMALL_STEPS + DIES["in the middle of the weights"]
    assert run_child(program, source, out, **options).returncode == KILLED
    return out.with_name(f".{out.name}.partial")


# Interrupted


@pytest.mark.parametrize("moment", DIES)
def test_an_export_that_was_killed_is_gone_on_with(
    moment: str, source: Path, out: Path, tmp_path: Path, rows_read: list[str]
) -> None:
    export(source, out=tmp_path / "undisturbed", bits=4, method="rtn")
    needed = len(rows_read)
    rows_read.clear()

    killed = run_child(SMALL_STEPS + DIES[moment], source, out, bits=4, method="rtn")
    assert killed.returncode == KILLED, killed.stderr
    assert not out.exists()

    again = export(source, out=out, bits=4, method="rtn")
    if moment in WRITES_AGAIN:
        assert len(rows_read) == needed
    else:
        assert len(rows_read) < needed
    assert hashes(out) == hashes(tmp_path / "undisturbed")
    # The model card is its owner's to write on, and not promised.
    assert set(again.manifest["files"]) == set(hashes(out)) - {"README.md"}
    open_bundle(out, verify=True)
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_a_killed_export_keeps_the_bundle_that_it_was_to_replace(source: Path, out: Path) -> None:
    export(source, out=out)
    before = hashes(out)
    program = SMALL_STEPS + DIES["in the middle of the weights"]
    assert run_child(program, source, out, bits=4, method="rtn", force=True).returncode == KILLED
    assert hashes(out) == before
    open_bundle(out, verify=True)


def test_what_another_command_left_is_thrown_away(
    source: Path, out: Path, tmp_path: Path, rows_read: list[str]
) -> None:
    leave_partial(source, out, bits=8)
    export(source, out=out, bits=4, method="rtn")
    resumed = len(rows_read)
    export(source, out=tmp_path / "undisturbed", bits=4, method="rtn")
    assert resumed == len(rows_read) - resumed
    assert hashes(out) == hashes(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["weights", "config", "time"])
def test_what_was_made_of_another_source_is_thrown_away(
    change: str, source: Path, out: Path, tmp_path: Path, rows_read: list[str]
) -> None:
    leave_partial(source, out, bits=4, method="rtn")
    if change == "weights":
        write_tiny_checkpoint(source, seed=1)
    elif change == "config":
        config = json.loads((source / "config.json").read_text("utf-8"))
        text = json.dumps(config | {"rms_norm_eps": 1e-5})
        (source / "config.json").write_text(text, encoding="utf-8")
    else:
        os.utime(source / "model.safetensors", ns=(0, 12345))
    export(source, out=out, bits=4, method="rtn")
    resumed = len(rows_read)
    export(source, out=tmp_path / "undisturbed", bits=4, method="rtn")
    assert resumed == len(rows_read) - resumed
    assert hashes(out) == hashes(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", ["journal gone", "data cut", "key damaged", "no folder"])
def test_a_damaged_partial_folder_does_no_harm(
    damage: str, source: Path, out: Path, tmp_path: Path
) -> None:
    partial = leave_partial(source, out, bits=4, method="rtn")
    if damage == "journal gone":
        (partial / weight_writer.JOURNAL).unlink()
    elif damage == "data cut":
        os.truncate(partial / "model.onnx_data", 1000)
    elif damage == "key damaged":
        (partial / KEY_FILE).write_bytes(b"\xff\xfe{")
    else:
        shutil.rmtree(partial)
        partial.write_text("a file in its place", encoding="utf-8")
    export(source, out=out, bits=4, method="rtn")
    export(source, out=tmp_path / "undisturbed", bits=4, method="rtn")
    assert hashes(out) == hashes(tmp_path / "undisturbed")


def test_files_that_the_source_has_no_more_do_not_come_back(source: Path, out: Path) -> None:
    partial = leave_partial(source, out, bits=4, method="rtn")
    (partial / "vocab.json").write_text("{}", encoding="utf-8")
    export(source, out=out, bits=4, method="rtn")
    assert not (out / "vocab.json").exists()


def test_ctrl_c_leaves_no_bundle_and_the_next_export_goes_on(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, rows_read: list[str]
) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(weight_writer, "_SYNC_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        export(source, out=out, bits=4, method="rtn", progress=stop)
    assert not out.exists()
    first = set(rows_read)
    rows_read.clear()
    export(source, out=out, bits=4, method="rtn")
    assert first - set(rows_read)
    open_bundle(out, verify=True)


def test_an_error_leaves_neither_bundle_nor_parts_nor_lock(out: Path) -> None:
    def fail() -> None:
        with stage_folder(out / "deep" / "er", {"key": 1}) as folder:
            (folder / "file").write_text("x", encoding="utf-8")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(out.parent.iterdir()) == []


# Two at once


def test_a_second_export_into_the_same_folder_is_refused(source: Path, out: Path) -> None:
    program = """
def wait(done, total):
    if not done:
        print("ready", flush=True)
        sys.stdin.readline()
run(progress=wait)
"""
    with subprocess.Popen(
        child(program, source, out),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(BundleError, match=r"another export is writing .*; wait for it"):
            export(source, out=out)
        with pytest.raises(BundleError, match="another export is writing"):
            export(source, out=out, force=True, bits=4, method="rtn")
        first.communicate("\n", timeout=30)
    assert first.returncode == 0
    assert open_bundle(out, verify=True).scheme == "float"
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_a_lock_file_left_by_a_killed_export_locks_nobody_out(source: Path, out: Path) -> None:
    leave_partial(source, out)
    assert out.with_name(".bundle.lock").exists()
    export(source, out=out)
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


# What is there already


def test_an_existing_folder_is_refused_and_kept(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BundleError, match=r"exists and is not empty; choose .* or add --force"):
        export(source, out=out)
    assert (out / "mine.txt").read_text("utf-8") == "mine"
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_an_empty_folder_is_filled(source: Path, out: Path) -> None:
    out.mkdir()
    export(source, out=out)
    open_bundle(out)


def test_force_replaces_a_bundle_and_leaves_nothing_of_it(source: Path, out: Path) -> None:
    export(source, out=out)
    (out / "note.txt").write_text("old", encoding="utf-8")
    export(source, out=out, bits=4, method="rtn", force=True)
    assert open_bundle(out, verify=True).scheme == "int4-g32"
    assert not (out / "note.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_force_never_deletes_a_tree_of_folders(source: Path, out: Path) -> None:
    (out / "thesis").mkdir(parents=True)
    (out / "thesis" / "chapter.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(BundleError, match="which --force would delete; choose"):
        export(source, out=out, force=True)
    assert (out / "thesis" / "chapter.txt").read_text("utf-8") == "years of work"


@pytest.mark.parametrize("where", ["source", "parent", "blobs"])
def test_force_never_deletes_the_source(where: str, source: Path) -> None:
    before = listing(source)
    reads = source
    if where == "blobs":
        reads = source.parent / "snapshot"
        reads.mkdir()
        for path in source.iterdir():
            (reads / path.name).symlink_to(path)
    target = source.parent if where == "parent" else source
    with pytest.raises(BundleError, match="which --force would delete"):
        export(reads, out=target, force=True)
    assert listing(source) == before


def test_force_never_deletes_a_source_that_lies_in_the_old_bundle(source: Path, out: Path) -> None:
    export(source, out=out)
    inside = out / "checkpoint"
    source.rename(inside)
    before = listing(inside)
    with pytest.raises(BundleError, match=r"holds the checkpoint itself .*; choose another folder"):
        export(inside, out=out, force=True)
    assert listing(inside) == before


def test_a_failed_replacement_gives_the_old_bundle_back(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(source, out=out)
    before = hashes(out)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EACCES, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BundleError, match="no permission to write there"):
        export(source, out=out, bits=4, method="rtn", force=True)
    assert hashes(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_a_file_or_a_link_in_the_place_of_the_bundle_is_refused(source: Path, out: Path) -> None:
    out.write_text("mine", encoding="utf-8")
    for force in (False, True):
        with pytest.raises(BundleError, match="exists and is no folder; choose another name"):
            export(source, out=out, force=force)
    assert out.read_text("utf-8") == "mine"
    out.unlink()
    out.symlink_to(source)
    with pytest.raises(BundleError, match=r"holds the checkpoint itself|is no folder"):
        export(source, out=out, force=True)
    assert out.is_symlink()


def test_a_path_with_dots_and_no_parents_yet_works(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    export(source, out="a/b/../c/bundle")
    open_bundle(out.parent / "a" / "c" / "bundle")
    export(source, out="plain")
    open_bundle(out.parent / "plain")


def test_what_an_interrupted_export_left_counts_as_free(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = leave_partial(source, out)
    left = sum(512 * path.stat().st_blocks for path in partial.iterdir())
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    require_space(out, 1000 + left)
    with pytest.raises(BundleError, match=r"0\.00 GB are free; make room or choose another disk"):
        require_space(out, 1001 + left)
