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
_BLOCK = 1 << 20
# Beside the tensors, what a header may take and a disk shall keep.
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CacheFile:
    """What a file holds."""

    metadata: Mapping[str, str]
    token_ids: list[int]
    arrays: CacheArrays


class MappedArrays(Mapping[str, NDArray[Any]]):
    """Tensors of a file; each is mapped when it is asked for, and as long as it is held.

    Args:
        path: the file.
        places: type, shape and offset of its tensors.
    """

    def __init__(self, path: Path, places: Mapping[str, Place]) -> None:
        self._path = path
        self._places = places

    def __getitem__(self, name: str) -> NDArray[Any]:
        place = self._places[name]
        values: NDArray[Any] = np.memmap(
            self._path, place.dtype, "r", offset=place.offset, shape=place.shape
        )
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies in a file, and what it is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    bytes: int

    def __post_init__(self) -> None:
        if self.bytes != self.dtype.itemsize * math.prod(self.shape) or self.bytes <= 0:
            raise ValueError(f"{self.bytes} bytes for a shape of {self.shape}")


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
    """Reads a file once, to check every byte; its arrays are mapped later.

    Raises:
        RequestError: no file of this kind, cut, or damaged.
    """
    try:
        with path.open("rb") as file:
            metadata, places = _read_header(file, path.stat().st_size)
            checksums = _read(file, places.pop(_CHECKSUMS)).tolist()
            for (name, place), checksum in zip(places.items(), checksums, strict=True):
                if _checksum(file, place) != checksum:
                    raise ValueError(f"other bytes than were written in {name}")
            token_ids: list[int] = _read(file, places.pop(_IDS)).tolist()
        for name, place in places.items():
            if len(place.shape) != 3 or place.shape[1] != len(token_ids):
                raise ValueError(f"{name} has shape {place.shape} for {len(token_ids)} tokens")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RequestError(
            f"{path} is no whole prompt cache ({reason}); delete it and it is made again"
        ) from None
    return CacheFile(metadata=metadata, token_ids=token_ids, arrays=MappedArrays(path, places))


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


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Place]]:
    """Metadata and places; fails as dictionaries and NumPy do where something is amiss."""
    (length,) = struct.unpack("<Q", file.read(_LENGTH_BYTES).ljust(_LENGTH_BYTES, b"\0"))
    if not 0 < length <= min(size - _LENGTH_BYTES, _MOST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    entries = json.loads(file.read(length))
    metadata = {str(key): str(value) for key, value in entries.pop(_METADATA).items()}
    places = {}
    end = _LENGTH_BYTES + length
    for name, entry in entries.items():
        begin, until = entry["data_offsets"]
        place = Place(
            dtype=np.dtype(_TYPES[entry["dtype"]]),
            shape=tuple(entry["shape"]),
            offset=_LENGTH_BYTES + length + begin,
            bytes=until - begin,
        )
        if place.offset != end:
            raise ValueError(f"{name} begins at {place.offset}, expected {end}")
        end += place.bytes
        places[name] = place
    if end != size:
        raise ValueError(f"{size} bytes, expected {end}")
    return metadata, places


def _read(file: BinaryIO, place: Place) -> NDArray[Any]:
    file.seek(place.offset)
    return np.frombuffer(file.read(place.bytes), place.dtype).reshape(place.shape)


def _checksum(file: BinaryIO, place: Place) -> int:
    file.seek(place.offset)
    checksum, left = 0, place.bytes
    while left:
        block = file.read(min(left, _BLOCK))
        if not block:
            raise ValueError("it ends too early")
        checksum = zlib.crc32(block, checksum)
        left -= len(block)
    return checksum
