"""Streams weights into ``model.onnx_data``: read, convert or quantize, write, chunk by chunk.

No more than one chunk per worker lives in memory. A journal names the weights whose bytes are on
disk, so that a killed export goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np

from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.onnx_target import NUMPY_TYPES
from qwen2x.exporters.onnx_weights import Region, Weight, WeightLayout
from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import quantize
from qwen2x.quantize.packing import pack_bytes

Progress = Callable[[int, int], None]
JOURNAL = "journal"
CHUNK_ELEMENTS = 1 << 18
_SYNC_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Rows ``start:stop`` of a checkpoint tensor, which become a weight's rows from ``row`` on."""

    weight: Weight
    source: str
    start: int
    stop: int
    row: int


def write_weights(
    checkpoint: Checkpoint, layout: WeightLayout, path: Path, progress: Progress
) -> None:
    """Writes (or completes) the data file and brings it to disk.

    Args:
        checkpoint: where the floats come from.
        layout: where each weight goes.
        path: the data file; its journal lies beside it.
        progress: called with bytes written so far and bytes in all.

    Raises:
        CheckpointError: NaN or infinity among the weights, or beyond the target's float type.
        OSError: the disk is full, or the like.
    """
    total = sum(weight.bytes for weight in layout.weights)
    with _DataFile(path, layout.end) as file:
        done = file.finished()
        written = sum(weight.bytes for weight in layout.weights if weight.name in done)
        progress(written, total)
        todo = [weight for weight in layout.weights if weight.name not in done]
        for weight in _in_parallel(checkpoint, todo, file):
            file.finish(weight)
            written += weight.bytes
            progress(written, total)
        file.sync()


def _in_parallel(
    checkpoint: Checkpoint, weights: list[Weight], file: _DataFile
) -> Iterator[Weight]:
    """Yields each weight when its last chunk is written."""
    workers = min(4, os.cpu_count() or 1)
    left = {weight.name: sum(1 for _ in _chunks(weight)) for weight in weights}
    pending: dict[Future[None], Weight] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in (chunk for weight in weights for chunk in _chunks(weight)):
                pending[pool.submit(_convert, checkpoint, chunk, file)] = chunk.weight
                if len(pending) >= 2 * workers:
                    yield from _collect(pending, left)
            while pending:
                yield from _collect(pending, left)
        finally:
            pool.shutdown(cancel_futures=True)


def _collect(pending: dict[Future[None], Weight], left: dict[str, int]) -> Iterator[Weight]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        weight = pending.pop(future)
        future.result()
        left[weight.name] -= 1
        if not left[weight.name]:
            yield weight


def _chunks(weight: Weight) -> Iterator[_Chunk]:
    step = max(1, CHUNK_ELEMENTS // weight.columns)
    row = 0
    for source, rows in weight.sources:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield _Chunk(weight=weight, source=source, start=start, stop=stop, row=row + start)
        row += rows


def _convert(checkpoint: Checkpoint, chunk: _Chunk, file: _DataFile) -> None:
    weight = chunk.weight
    values = checkpoint.rows(chunk.source, chunk.start, chunk.stop)
    if weight.scheme is not None and weight.scales is not None:
        matrix = quantize(values, weight.scheme)
        codes = pack_bytes(matrix.codes, weight.scheme.bits)
        file.write(weight.values, chunk.row, codes)
        with np.errstate(over="ignore"):
            scales = matrix.scales.astype(NUMPY_TYPES[weight.scales.element_type])
        # Below float16's normal numbers a scale loses bits, which its codes were not chosen for.
        if not np.array_equal(scales.astype(np.float32), matrix.scales):
            _require_close(scales, matrix.scales, chunk.source)
        file.write(weight.scales, chunk.row, scales)
        return
    with np.errstate(over="ignore"):
        stored = values.astype(NUMPY_TYPES[weight.values.element_type])
    if stored.dtype == np.float16 and not np.isfinite(stored).all():
        raise CheckpointError(
            f"{chunk.source} holds values beyond float16 (largest {np.abs(values).max():.4g}); "
            "choose --dtype bfloat16 or float32"
        )
    file.write(weight.values, chunk.row, stored)


def _require_close(stored: np.ndarray, scales: np.ndarray, source: str) -> None:
    """Raises CheckpointError for scales that a float16 graph would change by over one percent."""
    wide = stored.astype(np.float32)
    if np.isfinite(wide).all() and (np.abs(wide - scales) <= 0.01 * np.abs(scales)).all():
        return
    worst = scales[np.abs(wide - scales).argmax() // scales.shape[1]]
    raise CheckpointError(
        f"{source} needs scales that float16 cannot hold (such as {np.abs(worst).max():.4g}); "
        "choose --dtype bfloat16"
    )


class _DataFile:
    """The data file at its full size, with the journal of finished weights beside it."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._lock = Lock()
        self._unsynced: list[Weight] = []

    def __enter__(self) -> _DataFile:
        fresh = not self._path.exists() or self._path.stat().st_size != self._size
        if fresh:
            self._journal_path.unlink(missing_ok=True)
        self._file = self._path.open("w+b" if fresh else "r+b")
        self._file.truncate(self._size)
        self._journal = self._journal_path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.close()
        self._file.close()

    @property
    def _journal_path(self) -> Path:
        return self._path.with_name(JOURNAL)

    def finished(self) -> set[str]:
        """Names of the weights that an earlier run brought to disk; a cut last line is no name."""
        text = self._journal_path.read_text(encoding="utf-8", errors="replace")
        return set(text[: text.rfind("\n") + 1].split("\n")) - {""}

    def write(self, region: Region, row: int, values: np.ndarray) -> None:
        """Writes rows of a region, from ``row`` on."""
        data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        with self._lock:
            self._file.seek(region.offset + row * region.row_bytes)
            self._file.write(data.data)

    def finish(self, weight: Weight) -> None:
        """Notes a weight as written; it enters the journal with the next sync."""
        self._unsynced.append(weight)
        if sum(item.bytes for item in self._unsynced) >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Brings the bytes to disk, then says so in the journal."""
        with self._lock:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._journal.writelines(f"{weight.name}\n" for weight in self._unsynced)
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._unsynced.clear()
