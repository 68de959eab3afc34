"""Bundles that ``run`` made of a checkpoint, kept for the next time."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from qwen2x.exporters.bundle import open_bundle, sha256_of
from qwen2x.exporters.cache_folder import cache_folder
from qwen2x.exporters.calibration import OnLayer
from qwen2x.exporters.checkpoint import find_shards
from qwen2x.exporters.exporter import export
from qwen2x.exporters.hub import resolve_source, source_id
from qwen2x.exporters.options import Options
from qwen2x.exporters.staging import turn_os_errors
from qwen2x.exporters.tokenizer_files import TOKENIZER_FILES
from qwen2x.exporters.weight_writer import Progress
from qwen2x.quantize.errors import BundleError

_HASHES = "hashes.json"


def cached_bundle(
    source: str | Path,
    options: Options,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    on_layer: OnLayer | None = None,
) -> Path:
    """The bundle of a source, exported once; its key holds the source's hash and every option.

    Raises:
        InputError: as ``export`` does.
    """
    folder = resolve_source(source, revision=revision)
    key = f"{_source_hash(folder)[:16]}-{options.key}"
    out = cache_folder() / "bundles" / f"{source_id(source).replace('/', '--')}-{key}"
    once = cache_folder() / f".{out.name}.lock"
    with turn_os_errors(once):
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock = FileLock(once)
        lock.acquire()  # A second run waits for the first one's export, and then has it.
    try:
        if not _is_intact(out):
            export(
                folder,
                out=out,
                progress=progress,
                on_layer=on_layer,
                source_name=source_id(source),
                force=True,
                **vars(options),
            )
    finally:
        with suppress(OSError):  # Windows keeps an open file
            once.unlink()
        lock.release()
    return out


def _is_intact(folder: Path) -> bool:
    """Whether a bundle is there and opens; a damaged one is made again."""
    try:
        open_bundle(folder)
    except BundleError:
        return False
    return True


def _source_hash(folder: Path) -> str:
    """One hash of all that is read. A file's own hash is remembered while size and time stay."""
    remembered_at = cache_folder() / _HASHES
    remembered = _read(remembered_at)
    whole = hashlib.sha256()
    is_changed = False
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES, *find_shards(folder)):
        path = (folder / name).resolve()
        if not path.is_file():
            continue
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = remembered.get(str(path))
        if entry is None or entry[:2] != stamp:
            entry = [*stamp, sha256_of(path)]
            remembered[str(path)] = entry
            is_changed = True
        whole.update(f"{name}:{entry[2]};".encode())
    if is_changed:
        with suppress(OSError):  # a cache that cannot be written costs time, not the answer
            _write(remembered_at, remembered)
    return whole.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)
