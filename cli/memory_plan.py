"""What ``run --dry-run`` shows: the memory that an answer would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen2x.cli.options import MEGABYTE, find_model
from qwen2x.cli.output import print_json, print_table, size_text
from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.runtimes.footprint import Footprint


def show_footprint(
    model: str,
    text: str,
    *,
    system: str | None,
    raw: bool,
    max_tokens: int | None,
    yarn: Any,
    kv_bits: str | None,
    prefill_memory: int,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Prints it; no weight is read.

    Raises:
        RequestError: a prompt and tokens that context or memory have no room for.
    """
    from qwen2x.exporters.bundle import open_bundle
    from qwen2x.runtimes.footprint import footprint_of
    from qwen2x.runtimes.generate import prompt_ids_of, read_text_files

    if options["backend"] == "torch" or options["graph"]:
        raise RequestError(
            "--dry-run tells of ONNX bundles and MLX folders, not of --backend torch or --graph; "
            "leave it out"
        )
    folder = find_model(model, kv_bits=kv_bits, **options)
    bundle = open_bundle(folder)
    footprint = footprint_of(
        bundle,
        prompt_tokens=len(prompt_ids_of(read_text_files(folder), text, system, raw)),
        new_tokens=max_tokens,
        yarn=yarn,
        device=options["device"],
        kv_bits=int(kv_bits) if kv_bits and bundle.target == "mlx" else None,
        prefill_memory=prefill_memory * MEGABYTE,
    )
    footprint.require_fits(max_tokens or 1)
    if as_json:
        print_json(_result(footprint))
    else:
        print_table(_rows(footprint))


def _result(footprint: Footprint) -> dict[str, Any]:
    """The object that ``run --dry-run --json`` prints."""
    return {
        "dry_run": True,
        "prompt_tokens": footprint.prompt_tokens,
        "max_new_tokens": footprint.new_tokens,
        "rope_factor": footprint.rope_factor,
        "max_context": footprint.max_context,
        "weight_bytes": footprint.weight_bytes,
        "cache_bytes_per_token": footprint.chunking.needs.per_position,
        "cache_bytes": footprint.cache_bytes,
        "chunk_tokens": list(footprint.chunks),
        "work_bytes": footprint.work_bytes,
        "peak_memory_bytes": footprint.peak_bytes,
        "free_bytes": footprint.free_bytes,
        "fitting_tokens": footprint.fitting,
    }


def _rows(footprint: Footprint) -> list[tuple[str, str]]:
    each = size_text(footprint.chunking.needs.per_position)
    first, last = footprint.chunks
    chunks = f"{first} tokens" + (f", {last} at its end" if last < first else "")
    rows = [
        ("prompt", f"{footprint.prompt_tokens} tokens, read in pieces of {chunks}"),
        ("answer", f"at most {footprint.new_tokens} tokens"),
        ("weights", size_text(footprint.weight_bytes)),
        (
            "KV cache",
            f"{size_text(footprint.cache_bytes)} for {footprint.positions} tokens, {each} each",
        ),
        ("work", size_text(footprint.work_bytes)),
        ("peak memory", f"about {size_text(footprint.peak_bytes)}"),
    ]
    if footprint.free_bytes is not None and footprint.fitting is not None:
        rows.append(
            ("free", f"{size_text(footprint.free_bytes)}, room for {footprint.fitting} tokens")
        )
    return rows
