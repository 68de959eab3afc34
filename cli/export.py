"""``qwen2x export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qwen2x.cli.machine import peak_memory_bytes
from qwen2x.cli.options import json_option, quantize_options
from qwen2x.cli.output import byte_progress, log, print_json, print_table, size_text


@click.command(
    "export",
    epilog="\b\nExample: qwen2x export Qwen/Qwen2.5-0.5B-Instruct --to onnx --bits 4 -o qwen-int4",
)
@click.argument("source")
@click.option(
    "--to", "target", type=click.Choice(["onnx"]), default="onnx", show_default=True,
    help="What to write.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The bundle's folder. Needed.")
@quantize_options
@click.option(
    "--method", type=click.Choice(["auto", "rtn"]), default="auto", show_default=True,
    help="How to quantize. rtn: round to scales of least squared error, no calibration.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="What the graph is built for.",
)  # fmt: skip
@click.option("--max-context", type=int, help="Positions to prepare for. Default: all it can.")
@click.option("--revision", help="Branch, tag or commit, when SOURCE is a hub id. Default: main.")
@click.option("--dry-run", is_flag=True, help="Only show files, bytes, bits per weight, memory.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@json_option
def command(
    source: str,
    target: str,
    out: Path | None,
    bits: str | None,
    group_size: str,
    revision: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a Hugging Face folder or hub id, into the folder OUT.

    Weights are read, quantized and written row by row, so memory does not grow with the model. An
    export that was killed goes on where it stopped when the same command is run again.
    """
    from qwen2x.exporters.onnx_export import Options

    _refuse_without_bits(bits)
    chosen = Options(bits=int(bits) if bits else None, group_size=int(group_size), **options)
    if dry_run:
        _dry_run(source, chosen, revision, as_json)
        return
    if out is None:
        raise click.UsageError(
            "missing -o FOLDER: where to write the bundle", click.get_current_context()
        )
    from qwen2x.exporters.exporter import export

    started = time.monotonic()
    with byte_progress(f"exporting {source}", quiet=as_json) as progress:
        done = export(
            source, target, out=out, revision=revision, force=force, progress=progress,
            **vars(chosen),
        )  # fmt: skip
    manifest = done.manifest
    if options["dtype"] == "bfloat16" and manifest["dtype"] == "float32":
        log("on the CPU a bfloat16 export computes in float32; --device cuda keeps bfloat16")
    if "tokenizer.json" not in manifest["files"]:
        log("the checkpoint has no tokenizer.json: run, chat and validate will need one")
    files = [{"name": name, **facts} for name, facts in manifest["files"].items()]
    result = {
        "bundle": str(done.bundle),
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "bits_per_weight": manifest["bits_per_weight"],
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "scheme": manifest["scheme"],
    }
    if as_json:
        print_json(result)
        return
    click.echo(f"{done.bundle}: {manifest['scheme']} for {manifest['device']}")
    print_table(
        [
            (
                "size",
                f"{size_text(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight",
            ),
            ("time", f"{result['seconds']:.1f} s"),
            ("peak memory", size_text(result["peak_memory_bytes"])),
            ("check it", f"qwen2x validate {done.bundle} --against {source}"),
            ("run it", f'qwen2x run {done.bundle} "Hello"'),
        ]
    )


def _refuse_without_bits(bits: str | None) -> None:
    """Options of quantization that were given, but would have no effect."""
    context = click.get_current_context()
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("group_size", "method")
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if given and bits is None:
        raise click.UsageError(f"{' and '.join(given)} needs --bits 4 or --bits 8", context)


def _dry_run(source: str, options: Any, revision: str | None, as_json: bool) -> None:
    from qwen2x.exporters.config import read_config
    from qwen2x.exporters.hub import resolve_source
    from qwen2x.exporters.onnx_export import plan_export

    folder = resolve_source(source, revision=revision, weights=False)
    plan = plan_export(read_config(folder), options)
    files = [
        {"name": "model.onnx", "bytes": plan.model.ByteSize()},
        {"name": "model.onnx_data", "bytes": plan.layout.end},
    ]
    result = {
        "dry_run": True,
        "files": files,
        "bytes": plan.bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "scheme": plan.scheme_name,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "max_context": plan.recipe.max_context,
    }
    if as_json:
        print_json(result)
        return
    print_table(
        [(str(file["name"]), size_text(file["bytes"])) for file in files]
        + [
            ("bits per weight", f"{plan.bits_per_weight:.2f} ({plan.scheme_name})"),
            ("peak memory", f"at most {size_text(plan.peak_memory_bytes)}"),
            ("context", f"{plan.recipe.max_context} positions"),
        ]
    )
