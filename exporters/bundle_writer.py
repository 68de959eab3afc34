"""From a checkpoint folder and a plan to a bundle on disk: the steps that all targets share."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qwen2x.exporters.bundle import FORMAT_VERSION, describe_files, sha256_of, write_manifest
from qwen2x.exporters.cache_calibration import (
    cache_calibration_memory,
    cache_text,
    calibrate_cache,
)
from qwen2x.exporters.calibration import (
    Calibration,
    OnLayer,
    calibration_memory,
    is_calibration_file,
    read_calibration,
)
from qwen2x.exporters.checkpoint import Checkpoint, open_checkpoint
from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.export_plan import Plan, planned_files
from qwen2x.exporters.measuring import measuring_memory
from qwen2x.exporters.model_card import CARD_FILE, model_card
from qwen2x.exporters.options import Options, version
from qwen2x.exporters.quantizing import prepare_quantizing
from qwen2x.exporters.rope import rope_facts
from qwen2x.exporters.staging import KEY_FILE, require_space, stage_folder
from qwen2x.exporters.tokenizer_files import TOKENIZER_FILES, require_tokenizer_fits
from qwen2x.exporters.weight_writer import (
    CHUNK_ELEMENTS,
    JOURNAL,
    Progress,
    write_weights,
)
from qwen2x.exporters.weights import DataFile, bits_per_weight, by_kind
from qwen2x.quantize.cache_ranges import CacheRanges
from qwen2x.quantize.errors import BundleError
from qwen2x.quantize.plan import BitPlan

# What Python, NumPy and onnx occupy, and what one worker's chunk needs in all its forms.
_BASE_MEMORY = 130 << 20
_WORKERS, _BYTES_PER_CHUNK_ELEMENT = 4, 20


def estimate_peak_memory(plan: Plan) -> int:
    """An estimate. Of the model's size, only a row of its widest matrix matters.

    Calibration holds a layer and the activations of its text as well.
    """
    chunk = max(CHUNK_ELEMENTS, *(weight.columns for weight in plan.weights))
    writing = 2 * _WORKERS * chunk * _BYTES_PER_CHUNK_ELEMENT
    if plan.config.quantization is not None:
        # Some columns of a mapped matrix lie on most of its pages.
        tensors = plan.config.expected_tensors()
        writing += plan.config.quantization.widest_matrix_bytes(tensors)
    reading = 0
    if plan.options.is_calibrated:
        reading = calibration_memory(plan.config)
    if plan.options.is_planned:
        reading = max(reading, measuring_memory(plan.config))
    if plan.options.kv_bits is not None:
        reading = max(reading, cache_calibration_memory(plan.config))
    return _BASE_MEMORY + max(writing, reading)


def write_bundle(
    folder: Path,
    out: Path,
    make_plan: Callable[[Checkpoint, BitPlan | None], Plan],
    options: Options,
    *,
    source_id: str,
    force: bool,
    progress: Progress,
    on_layer: OnLayer,
) -> dict[str, Any]:
    """Writes the bundle and gives its manifest.

    Args:
        folder: of the checkpoint.
        out: the bundle's.
        make_plan: gives what will be written, with schemes of its own or those that it is given.
        options: what was chosen.
        source_id: what the manifest calls the source.
        force: replace an existing folder.
        progress: told of bytes written, and bytes in all.
        on_layer: told of layers that are measured or rounded.

    Raises:
        InputError: everything that is the user's to mend; nothing is left behind then.
    """
    started = time.monotonic()
    with open_checkpoint(folder, options.original_context) as checkpoint:
        plan = make_plan(checkpoint, None)
        require_tokenizer_fits(folder, checkpoint.config.vocab_size)
        _require_source_outside(checkpoint, out)
        require_space(out, sum(planned_files(plan).values()))
        calibration = _calibration(checkpoint, options)
        key = {
            # Of the text its tokens count, not where it lies.
            "options": asdict(options) | {"calibration": calibration and calibration.sha256},
            "source": checkpoint.identity(),
            "version": version(),
        }
        with stage_folder(out, key, force=force) as staging, _source_hashes(checkpoint) as hashes:
            ready = prepare_quantizing(
                checkpoint,
                plan,
                lambda bit_plan: make_plan(checkpoint, bit_plan),
                calibration,
                staging,
                on_layer,
            )
            plan = ready.plan
            cache_ranges = _cache_ranges(checkpoint, calibration, options, staging, on_layer)
            _keep_only_weights(staging, plan.data_files)
            write_weights(
                checkpoint,
                [*plan.weights, *plan.prefill_weights],
                plan.data_files,
                staging,
                progress,
                ready.quantizer,
            )
            _copy_companions(folder, staging)
            added = plan.write_structure(staging, cache_ranges)
            sha256 = {name: future.result() for name, future in hashes.items()}
            manifest = _manifest(plan, {"id": source_id, "sha256": sha256}) | added
            manifest |= _calibration_facts(calibration, options, manifest["cache"])
            if ready.estimate is not None:
                manifest["quality"] = {"estimate": ready.estimate}
            calibration_files = {name for name in os.listdir(staging) if is_calibration_file(name)}
            not_promised = {KEY_FILE, JOURNAL, *calibration_files}
            manifest["files"] = describe_files(staging, without=not_promised)
            # Not among the files that are checked: its owner may write on it.
            card = model_card(manifest).encode(errors="backslashreplace")
            (staging / CARD_FILE).write_bytes(card)
            manifest["seconds"] = round(time.monotonic() - started, 3)
            write_manifest(staging, manifest)
            # Not earlier: what was interrupted until here need not calibrate again.
            for name in (JOURNAL, *calibration_files):
                (staging / name).unlink()
    return manifest


def _calibration(checkpoint: Checkpoint, options: Options) -> Calibration | None:
    if not options.reads_text:
        return None
    path = None if options.calibration is None else Path(options.calibration)
    return read_calibration(checkpoint.folder, path, checkpoint.config)


def _calibration_facts(
    calibration: Calibration | None, options: Options, cache: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest says of the text: for the matrices, and in ``cache`` for a cache's scales.

    They read different shares of it.
    """
    is_for_matrices = options.is_calibrated or options.is_planned
    facts = calibration.to_json() if calibration and is_for_matrices else None
    if calibration is not None and options.kv_bits is not None:
        cache = cache | {"calibration": cache_text(calibration).to_json()}
    return {"calibration": facts, "cache": cache}


