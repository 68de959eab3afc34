"""MLX folders that other programs made, such as mlx-lm's ``convert``, described like our own.

Their settings are their own: any affine bits and groups, mixed recipes, and a head that is tied
unless the config says otherwise. They may lie in a hub cache, where files are links.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwen2x.exporters.config import Qwen2Config, parse_config, read_json
from qwen2x.exporters.rope import rope_facts
from qwen2x.exporters.weights import kind_of
from qwen2x.quantize.errors import BackendError, BundleError, ConfigError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}
_NAMED = 3
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """Dtype name and shape, as a safetensors header has them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def is_mlx_folder(folder: Path) -> bool:
    """Whether a folder holds weights that say that MLX wrote them."""
    config = folder / "config.json"
    if not config.is_file() or not (shards := sorted(folder.glob("model*.safetensors"))):
        return False
    try:
        with safe_open(shards[0], framework="numpy") as file:
            return (file.metadata() or {}).get("format") == "mlx"
    except (OSError, SafetensorError):
        # Damaged weights are told when it is opened, and not as those of a float checkpoint.
        return _is_quantized_by_mlx(config)


def _is_quantized_by_mlx(path: Path) -> bool:
    """By the key of a config that only MLX programs write."""
    try:
        config = read_json(path) or {}
    except ConfigError:
        return False
    return isinstance(config.get("quantization"), Mapping)


def describe_mlx_folder(folder: Path) -> dict[str, Any]:
    """A manifest for a folder that has none.

    Raises:
        ConfigError: not a Qwen2 that we run.
        BackendError: a quantization that we do not run, named.
        BundleError: files that cannot be read.
    """
    raw = read_json(folder / "config.json") or {}
    quantization = raw.get("quantization") or raw.get("quantization_config")
    if quantization is not None:
        _require_affine(quantization)
    tensors = _read_tensors(folder)
    plain = {key: value for key, value in raw.items() if not key.startswith("quantization")}
    plain.setdefault("tie_word_embeddings", "lm_head.weight" not in tensors)
    config = parse_config(plain, read_json(folder / "generation_config.json") or {})
    _require_whole(folder, tensors, config)
    if quantization is not None:
        # True for a module says no more than the settings for all.
        kept = {path: part for path, part in quantization.items() if part is not True}
        quantization = kept | _left_as_floats(tensors, config)
    dtype = _DTYPES.get(tensors["model.norm.weight"].dtype, "bfloat16")
    parts = _by_kind(tensors, config)
    matrices = [part for kind, part in parts.items() if kind not in ("norms", "biases")]
    stored = sum(part["bytes"] for part in matrices)
    return {
        "format_version": 1,
        "target": "mlx",
        "device": "any",
        "dtype": dtype,
        "source": {"id": folder.absolute().name, "sha256": {}},
        "config": plain,
        "quantization": quantization,
        "scheme": _scheme_name(quantization, config),
        "schemes": {},
        "method": "unknown",
        "parameters": config.parameters,
        "bits_per_weight": round(8 * stored / sum(part["parameters"] for part in matrices), 4),
        "by_kind": parts,
        "weight_bytes": sum(tensor.bytes for tensor in tensors.values()),
        "rope": rope_facts([config.rope], config.rope.max_positions, config.rope.factor),
        "inputs": [],
        "optional_inputs": [],
        "outputs": [],
        "cache": {
            "layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "dtype": dtype,
            "layout": "stepped",
        },
        "eos_token_ids": list(config.eos_token_ids),
        "files": {
            path.name: {"bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())
            if path.is_file()
        },
        "quality": {},
        "versions": {},
    }


def _require_affine(quantization: Any) -> None:
    """Raises BackendError for modes, bits and groups that MLX's affine matmul does not have."""
    if not isinstance(quantization, Mapping):
        raise BackendError(f"quantization must be an object, got {quantization!r:.80}")
    named = {path: part for path, part in quantization.items() if isinstance(part, Mapping)}
    for place, settings in {"quantization": quantization, **named}.items():
        mode = settings.get("mode", "affine")
        if mode != "affine":
            raise BackendError(
                f"{place} has the mode {mode!r}; expected 'affine': make the folder again with "
                "qwen2x export --to mlx, or mlx-lm's convert with -q alone"
            )
        bits, group_size = settings.get("bits", 4), settings.get("group_size") or 64
        if bits not in BITS or group_size not in GROUP_SIZES:
            raise BackendError(
                f"{place} has {bits!r} bits in groups of {group_size!r}; expected bits of "
                f"{', '.join(map(str, BITS))} and groups of {', '.join(map(str, GROUP_SIZES))}"
            )


def _read_tensors(folder: Path) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (the file is no dictionary)
                    part = file.get_slice(name)
                    tensors[name] = _Tensor(dtype=part.get_dtype(), shape=tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise BundleError(
                f"{path} is not an intact safetensors file ({str(error).splitlines()[0]}); "
                "fetch it again"
            ) from None
    unknown = sorted({tensor.dtype for tensor in tensors.values()} - set(_ITEM_BYTES))
    if unknown:
        raise BackendError(
            f"{folder} holds tensors of {', '.join(unknown)}; expected "
            f"{', '.join(_ITEM_BYTES)} (affine quantization or floats)"
        )
    return tensors


def _require_whole(folder: Path, tensors: Mapping[str, _Tensor], config: Qwen2Config) -> None:
    missing = [name for name in config.expected_tensors() if name not in tensors]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise BundleError(
            f"{folder} lacks {', '.join(missing[:_NAMED])}{more}; expected a whole Qwen2 for MLX: "
            "fetch it again"
        )


def _left_as_floats(tensors: Mapping[str, _Tensor], config: Qwen2Config) -> dict[str, bool]:
    """False for every matrix without scales: groups that do not divide its columns go unsaid."""
    modules = [
        name.removesuffix(".weight")
        for name, shape in config.expected_tensors().items()
        if len(shape) == 2
    ]
    return {module: False for module in modules if f"{module}.scales" not in tensors}


def _by_kind(tensors: Mapping[str, _Tensor], config: Qwen2Config) -> dict[str, dict[str, float]]:
    """Parameters, bytes and bits per weight of each part."""
    parts: dict[str, dict[str, float]] = {}
    for name, shape in config.expected_tensors().items():
        part = parts.setdefault(kind_of(name), {"parameters": 0, "bytes": 0})
        part["parameters"] += math.prod(shape)
        module = name.removesuffix(".weight")
        names = (name, f"{module}.scales", f"{module}.biases")
        part["bytes"] += sum(tensors[item].bytes for item in names if item in tensors)
    for part in parts.values():
        part["bits_per_weight"] = round(8 * part["bytes"] / part["parameters"], 4)
    return parts


def _scheme_name(quantization: Mapping[str, Any] | None, config: Qwen2Config) -> str:
    """What most of the layers' quantized parameters have; a mixed recipe overrides its own bits."""
    parameters: Counter[str] = Counter()
    for name, shape in config.expected_tensors().items():
        if quantization is None or len(shape) != 2 or not name.startswith("model.layers."):
            continue
        settings = quantization.get(name.removesuffix(".weight"), quantization)
        if settings is not False:
            bits, group_size = settings.get("bits", 4), settings.get("group_size") or 64
            parameters[f"int{bits}-g{group_size}"] += math.prod(shape)
    return parameters.most_common(1)[0][0] if parameters else "float"
