"""Where every weight of a model will lie in the safetensors files of an MLX folder.

Names are those of Hugging Face. A quantized matrix is ``weight`` uint32 [rows, columns*bits/32]
(codes, low bits first), ``scales`` and ``biases`` [rows, groups] in the float type; its values are
``scales * code + biases`` (mlx 0.32, ``mx.quantize`` with mode affine). Layout of the files:
https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen2x.exporters.weights import DataFile, Region, Weight
from qwen2x.quantize.scheme import Scheme

MAX_SHARD_BYTES = 5 << 30
_ALIGNMENT = 8
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32"}

SchemeOf = Callable[[str], Scheme | None]


@dataclass(frozen=True, kw_only=True)
class MlxLayout:
    """The shards, what lies where in them, and which tensor is in which."""

    weights: list[Weight]
    files: list[DataFile]
    weight_map: dict[str, str]


@dataclass
class _Shard:
    """Tensors that will share a file: name to (dtype, shape, offset behind the header)."""

    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = field(default_factory=dict)
    end: int = 0

    def add(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        self.tensors[name] = (dtype, shape, self.end)
        self.end += size

    def head(self) -> bytes:
        """The file's first bytes: the header's length and the header, padded with spaces."""
        entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        for name, (dtype, shape, start) in self.tensors.items():
            size = int(np.prod(shape)) * dtype.itemsize
            entries[name] = {
                "dtype": _NAMES[dtype.name],
                "shape": list(shape),
                "data_offsets": [start, start + size],
            }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        return len(header).to_bytes(8, "little") + header


def lay_out(
    tensors: Mapping[str, tuple[int, ...]],
    float_type: np.dtype[Any],
    scheme_of: SchemeOf,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> MlxLayout:
    """Decides files and offsets.

    Args:
        tensors: the checkpoint's names and shapes; each becomes a weight of its own.
        float_type: of whatever is not an integer code.
        scheme_of: gives a matrix's scheme by its module path; None is float.
        max_shard_bytes: no file is larger, unless one weight is.

    Raises:
        SchemeError: a group size that does not divide a matrix's columns.
    """
    shards: list[_Shard] = [_Shard()]
    schemes: dict[str, Scheme | None] = {}
    placed: dict[str, tuple[_Shard, list[str]]] = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        scheme = scheme_of(module) if len(shape) == 2 else None
        parts = _parts(name, shape, float_type, scheme)
        size = sum(int(np.prod(part)) * dtype.itemsize for dtype, part in parts.values())
        if shards[-1].tensors and shards[-1].end + size > max_shard_bytes:
            shards.append(_Shard())
        for part, (dtype, part_shape) in parts.items():
            shards[-1].add(part, dtype, part_shape)
        schemes[name] = scheme
        placed[name] = (shards[-1], list(parts))
    names = _file_names(len(shards))
    files = {id(shard): (file, shard.head()) for shard, file in zip(shards, names, strict=True)}
    weights = []
    for name, shape in tensors.items():
        shard, parts_of = placed[name]
        file, head = files[id(shard)]
        regions = [_region(file, head, *shard.tensors[part]) for part in parts_of]
        weights.append(_weight(name, shape, schemes[name], regions))
    return MlxLayout(
        weights=weights,
        files=[
            DataFile(name=file, size=len(head) + shard.end, head=head)
            for shard, (file, head) in zip(shards, files.values(), strict=True)
        ],
        weight_map={part: files[id(shard)][0] for shard in shards for part in shard.tensors},
    )


def _parts(
    name: str, shape: tuple[int, ...], float_type: np.dtype[Any], scheme: Scheme | None
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """The tensors that a weight is stored as: name to dtype and shape."""
    if scheme is None:
        return {name: (float_type, shape)}
    rows, columns = shape
    module = name.removesuffix(".weight")
    scheme.require_divides(columns, module)
    groups = (rows, columns // scheme.group_size)
    return {
        name: (np.dtype("<u4"), (rows, columns * scheme.bits // 32)),
        f"{module}.scales": (float_type, groups),
        f"{module}.biases": (float_type, groups),
    }


def _region(
    file: str, head: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], start: int
) -> Region:
    return Region(file=file, dtype=dtype, shape=shape, offset=len(head) + start)


def _weight(
    name: str, shape: tuple[int, ...], scheme: Scheme | None, regions: list[Region]
) -> Weight:
    values, scales, biases = regions if scheme else (regions[0], None, None)
    return Weight(
        name=name,
        sources=((name, shape[0]),),
        columns=shape[1] if len(shape) == 2 else 1,
        values=values,
        scheme=scheme,
        scales=scales,
        biases=biases,
    )


def _file_names(count: int) -> list[str]:
    """As mlx-lm names them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
