"""A KV cache in a file: safetensors, written beside the old one and put in its place when whole.

Tensors are ``token_ids`` int64 [positions], keys and values by layer [heads, positions, columns] in
the cache's own type, and ``checksums`` uint32 [tensors before it]: the CRC-32 of each one's bytes.
The metadata says what the cache belongs to. Format: safetensors 0.5, README, "Format".
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.memory import gigabytes

# By layer and part, as "0.key": [heads, positions, columns].
CacheArrays = Mapping[str, NDArray[Any]]

_TYPES: dict[str, Any] = {
    "I64": np.int64, "U32": np.uint32, "I8": np.int8,
    "F32": np.float32, "F16": np.float16, "BF16": bfloat16,
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_IDS, _CHECKSUMS, _METADATA = "token_ids", "checksums", "__metadata__"
_LENGTH_BYTES, _ALIGNMENT, _MOST_HEADER = 8, 8, 16 << 20
# Beside the tensors, what a header may take and a disk shall keep.
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CacheFile:
    """What a file holds; arrays are mapped and read where they are used."""

    metadata: Mapping[str, str]
    token_ids: list[int]
    arrays: CacheArrays


def write_cache_file(
    path: Path, metadata: Mapping[str, str], token_ids: list[int], arrays: CacheArrays
) -> None:
    """Replaces a file in one step.

    Raises:
        RequestError: there is no room, or it cannot be written; the old file stays as it was.
    """
    tensors = {_IDS: np.array(token_ids, np.int64), **arrays}
    require_disk(path, sum(values.nbytes for values in tensors.values()))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        try:
            with temporary.open("wb") as file:
                _write(file, metadata, tensors)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(
            f"{path} cannot be written: {error.strerror or error}; give --prompt-cache another file"
        ) from None


def require_disk(path: Path, count: int) -> None:
    """Refuses a file that cannot be made, before the work for it is done.

    Raises:
        RequestError: no such folder, no permission, no regular file, or no room.
    """
    folder = path.parent
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; expected one for the prompt cache {path.name}")
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is no regular file; give --prompt-cache another")
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{folder} cannot be written to; give --prompt-cache another file")
    free = shutil.disk_usage(folder).free
    if count + _SPARE_BYTES > free:
        raise RequestError(
            f"the prompt cache {path} needs {gigabytes(count)}, {gigabytes(free)} are free in "
            f"{folder}; free some, or give --prompt-cache a file on a larger disk"
        )


def read_cache_file(path: Path) -> CacheFile:
    """Maps a file, whose every byte is checked.

    Raises:
        RequestError: no file of this kind, cut, or damaged.
    """
    try:
        metadata, tensors = _map(path)
        checksums = tensors.pop(_CHECKSUMS)
        found = [_checksum(values) for values in tensors.values()]
        if checksums.tolist() != found:
            wrong = [name for name, a, b in zip(tensors, checksums, found, strict=True) if a != b]
            raise ValueError(f"other bytes than were written in {wrong[0]}")
        token_ids: list[int] = tensors.pop(_IDS).tolist()
        for name, values in tensors.items():
            if values.ndim != 3 or values.shape[1] != len(token_ids):
                raise ValueError(f"{name} has shape {values.shape} for {len(token_ids)} tokens")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RequestError(
            f"{path} is no whole prompt cache ({reason}); delete it and it is made again"
        ) from None
    return CacheFile(metadata=metadata, token_ids=token_ids, arrays=tensors)


def _write(
    file: BinaryIO, metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]
) -> None:
    file.write(_header(metadata, tensors))
    checksums = []
    for values in tensors.values():
        checksum = 0
        for block in _blocks(values):
            checksum = zlib.crc32(block, checksum)
            file.write(block)
        checksums.append(checksum)
    file.write(np.array(checksums, np.uint32).tobytes())


def _header(metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    shapes = {name: (values.dtype, list(values.shape)) for name, values in tensors.items()}
    shapes[_CHECKSUMS] = (np.dtype(np.uint32), [len(tensors)])
    for name, (dtype, shape) in shapes.items():
        end = offset + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _blocks(values: NDArray[Any]) -> Iterator[memoryview]:
    """The bytes, head by head: of a view into larger buffers only one head is copied."""
    for part in values if values.ndim > 1 else [values]:
        yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def _checksum(values: NDArray[Any]) -> int:
    checksum = 0
    for block in _blocks(values):
        checksum = zlib.crc32(block, checksum)
    return checksum


def _map(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata and mapped tensors; fails as dictionaries and NumPy do where something is amiss."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(_LENGTH_BYTES).ljust(_LENGTH_BYTES, b"\0"))
        if not 0 < length <= min(size - _LENGTH_BYTES, _MOST_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        entries = json.loads(file.read(length))
    metadata = {str(key): str(value) for key, value in entries.pop(_METADATA).items()}
    start = _LENGTH_BYTES + length
    ends = [entry["data_offsets"][1] for entry in entries.values()]
    if start + max(ends) != size:
        raise ValueError(f"{size} bytes, expected {start + max(ends)}")
    data = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, entry in entries.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = data[begin:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return metadata, tensors
