"""A folder that appears whole or not at all: written beside its place, locked, resumed, renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from qwen2x.quantize.errors import BundleError

KEY_FILE = "export-key.json"


@contextmanager
def stage_folder(out: Path, key: Mapping[str, Any], *, force: bool = False) -> Iterator[Path]:
    """Yields a folder to fill; on success it becomes ``out``.

    What an interrupted run with the same key left is handed out again, so that the caller can go
    on; anything else that was left is removed. An error removes the folder, Ctrl-C keeps it.

    Raises:
        BundleError: ``out`` exists, another export is writing it, no permission, disk full.
    """
    out = out.absolute()
    _require_absent(out, force)
    staging = out.with_name(f".{out.name}.partial")
    lock_path = out.with_name(f".{out.name}.lock")
    with _turn_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BundleError(
                f"another export is writing {out}; wait for it or choose another folder"
            ) from None
        try:
            _open_staging(staging, key)
            yield staging
            _publish(staging, out, force)
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            lock_path.unlink(missing_ok=True)
            lock.release()


def require_space(folder: Path, needed: int) -> None:
    """Raises BundleError when the disk of a (future) folder has less than ``needed`` bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BundleError(
            f"{folder} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room or choose another disk"
        )


def _require_absent(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise BundleError(f"{out} exists and is no folder; choose another name")
    if not force and any(out.iterdir()):
        raise BundleError(f"{out} exists and is not empty; choose another folder or add --force")


def _open_staging(staging: Path, key: Mapping[str, Any]) -> None:
    wanted = json.dumps(key, sort_keys=True)
    key_file = staging / KEY_FILE
    if key_file.is_file() and key_file.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    key_file.write_text(wanted, encoding="utf-8")


def _publish(staging: Path, out: Path, force: bool) -> None:
    (staging / KEY_FILE).unlink()
    for path in staging.iterdir():
        sync_path(path)
    sync_path(staging)
    replaced = out.with_name(f".{out.name}.replaced")
    if out.exists() and force:
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    elif out.exists():
        out.rmdir()
    staging.rename(out)
    sync_path(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_path(path: Path) -> None:
    """Brings a file, or a folder's entries, to disk; Windows cannot sync folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _turn_os_errors(out: Path) -> Iterator[None]:
    """The disk's refusals in one line; they are the user's to solve, not a fault of ours."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; make room or choose another disk",
            errno.EDQUOT: "the disk quota is used up; make room or choose another disk",
            errno.EACCES: "no permission to write there; choose another folder",
            errno.EPERM: "no permission to write there; choose another folder",
            errno.EROFS: "that disk is read-only; choose another folder",
            errno.ENOTDIR: "a part of that path is a file; choose another folder",
            errno.ENAMETOOLONG: "that name is too long; choose a shorter one",
        }
        if error.errno not in reasons:
            raise
        raise BundleError(f"cannot write {out}: {reasons[error.errno]}") from None
