"""The manifest ``qwen2x.json`` of a bundle: written last, read first, its promises checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2x.exporters.config import Qwen2Config, parse_config
from qwen2x.exporters.mlx_folder import describe_mlx_folder, is_mlx_folder
from qwen2x.exporters.rope import Rope
from qwen2x.quantize.errors import BundleError

MANIFEST = "qwen2x.json"
# The second graph of an ONNX bundle that has one, and its weights.
PREFILL_FILE, PREFILL_DATA_FILE = "prefill.onnx", "prefill.onnx_data"
FORMAT_VERSION = 1
# By target, the files without which there is no model.
_NEEDED = {"onnx": ("model.onnx", "model.onnx_data"), "mlx": ("config.json",)}
# Files up to this size are hashed on every opening; of larger ones, a sample of blocks.
_SMALL = 32 << 20
_BLOCK = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_MODEL_SUFFIXES = (".onnx", ".onnx_data", ".safetensors")
_LAYOUTS = ("shared", "concatenated", "stepped")
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder that ``export`` wrote, and its manifest.

    Or one that another program wrote for MLX; then the manifest says what is found in it.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def is_ours(self) -> bool:
        """Whether the folder holds a manifest."""
        return (self.folder / MANIFEST).is_file()

    @property
    def target(self) -> str:
        """``onnx`` or ``mlx``."""
        return str(self.manifest["target"])

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``: what a graph was built for; ``any`` for MLX."""
        return str(self.manifest["device"])

    @property
    def dtype(self) -> str:
        """Float type of activations and cache."""
        return str(self.manifest["dtype"])

    @property
    def scheme(self) -> str:
        """For example ``int4-g32``, or ``float``."""
        return str(self.manifest["scheme"])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all matrices over their parameters."""
        return float(self.manifest["bits_per_weight"])

    @property
    def model_config(self) -> Qwen2Config:
        """The model's numbers, as its checkpoint's ``config.json`` had them."""
        generation = {"eos_token_id": list(self.eos_token_ids)}
        return parse_config(self.manifest["config"], generation, self.original_context)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """An MLX folder's settings: group_size, bits, mode, and per module path the same or false.

        None where the weights are floats.
        """
        settings: Mapping[str, Any] | None = self.manifest.get("quantization")
        return settings

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; the tokenizer may know fewer."""
        return int(self.manifest["config"]["vocab_size"])

    @property
    def max_context(self) -> int:
        """Positions that the bundle can be used for."""
        return int(self.manifest["rope"]["max_context"])

    @property
    def original_context(self) -> int | None:
        """Positions that the model was trained with, if its config had to be told."""
        given = self.manifest["rope"].get("original_context")
        return None if given is None else int(given)

    @property
    def rope_contexts(self) -> dict[float, int]:
        """Positions that each YaRN factor reaches, by factor, rising. Early bundles have one."""
        rope = self.manifest["rope"]
        contexts = rope.get("contexts", [self.max_context])
        return {
            float(factor): int(context)
            for factor, context in zip(rope["factors"], contexts, strict=True)
        }

    @property
    def own_factor(self) -> float:
        """The checkpoint's own YaRN factor, or the first where the bundle does not have that."""
        contexts, own = self.rope_contexts, self.model_config.rope.factor
        return own if own in contexts else next(iter(contexts))

    @property
    def ropes(self) -> dict[float, Rope]:
        """The rotary embedding of each YaRN factor."""
        own = self.model_config.rope
        if len(self.rope_contexts) == 1:
            return dict.fromkeys(self.rope_contexts, own)
        return {factor: own.with_factor(factor) for factor in self.rope_contexts}

    @property
    def cache(self) -> Mapping[str, Any]:
        """layers, num_key_value_heads, head_dim, dtype, layout."""
        cache: Mapping[str, Any] = self.manifest["cache"]
        return cache

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return tuple(self.manifest["eos_token_ids"])

    @property
    def bytes(self) -> int:
        """Bytes on disk of all files that the manifest names."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, but for the copy that reads prompts."""
        return int(self.manifest["weight_bytes"])

    @property
    def has_prefill(self) -> bool:
        """Whether there is a second graph, which reads prompts."""
        return "prefill" in self.manifest

    @property
    def prefill_bytes(self) -> int:
        """Bytes of the weights that the second graph adds."""
        return int(self.manifest["prefill"]["weight_bytes"]) if self.has_prefill else 0


def open_bundle(folder: Path, *, verify: bool = False) -> Bundle:
    """Reads the manifest and checks the files against it.

    Sizes are checked always, small files and samples of large ones are hashed always, everything
    is hashed with ``verify``.

    Raises:
        BundleError: no bundle, a newer format, a file missing, cut, swapped, a link, or outside.
    """
    path = folder / MANIFEST
    if not path.is_file() and is_mlx_folder(folder):
        return Bundle(folder=folder, manifest=describe_mlx_folder(folder))
    if not path.is_file():
        raise BundleError(
            f"{folder} is no bundle (it has no {MANIFEST}); make one with qwen2x export"
        )
    _refuse_link(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{folder} has format version {version}, expected {FORMAT_VERSION}; "
            "export it again with this qwen2x"
        )
    bundle = Bundle(folder=folder, manifest=manifest)
    for entry in folder.iterdir():
        _refuse_link(entry)
    try:
        _require_usable(bundle)
        files = _promised_files(bundle)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    for promised in files:
        _check_file(folder, promised, verify)
    return bundle


