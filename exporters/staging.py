"""A folder that appears whole or not at all: written beside its place, locked, resumed, renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen2x.exporters.bundle import MANIFEST
from qwen2x.quantize.errors import BundleError

KEY_FILE = "export-key.json"


@contextmanager
def stage_folder(out: Path, key: Mapping[str, Any], *, force: bool = False) -> Iterator[Path]:
    """Yields a folder to fill; on success it becomes ``out``.

    What an interrupted run with the same key left is handed out again, so that the caller can go
    on; anything else that was left is removed. An error removes the folder, Ctrl-C keeps it.
    With ``force`` a bundle is replaced, but never a folder that holds anything else.

    Raises:
        BundleError: ``out`` exists, another export is writing it, no permission, disk full.
    """
    out = Path(os.path.abspath(out))
    staging = _staging_of(out)
    lock_path = out.with_name(f".{out.name}.lock")
    with turn_os_errors(out), _new_parents(out):
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BundleError(
                f"another export is writing {out}; wait for it or choose another folder"
            ) from None
        try:
            _restore(out)
            require_absent(out, force)
            _open_staging(staging, key)
            yield staging
            _publish(staging, out, force)
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            with suppress(OSError):  # Windows keeps an open file; release() removes it there
                lock_path.unlink()
            lock.release()


def require_space(folder: Path, needed: int) -> None:
    """Raises BundleError when the disk of a (future) folder has less than ``needed`` bytes free.

    What an interrupted run left there counts as free: it is gone on with, or removed.
    """
    folder = Path(os.path.abspath(folder))
    with turn_os_errors(folder):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free + _occupied(_staging_of(folder))
    if free < needed:
        raise BundleError(
            f"{folder} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room or choose another disk"
        )


def _staging_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _occupied(staging: Path) -> int:
    """Bytes on disk of the files in a folder; the data file's unwritten parts take none."""
    if not staging.is_dir():
        return 0
    # Windows does not tell; there nothing is counted.
    return sum(512 * getattr(path.stat(), "st_blocks", 0) for path in staging.iterdir())


@contextmanager
def _new_parents(out: Path) -> Iterator[None]:
    """Makes the missing folders above ``out``; those that stay empty are removed again."""
    missing = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def require_absent(out: Path, force: bool) -> None:
    """Raises BundleError where a bundle may not be written: something is there, or a tree is."""
    with turn_os_errors(out):
        if not out.exists() and not out.is_symlink():
            return
        if not out.is_dir() or out.is_symlink():
            raise BundleError(f"{out} exists and is no folder; choose another name")
        if not force and any(out.iterdir()):
            raise BundleError(
                f"{out} exists and is not empty; choose another folder or add --force"
            )
        if not (out / MANIFEST).is_file() and any(out.iterdir()):
            raise BundleError(
                f"{out} is no bundle and holds files, which --force would delete; "
                "choose another folder"
            )


def _open_staging(staging: Path, key: Mapping[str, Any]) -> None:
    wanted = json.dumps(key, sort_keys=True).encode()
    key_file = staging / KEY_FILE
    if staging.is_symlink() or staging.is_file():
        staging.unlink()
    elif key_file.is_file() and key_file.read_bytes() == wanted:
        return
    elif staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    key_file.write_bytes(wanted)


def _restore(out: Path) -> None:
    """Puts back the old bundle of a replacement that was killed between its two renames."""
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.is_dir() and not out.exists():
        replaced.rename(out)


def _publish(staging: Path, out: Path, force: bool) -> None:
    for path in staging.iterdir():
        sync_path(path)
    (staging / KEY_FILE).unlink()
    sync_path(staging)
    replaced = out.with_name(f".{out.name}.replaced")
    is_replacing = out.exists() and force
    if is_replacing:
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    elif out.exists():
        out.rmdir()
    try:
        staging.rename(out)
    except OSError:
        if is_replacing:
            replaced.rename(out)
        raise
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
def turn_os_errors(out: Path) -> Iterator[None]:
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
            errno.EEXIST: "a part of that path is a file; choose another folder",
            errno.ENAMETOOLONG: "that name is too long; choose a shorter one",
        }
        if error.errno not in reasons:
            raise
        raise BundleError(f"cannot write {out}: {reasons[error.errno]}") from None