def _cache_ranges(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    options: Options,
    staging: Path,
    on_layer: OnLayer,
) -> CacheRanges | None:
    if calibration is None or options.kv_bits is None:
        return None
    rope = options.ropes_of(checkpoint.config)[0]
    positions = min(options.context_of(checkpoint.config), rope.max_positions)
    return calibrate_cache(checkpoint, calibration, rope, positions, staging, on_layer)


def write_json(path: Path, content: Any) -> None:
    """Indented, as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


@contextmanager
def _source_hashes(checkpoint: Checkpoint) -> Iterator[dict[str, Future[str]]]:
    """Hashes the source's files beside the export; on leaving, those not begun are let be."""
    with ThreadPoolExecutor(1) as pool:
        names = ["config.json", *checkpoint.shards]
        try:
            yield {name: pool.submit(sha256_of, checkpoint.folder / name) for name in names}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _keep_only_weights(staging: Path, data_files: Sequence[DataFile]) -> None:
    """Of an interrupted export, all but the weights is written anew."""
    kept = {KEY_FILE, JOURNAL, *(file.name for file in data_files)}
    for path in staging.iterdir():
        if path.name not in kept and not is_calibration_file(path.name):
            path.unlink()


def _copy_companions(folder: Path, staging: Path) -> None:
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)


def _manifest(plan: Plan, source: dict[str, Any]) -> dict[str, Any]:
    config, options = plan.config, plan.options
    own = plan.manifest()
    return {
        "format_version": FORMAT_VERSION,
        "target": options.target,
        **own,
        "source": source,
        "config": config.raw,
        "scheme": plan.bit_plan.name,
        "method": config.quantization.method if config.quantization else _method(options),
        "imported": asdict(config.quantization) if config.quantization else None,
        "schemes": plan.bit_plan.summary(),
        "bit_plan": plan.bit_plan.to_json() if plan.bit_plan.is_mixed else None,
        "parameters": config.parameters,
        "bits_per_weight": round(bits_per_weight(plan.weights), 4),
        "by_kind": by_kind(plan.weights),
        "weight_bytes": sum(weight.bytes for weight in plan.weights),
        "rope": _rope(config, options),
        "eos_token_ids": list(config.eos_token_ids),
        "notes": [],
        "quality": {},
        "versions": {"qwen2x": version(), "numpy": np.__version__, **own["versions"]},
    }


def _rope(config: Qwen2Config, options: Options) -> dict[str, Any]:
    ropes = options.ropes_of(config)
    # Programs for MLX read config.json, those for ONNX run the graph's first table.
    default = config.rope if options.target == "mlx" else ropes[0]
    facts = rope_facts(ropes, options.context_of(config), default.factor)
    return facts | {"original_context": options.original_context}


def _method(options: Options) -> str:
    if not options.is_quantized:
        return "none"
    return "gptq" if options.is_calibrated else "rtn"


def cache_facts(config: Qwen2Config, dtype: str, layout: str) -> dict[str, Any]:
    """The manifest's ``cache``."""
    return {
        "layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "dtype": dtype,
        "layout": layout,
    }