def changed_source_files(bundle: Bundle, source: Path) -> list[str]:
    """Which of the files that a bundle was made of are missing or others in a folder."""
    hashes: Mapping[str, str] = bundle.manifest["source"]["sha256"]
    return [
        name
        for name, sha256 in hashes.items()
        if not (source / name).is_file() or sha256_of(source / name) != sha256
    ]


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle, or holds weights for MLX."""
    return (folder / MANIFEST).is_file() or is_mlx_folder(folder)


def describe_files(folder: Path, *, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Bytes and hashes of every file of a folder but those ``without``, for the manifest."""
    described = {}
    for path in sorted(path for path in folder.iterdir() if path.name not in without):
        entry: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        if entry["bytes"] > _SMALL:
            entry["sample_sha256"] = _sample_sha256(path)
        described[path.name] = entry
    return described


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest in one step; also used by ``validate`` to record quality."""
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file in one step, so that it is never there in half."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def model_hash(bundle: Bundle) -> str:
    """One hash of graph and weights. Of files without a hash in a manifest, size and a sample."""
    digest = hashlib.sha256()
    for name, entry in sorted(bundle.manifest["files"].items()):
        path = bundle.folder / name
        if path.suffix in _MODEL_SUFFIXES or name == "config.json":
            known = entry.get("sha256")
            digest.update(f"{name}:{entry['bytes']}:{known or _quick_sha256(path)};".encode())
    return digest.hexdigest()


def _quick_sha256(path: Path) -> str:
    return sha256_of(path) if path.stat().st_size <= _SMALL else _sample_sha256(path)


def _sample_sha256(path: Path) -> str:
    """The sha256 of evenly spread blocks: enough to tell a file from another of its size."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Promise:
    """What the manifest says of a file; ``sample_sha256`` is of large ones only."""

    name: str
    bytes: int
    sha256: str
    sample_sha256: str | None


def _promised_files(bundle: Bundle) -> list[_Promise]:
    """The manifest's files; fails as dictionaries do where something used later is missing."""
    for name, value in vars(Bundle).items():
        if isinstance(value, property):
            getattr(bundle, name)
    dict(bundle.cache)
    described = bundle.manifest["files"]
    for name in _NEEDED[bundle.target]:
        described[name]
    return [
        _Promise(
            name=name,
            bytes=int(entry["bytes"]),
            sha256=str(entry["sha256"]),
            sample_sha256=entry.get("sample_sha256"),
        )
        for name, entry in described.items()
    ]


def _require_usable(bundle: Bundle) -> None:
    """Fails with ValueError where what a runtime is about to trust makes no sense."""
    cache = bundle.cache
    for name in ("layers", "num_key_value_heads", "head_dim"):
        if not isinstance(cache[name], int) or not 1 <= cache[name] <= 1 << 20:
            raise ValueError(f"cache {name} is {cache[name]!r}")
    if cache["layout"] not in _LAYOUTS:
        raise ValueError(f"cache layout is {cache['layout']!r}")
    for dtype, known in ((bundle.dtype, _DTYPES), (cache["dtype"], (*_DTYPES, "int8"))):
        if dtype not in known:
            raise ValueError(f"dtype is {dtype!r}")
    eos = bundle.manifest["eos_token_ids"]
    if not isinstance(eos, list) or not all(isinstance(token, int) for token in eos):
        raise ValueError(f"eos_token_ids is {eos!r}")
    if not 1 <= bundle.max_context <= 1 << 30:
        raise ValueError(f"max_context is {bundle.max_context}")
    contexts = bundle.rope_contexts
    if not contexts or not all(1 <= context <= bundle.max_context for context in contexts.values()):
        raise ValueError(f"contexts of YaRN factors are {contexts}")
    if list(contexts) != sorted(contexts):
        raise ValueError(f"YaRN factors are {list(contexts)}")


def _damaged(path: Path, error: Exception) -> BundleError:
    return BundleError(f"{path} is damaged ({error!r}); export the bundle again")


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise BundleError(f"{path} is a link; a bundle's files must lie in it: copy the file there")


def _check_file(folder: Path, promised: _Promise, verify: bool) -> None:
    name = promised.name
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise BundleError(f"{folder / MANIFEST} names {name!r}, which lies outside the bundle")
    _refuse_link(path)
    if not path.is_file():
        raise BundleError(f"{path} is missing; export the bundle again")
    size = path.stat().st_size
    if size != promised.bytes:
        raise BundleError(
            f"{path} has {size} bytes, expected {promised.bytes}; export the bundle again"
        )
    if verify or size <= _SMALL:
        is_intact = sha256_of(path) == promised.sha256
    else:
        is_intact = _sample_sha256(path) == promised.sample_sha256
    if not is_intact:
        raise BundleError(f"{path} is not the file that was exported; export the bundle again")
