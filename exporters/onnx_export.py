"""``export --to onnx``: checkpoint folder in, bundle folder out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qwen2x.exporters.bundle import FORMAT_VERSION, describe_files, sha256_of, write_manifest
from qwen2x.exporters.checkpoint import Checkpoint, open_checkpoint
from qwen2x.exporters.config import Qwen2Config, read_json
from qwen2x.exporters.genai_config import genai_config
from qwen2x.exporters.onnx_graph import Recipe, build_graph
from qwen2x.exporters.onnx_target import find_target
from qwen2x.exporters.onnx_weights import DATA_FILE, WeightLayout
from qwen2x.exporters.onnx_writer import CHUNK_ELEMENTS, JOURNAL, Progress, write_weights
from qwen2x.exporters.staging import KEY_FILE, require_space, stage_folder
from qwen2x.exporters.tokenizer_files import TOKENIZER_FILES, require_tokenizer_fits
from qwen2x.quantize.errors import BundleError, ConfigError, SchemeError
from qwen2x.quantize.scheme import Scheme

GRAPH_FILE = "model.onnx"
DEFAULT_GROUP_SIZE = 32
# auto is the best that there is: today rounding to scales of least squared error.
METHODS = ("auto", "rtn")
# What Python, NumPy and onnx occupy, and what one worker's chunk needs in all its forms.
_BASE_MEMORY = 130 << 20
_WORKERS, _BYTES_PER_CHUNK_ELEMENT = 4, 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything but the source that decides a bundle's content; part of its cache key."""

    device: str = "cpu"
    dtype: str | None = None
    bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    method: str = "auto"
    max_context: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an export will write."""

    recipe: Recipe
    model: onnx.ModelProto
    layout: WeightLayout

    @property
    def scheme_name(self) -> str:
        """For example ``int4-g32``, or ``float``."""
        return self.recipe.scheme.name if self.recipe.scheme else "float"

    @property
    def bits_per_weight(self) -> float:
        """Every stored byte of the matrices over their parameters."""
        matrices = [weight for weight in self.layout.weights if weight.columns > 1]
        parameters = sum(weight.rows * weight.columns for weight in matrices)
        return 8 * sum(weight.bytes for weight in matrices) / parameters

    @property
    def bytes(self) -> int:
        """Graph and data file together."""
        return self.layout.end + int(self.model.ByteSize())

    @property
    def peak_memory_bytes(self) -> int:
        """An estimate. Of the model's size, only a row of its widest matrix matters."""
        widest = max(weight.columns for weight in self.layout.weights)
        chunk = max(CHUNK_ELEMENTS, widest)
        return _BASE_MEMORY + 2 * _WORKERS * chunk * _BYTES_PER_CHUNK_ELEMENT


def plan_export(config: Qwen2Config, options: Options) -> Plan:
    """The graph and its data file's layout, without reading a weight.

    Raises:
        SchemeError, BackendError, ConfigError: options that do not fit the model or each other.
    """
    if options.method not in METHODS:
        raise SchemeError(f"method must be {' or '.join(METHODS)}, got {options.method!r}")
    scheme = None
    if options.bits is not None:
        scheme = Scheme(bits=options.bits, group_size=options.group_size)
    reach = config.rope.max_positions
    max_context = reach if options.max_context is None else options.max_context
    if not 1 <= max_context <= reach:
        raise ConfigError(f"--max-context must be in 1..{reach} for this model, got {max_context}")
    recipe = Recipe(
        config=config,
        target=find_target(options.device, options.dtype, is_quantized=scheme is not None),
        scheme=scheme,
        sensitive_scheme=_sensitive_scheme(scheme, config.hidden_size),
        max_context=max_context,
    )
    model, layout = build_graph(recipe)
    return Plan(recipe=recipe, model=model, layout=layout)


def export_onnx(
    folder: Path, out: Path, options: Options, *, source_id: str, force: bool, progress: Progress
) -> dict[str, Any]:
    """Writes the bundle and gives its manifest.

    Raises:
        InputError: everything that is the user's to mend; nothing is left behind then.
    """
    started = time.monotonic()
    with open_checkpoint(folder) as checkpoint:
        plan = plan_export(checkpoint.config, options)
        require_tokenizer_fits(folder, checkpoint.config.vocab_size)
        _require_source_outside(checkpoint, out)
        require_space(out, plan.bytes)
        key = {"options": asdict(options), "source": _identity(checkpoint), "version": _version()}
        with stage_folder(out, key, force=force) as staging, _source_hashes(checkpoint) as hashes:
            _keep_only_weights(staging)
            onnx.save_model(plan.model, staging / GRAPH_FILE)
            write_weights(checkpoint, plan.layout, staging / DATA_FILE, progress)
            _write_companions(folder, staging, plan)
            sha256 = {name: future.result() for name, future in hashes.items()}
            manifest = _manifest(plan, {"id": source_id, "sha256": sha256}, staging)
            manifest["seconds"] = round(time.monotonic() - started, 3)
            write_manifest(staging, manifest)
            (staging / JOURNAL).unlink()
    return manifest


def _require_source_outside(checkpoint: Checkpoint, out: Path) -> None:
    """Raises BundleError where the bundle would take the place of the checkpoint's own files."""
    target = Path(os.path.realpath(out))
    files = [checkpoint.folder, *(checkpoint.folder / shard for shard in checkpoint.shards)]
    for file in files:
        place = Path(os.path.realpath(file))
        if target == place or target in place.parents:
            raise BundleError(
                f"{out} holds the checkpoint itself ({checkpoint.folder}); "
                "choose another folder for the bundle"
            )


