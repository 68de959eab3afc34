"""A Hugging Face checkpoint folder, opened lazily: its shards are memory-mapped and read in rows.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON
header ``{name: {dtype, shape, data_offsets}}``, then the data. The safetensors library checks each
file's header (length, overlap, holes, sizes against the file); we then map the files ourselves and
give up the pages of each chunk once its rows are copied. Mapped pages count as resident memory,
which would otherwise grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
import sys
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from qwen2x.exporters.config import Qwen2Config, read_config, read_json
from qwen2x.quantize.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": bfloat16}
# Words of codes and order of inputs, in quantized checkpoints.
DTYPES: dict[str, Any] = FLOATS | {"I32": np.int32}
_INTEGERS = (".qweight", ".qzeros", ".g_idx")
_SINGLE = "model.safetensors"
_SHOWN = 12
# A fault maps up to a huge page of what is cached around it, so that much more is given up.
_AROUND_BYTES = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor lies: shard, byte offset in the file, dtype name, shape."""

    name: str
    shard: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_elements(self) -> int:
        """Elements of one row; a vector is one row per element."""
        return math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        """Stored size."""
        return int(self.shape[0] * self.row_elements * np.dtype(DTYPES[self.dtype]).itemsize)


class Checkpoint:
    """Config and weights of a folder. Use as a context manager; reading is thread-safe."""

    def __init__(self, folder: Path, config: Qwen2Config, tensors: dict[str, Tensor]) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self._mappings = {shard: _map(folder / shard) for shard in self.shards}

    @property
    def shards(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted({tensor.shard for tensor in self.tensors.values()})

    @property
    def bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def identity(self) -> dict[str, Any]:
        """Config, and size and time of every shard: whether work that was kept is of this source.

        The last norm stands for the weights, as archives may give all files one time.
        """
        stats = {shard: (self.folder / shard).stat() for shard in self.shards}
        quantization = self.config.quantization
        return {
            "config": self.config.raw,
            "quantization": asdict(quantization) if quantization else None,
            "shards": {shard: [stat.st_size, stat.st_mtime_ns] for shard, stat in stats.items()},
            "norm": hashlib.sha256(self.rows("model.norm.weight").tobytes()).hexdigest(),
        }

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32.

        Raises:
            CheckpointError: a NaN or an infinity among them, or the file was cut meanwhile.
        """
        tensor = self.tensors[name]
        stop = tensor.shape[0] if stop is None else stop
        values = self._copy(tensor, start, stop)
        # A sum is finite only if every element is, short of an overflow, which is then looked at.
        with np.errstate(over="ignore", invalid="ignore"):
            total = values.sum()
        if not np.isfinite(total) and not np.isfinite(values).all():
            raise CheckpointError(
                f"{name} holds NaN or infinity (rows {start}..{stop - 1}, {tensor.shard}); "
                "expected finite weights: fetch the checkpoint again"
            )
        return values.reshape(stop - start, *tensor.shape[1:])

    def columns(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Columns ``start:stop`` of a matrix, or elements of a vector, in the type stored.

        Raises:
            CheckpointError: the file was cut meanwhile.
        """
        tensor = self.tensors[name]
        stored = self._view(tensor, 0, tensor.shape[0]).reshape(tensor.shape)
        values = stored[..., start:stop].copy()
        # Of every row some pages were touched.
        mapping = self._mappings[tensor.shard]
        _give_up(mapping, tensor.offset, tensor.offset + tensor.bytes)
        return values

    def _copy(self, tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        """The elements of rows ``start:stop``; their pages are given up."""
        stored = self._view(tensor, start, stop)
        values = _to_float32(stored)
        offset = tensor.offset + start * tensor.row_elements * stored.itemsize
        _give_up(self._mappings[tensor.shard], offset, offset + stored.nbytes)
        return values

    def _view(self, tensor: Tensor, start: int, stop: int) -> NDArray[Any]:
        """The stored elements of rows ``start:stop``, in the mapped file."""
        mapping = self._mappings[tensor.shard]
        dtype = np.dtype(DTYPES[tensor.dtype])
        count = (stop - start) * tensor.row_elements
        size = count * dtype.itemsize
        offset = tensor.offset + start * tensor.row_elements * dtype.itemsize
        # To touch a page beyond the file's end would end the process. A cut within the millisecond
        # from here to the end of the copy still does.
        left = min(mapping.size(), len(mapping)) - offset
        if left < size:
            raise CheckpointError(
                f"{tensor.name} ends after {max(left, 0)} of {size} bytes: {tensor.shard} was "
                "changed while it was read; leave it alone during an export"
            )
        return np.frombuffer(mapping, dtype, count, offset)

    def close(self) -> None:
        """Closes the shards."""
        for mapping in self._mappings.values():
            mapping.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(folder: Path, original_context: int | None = None) -> Checkpoint:
    """Opens a folder and compares every name and shape with what its config implies.

    Raises:
        SourceError, ConfigError: no or an unfit ``config.json``.
        CheckpointError: damaged files, or differences, all of them at once.
    """
    config = read_config(folder, original_context)
    tensors: dict[str, Tensor] = {}
    for shard in find_shards(folder):
        for tensor in read_header(folder / shard):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{tensor.name} is stored twice, in {tensors[tensor.name].shard} and {shard}; "
                    "expected each tensor once"
                )
            tensors[tensor.name] = tensor
    _require_index_matches(folder, tensors)
    needed = _match(config, tensors)
    if config.is_tied and "lm_head.weight" in tensors:
        _require_same_bytes(folder, tensors["lm_head.weight"], needed["model.embed_tokens.weight"])
    return Checkpoint(folder, config, needed)


def read_header(path: Path) -> Iterator[Tensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is cut, overlapping, claims more than it holds, or has a dtype
            that is neither a float nor that of words and orders.
    """
    try:
        with path.open("rb") as file, safe_open(path, framework="numpy"):
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); make it readable or fetch it again"
        ) from None
    except (SafetensorError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path.name} is not an intact safetensors file ({str(error).splitlines()[0]}); "
            f"it has {path.stat().st_size} bytes: fetch it again"
        ) from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        known = ["I32"] if name.endswith(_INTEGERS) else list(FLOATS)
        if entry["dtype"] not in known:
            raise CheckpointError(
                f"{name} in {path.name} has dtype {entry['dtype']}; expected {', '.join(known)}"
            )
        yield Tensor(
            name=name,
            shard=path.name,
            offset=8 + length + entry["data_offsets"][0],
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of different names; json and safetensors keep the last one in silence."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"its header names {_some(twice)} twice")
    return content


def find_shards(folder: Path) -> list[str]:
    """Names of the safetensors files: those of the index, or all; pickle weights are refused."""
    index = read_json(folder / INDEX)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX} has no weight_map; expected {{tensor: file}}")
        named = sorted({str(file) for file in weight_map.values()})
        outside = [file for file in named if Path(file).name != file]
        if outside:
            raise CheckpointError(f"{INDEX} points outside its folder: {outside[0]}")
        missing = [file for file in named if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(named)} shards named in {INDEX} are missing: "
                f"{_some(missing)}; fetch them"
            )
        if _SINGLE not in named and (folder / _SINGLE).is_file():
            raise CheckpointError(
                f"{folder} holds {_SINGLE} and an {INDEX} that names other files; "
                "expected one set of weights: remove the other"
            )
        return named
    shards = sorted(path.name for path in folder.glob("model*.safetensors"))
    if shards:
        return shards
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickle weights ({_some(pickles)}), which can run code when opened; "
            "expected safetensors: convert them with transformers' save_pretrained"
        )
    raise CheckpointError(f"{folder} has no weights; expected model.safetensors or {INDEX}")


def _require_index_matches(folder: Path, tensors: dict[str, Tensor]) -> None:
    index = read_json(folder / INDEX)
    if index is None:
        return
    wrong = [
        name
        for name, file in index["weight_map"].items()
        if name not in tensors or tensors[name].shard != file
    ]
    if wrong:
        raise CheckpointError(
            f"{INDEX} names tensors that their shards do not hold: {_some(sorted(wrong))}"
        )


def _match(config: Qwen2Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the config implies; all differences are reported at once."""
    expected = _stored_tensors(config, tensors)
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if config.is_tied:
        ignored.add("lm_head.weight")
    missing = [name for name in expected if name not in tensors]
    surplus = [name for name in tensors if name not in expected and name not in ignored]
    misshaped = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    parts = [
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("surplus", surplus), ("misshaped", misshaped))
        if names
    ]
    if missing == ["lm_head.weight"]:
        parts.append("set tie_word_embeddings to true if the head is the embedding")
    if parts:
        said = "" if config.quantization is None else f" (quantized: {config.quantization.name})"
        raise CheckpointError(f"the weights do not fit config.json{said}: " + "; ".join(parts))
    return {name: tensors[name] for name in expected}


def _stored_tensors(config: Qwen2Config, found: Container[str]) -> dict[str, tuple[int, ...]]:
    """What must be there, and of what may be there what was found."""
    tensors, quantization = config.expected_tensors(), config.quantization
    if quantization is None:
        return tensors
    optional = quantization.optional_tensors(tensors)
    return quantization.needed_tensors(tensors) | {
        name: shape for name, shape in optional.items() if name in found
    }


def _require_same_bytes(folder: Path, head: Tensor, embedding: Tensor) -> None:
    """Some tied checkpoints store the head as well; it must then be the embedding."""
    is_same = head.dtype == embedding.dtype and head.shape == embedding.shape
    if is_same:
        step = 1 << 24
        with (folder / head.shard).open("rb") as one, (folder / embedding.shard).open("rb") as two:
            one.seek(head.offset)
            two.seek(embedding.offset)
            for done in range(0, head.bytes, step):
                size = min(step, head.bytes - done)
                if one.read(size) != two.read(size):
                    is_same = False
                    break
    if not is_same:
        raise CheckpointError(
            "config.json says tie_word_embeddings, but lm_head.weight differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false"
        )


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _to_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    """A copy in any case."""
    if stored.dtype == bfloat16:
        wide = stored.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return stored.astype(np.float32)


def _give_up(mapping: mmap.mmap, start: int, stop: int) -> None:
    """Unmaps bytes ``start:stop`` and what came with them; they come back when they are touched.

    Other systems than Linux keep the pages until they need the memory.
    """
    if sys.platform == "linux":
        first = max(start - _AROUND_BYTES, 0) // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(stop + _AROUND_BYTES, len(mapping))
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = [name if name.isprintable() else repr(name) for name in names[:_SHOWN]]
    return ", ".join(shown) + more
