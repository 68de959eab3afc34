"""Streams weights into a bundle's data files: read, convert or quantize, write, chunk by chunk.

No more than one chunk per worker lives in memory. A journal names the weights whose bytes are on
disk, so that a killed export goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO

import numpy as np

from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.packed_matrices import PackedMatrices
from qwen2x.exporters.weights import DataFile, Region, Weight
from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import QuantizedMatrix, quantize
from qwen2x.quantize.packing import pack_bytes, pack_planes, pack_zero_points
from qwen2x.quantize.rows import quantize_rows
from qwen2x.quantize.scheme import Scheme

Progress = Callable[[int, int], None]
# Gives rows start:stop of a checkpoint tensor as codes and scales.
Quantizer = Callable[[str, int, int, Scheme], QuantizedMatrix]
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
    checkpoint: Checkpoint,
    weights: Sequence[Weight],
    files: Sequence[DataFile],
    folder: Path,
    progress: Progress,
    quantizer: Quantizer | None = None,
) -> None:
    """Writes (or completes) the data files and brings them to disk.

    Args:
        checkpoint: where the floats come from.
        weights: what to write, and where each of them goes.
        files: the data files.
        folder: where they lie, and their journal beside them.
        progress: called with bytes written so far and bytes in all.
        quantizer: rounds matrices that have a scheme; by default to scales of least error.

    Raises:
        CheckpointError: NaN or infinity among the weights, or beyond the target's float type.
        OSError: the disk is full, or the like.
    """
    total = sum(weight.bytes for weight in weights)
    with _DataFiles(folder, files) as opened:
        done = opened.finished()
        written = sum(weight.bytes for weight in weights if weight.name in done)
        progress(written, total)
        todo = [weight for weight in weights if weight.name not in done]
        work = _Work(
            checkpoint=checkpoint,
            files=opened,
            quantizer=quantizer or plain_quantizer(checkpoint),
        )
        for weight in _in_parallel(work, todo):
            opened.finish(weight)
            written += weight.bytes
            progress(written, total)
        opened.sync()


def plain_quantizer(checkpoint: Checkpoint) -> Quantizer:
    """Rounds floats to scales of least squared error; what is quantized already stays as it is."""

    def rounded(name: str, start: int, stop: int, scheme: Scheme) -> QuantizedMatrix:
        return quantize(checkpoint.rows(name, start, stop), scheme)

    if checkpoint.config.quantization is None:
        return rounded
    packed = PackedMatrices(checkpoint, checkpoint.config.quantization)

    def carried(name: str, start: int, stop: int, scheme: Scheme) -> QuantizedMatrix:
        return (packed.rows if name in packed else rounded)(name, start, stop, scheme)

    return carried


@dataclass(frozen=True, kw_only=True)
class _Work:
    """Where chunks come from and go to."""

    checkpoint: Checkpoint
    files: _DataFiles
    quantizer: Quantizer


def _in_parallel(work: _Work, weights: list[Weight]) -> Iterator[Weight]:
    """Yields each weight when its last chunk is written."""
    workers = min(4, os.cpu_count() or 1)
    left = {weight.name: sum(1 for _ in _chunks(weight)) for weight in weights}
    pending: dict[Future[None], Weight] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in (chunk for weight in weights for chunk in _chunks(weight)):
                pending[pool.submit(_convert, work, chunk)] = chunk.weight
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


def _convert(work: _Work, chunk: _Chunk) -> None:
    weight = chunk.weight
    if weight.scheme is not None:
        matrix = work.quantizer(chunk.source, chunk.start, chunk.stop, weight.scheme)
        _write_quantized(chunk, matrix, work.files)
        return
    values = work.checkpoint.rows(chunk.source, chunk.start, chunk.stop)
    if weight.scales is not None:
        codes, scales = quantize_rows(values)
        work.files.write(weight.values, chunk.row, codes)
        work.files.write(weight.scales, chunk.row, scales)
        return
    with np.errstate(over="ignore"):
        stored = values.astype(weight.values.dtype)
    if stored.dtype == np.float16 and not np.isfinite(stored).all():
        raise CheckpointError(
            f"{chunk.source} holds values beyond float16 (largest {np.abs(values).max():.4g}); "
            "choose --dtype bfloat16 or float32"
        )
    work.files.write(weight.values, chunk.row, stored)


def _write_quantized(chunk: _Chunk, matrix: QuantizedMatrix, files: _DataFiles) -> None:
    weight = chunk.weight
    assert weight.scales is not None
    if weight.low_values is None:
        files.write(weight.values, chunk.row, pack_bytes(matrix.codes, matrix.scheme.bits))
    else:
        high, low = pack_planes(matrix.codes)
        files.write(weight.values, chunk.row, high)
        files.write(weight.low_values, chunk.row, low)
    with np.errstate(over="ignore"):
        scales = matrix.scales.astype(weight.scales.dtype)
    # Below float16's normal numbers a scale loses bits, which its codes were not chosen for.
    if not np.array_equal(scales.astype(np.float32), matrix.scales):
        _require_close(scales, matrix.scales, chunk.source)
    files.write(weight.scales, chunk.row, scales)
    if weight.zero_points is not None:
        assert matrix.zero_points is not None
        packed = pack_zero_points(matrix.zero_points, matrix.scheme.bits)
        files.write(weight.zero_points, chunk.row, packed)
    if weight.biases is not None:
        # Of the stored scale, so that both say the same. A symmetric scheme's zero point is a power
        # of two, which changes the exponent alone; others are rounded, by under 1/30 of a code.
        zero_points = matrix.zero_points
        if zero_points is None:
            zero_points = np.array(matrix.scheme.zero_point)
        with np.errstate(over="ignore"):
            biases = (scales * -zero_points.astype(np.float32)).astype(scales.dtype)
        if biases.dtype == np.float16 and not np.isfinite(biases).all():
            largest = np.abs(matrix.scales).max() * matrix.scheme.zero_point
            raise CheckpointError(
                f"{chunk.source} needs biases beyond float16 (largest {largest:.4g}); "
                "choose --dtype bfloat16 or float32"
            )
        files.write(weight.biases, chunk.row, biases)


def _require_close(stored: np.ndarray, scales: np.ndarray, source: str) -> None:
    """Raises CheckpointError for scales that float16 would change by over one percent."""
    wide = stored.astype(np.float32)
    if np.isfinite(wide).all() and (np.abs(wide - scales) <= 0.01 * np.abs(scales)).all():
        return
    worst = scales[np.abs(wide - scales).argmax() // scales.shape[1]]
    raise CheckpointError(
        f"{source} needs scales that float16 cannot hold (such as {np.abs(worst).max():.4g}); "
        "choose --dtype bfloat16"
    )


class _DataFiles:
    """The data files at their full size, with the journal of finished weights beside them."""

    def __init__(self, folder: Path, files: Sequence[DataFile]) -> None:
        self._folder = folder
        self._files = files
        self._lock = Lock()
        self._unsynced: list[Weight] = []

    def __enter__(self) -> _DataFiles:
        is_going_on = all(_has_size(self._folder / file.name, file.size) for file in self._files)
        if not is_going_on:
            self._journal_path.unlink(missing_ok=True)
        self._opened: dict[str, BinaryIO] = {}
        for file in self._files:
            opened = (self._folder / file.name).open("r+b" if is_going_on else "w+b")
            self._opened[file.name] = opened
            opened.truncate(file.size)
            opened.write(file.head)
        self._journal = self._journal_path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.close()
        for file in self._opened.values():
            file.close()

    @property
    def _journal_path(self) -> Path:
        return self._folder / JOURNAL

    def finished(self) -> set[str]:
        """Names of the weights that an earlier run brought to disk; a cut last line is no name."""
        text = self._journal_path.read_text(encoding="utf-8", errors="replace")
        return set(text[: text.rfind("\n") + 1].split("\n")) - {""}

    def write(self, region: Region, row: int, values: np.ndarray) -> None:
        """Writes rows of a region, from ``row`` on."""
        data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        file = self._opened[region.file]
        with self._lock:
            file.seek(region.offset + row * region.row_bytes)
            file.write(data.data)

    def finish(self, weight: Weight) -> None:
        """Notes a weight as written; it enters the journal with the next sync."""
        self._unsynced.append(weight)
        if sum(item.bytes for item in self._unsynced) >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Brings the bytes to disk, then says so in the journal."""
        with self._lock:
            for file in self._opened.values():
                file.flush()
                os.fsync(file.fileno())
        self._journal.writelines(f"{weight.name}\n" for weight in self._unsynced)
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._unsynced.clear()


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size