def _sensitive_scheme(scheme: Scheme | None, columns: int) -> Scheme | None:
    """8 bits for what loses most by rounding: q, k, v, embedding and head.

    With 4 bits there, the 0.5B checkpoint's divergence from PyTorch is nearly twice as large, for
    a sixth fewer bytes. Groups of 128 where they fit: at 8 bits smaller ones gain nothing, and the
    head is read whole for every token.
    """
    if scheme is None or scheme.bits == 8:
        return scheme
    return Scheme(bits=8, group_size=128 if columns % 128 == 0 else scheme.group_size)


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Config, and size and time of every shard: whether a partial export is of the same source."""
    stats = {shard: (checkpoint.folder / shard).stat() for shard in checkpoint.shards}
    shards = {shard: [stat.st_size, stat.st_mtime_ns] for shard, stat in stats.items()}
    return {"config": checkpoint.config.raw, "shards": shards}


@contextmanager
def _source_hashes(checkpoint: Checkpoint) -> Iterator[dict[str, Future[str]]]:
    """Hashes the source's files beside the export; on leaving, those not begun are let be."""
    with ThreadPoolExecutor(1) as pool:
        names = ["config.json", *checkpoint.shards]
        try:
            yield {name: pool.submit(sha256_of, checkpoint.folder / name) for name in names}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _keep_only_weights(staging: Path) -> None:
    """Of an interrupted export, all but the weights is written anew."""
    for path in staging.iterdir():
        if path.name not in (KEY_FILE, JOURNAL, DATA_FILE):
            path.unlink()


def _write_companions(folder: Path, staging: Path, plan: Plan) -> None:
    """Config, generation config, tokenizer, and onnxruntime-genai's config."""
    config = plan.recipe.config
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    generation = read_json(folder / "generation_config.json") or {}
    genai = genai_config(config, plan.recipe.target, plan.recipe.max_context, generation)
    for name, content in (("config.json", config.raw), ("genai_config.json", genai)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (staging / name).write_text(text + "\n", encoding="utf-8")


def _manifest(plan: Plan, source: dict[str, Any], staging: Path) -> dict[str, Any]:
    recipe, config, rope = plan.recipe, plan.recipe.config, plan.recipe.config.rope
    graph = plan.model.graph
    optional = {item.name for item in graph.initializer}
    return {
        "format_version": FORMAT_VERSION,
        "target": "onnx",
        "device": recipe.target.device,
        "dtype": recipe.target.dtype,
        "source": source,
        "config": config.raw,
        "scheme": plan.scheme_name,
        "method": "rtn" if recipe.scheme else "none",
        "schemes": {
            "layers": recipe.scheme.name if recipe.scheme else "float",
            "qkv_embedding_head": recipe.sensitive_scheme.name
            if recipe.sensitive_scheme
            else "float",
        },
        "parameters": config.parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "by_kind": _by_kind(plan),
        "weight_bytes": sum(weight.bytes for weight in plan.layout.weights),
        "rope": {
            "theta": rope.theta,
            "factors": [rope.factor],
            "original_max_position_embeddings": rope.original_max_position_embeddings
            or rope.max_position_embeddings,
            "attention_factors": [rope.attention_factor],
            "max_context": recipe.max_context,
        },
        "inputs": [item.name for item in graph.input if item.name not in optional],
        "optional_inputs": [item.name for item in graph.input if item.name in optional],
        "outputs": [item.name for item in graph.output],
        "cache": {
            "layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "dtype": recipe.target.dtype,
            "layout": recipe.target.cache_layout,
        },
        "eos_token_ids": list(config.eos_token_ids),
        "files": _describe(staging),
        "quality": {},
        "versions": {"qwen2x": _version(), "onnx": onnx.__version__, "numpy": np.__version__},
    }


# Which part of a model a weight belongs to, by a piece of its name; the first that fits.
_KINDS = (
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("norm", "norms"),
    (".bias", "biases"),
    ("self_attn", "attention"),
    ("mlp", "mlp"),
)


def kind_of(name: str) -> str:
    """``embedding``, ``head``, ``norms``, ``biases``, ``attention`` or ``mlp``."""
    return next(kind for piece, kind in _KINDS if piece in name)


def _by_kind(plan: Plan) -> dict[str, dict[str, float]]:
    """Parameters, bytes and bits per weight of each part."""
    parts: dict[str, dict[str, float]] = {}
    for weight in plan.layout.weights:
        part = parts.setdefault(kind_of(weight.name), {"parameters": 0, "bytes": 0})
        part["parameters"] += weight.rows * weight.columns
        part["bytes"] += weight.bytes
        part["bits_per_weight"] = round(8 * part["bytes"] / part["parameters"], 4)
    return parts


def _describe(staging: Path) -> dict[str, Any]:
    """The files that will be in the bundle: all but the notes for going on after a break."""
    return describe_files(staging, without=(KEY_FILE, JOURNAL))


def options_key(options: Options) -> str:
    """A short hash of options, for names in a cache."""
    text = json.dumps(asdict(options), sort_keys=True) + _version()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version() -> str:
    return importlib.metadata.version("qwen2x")
