"""``qwen2x export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qwen2x.cli.machine import peak_memory_bytes
from qwen2x.cli.options import json_option, quantize_options
from qwen2x.cli.output import byte_progress, layer_progress, log, print_json, print_table, size_text

if TYPE_CHECKING:
    from qwen2x.exporters.exporter import Export
    from qwen2x.exporters.options import Options


def read_factors(context: click.Context, option: object, text: str | None) -> Any:
    """A tuple of numbers, rising, of a list with commas."""
    if text is None:
        return None
    try:
        return tuple(sorted(float(word) for word in text.split(",")))
    except ValueError:
        raise click.UsageError(
            f"--yarn must be factors with commas between, such as 1,2,4; got {text!r}", context
        ) from None


@click.command(
    "export",
    epilog="\b\nExample: qwen2x export Qwen/Qwen2.5-0.5B-Instruct --to onnx --bits 4 -o qwen-int4",
)
@click.argument("source")
@click.option(
    "--to", "target", type=click.Choice(["onnx", "mlx"]), default="onnx", show_default=True,
    help="What to write: a graph for ONNX Runtime, or a folder for MLX and mlx-lm.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The bundle's folder. Needed.")
@quantize_options
@click.option(
    "--method", type=click.Choice(["auto", "rtn", "gptq"]), default="auto", show_default=True,
    help="How to quantize. rtn: round to scales of least squared error, in seconds. gptq: fitted "
    "to a text, layer by layer, in minutes; clearly closer to the original. auto: gptq for 4 bits "
    "and budgets, else rtn.",
)  # fmt: skip
@click.option(
    "--bits-per-weight", type=float,
    help="In place of --bits: a budget of stored bits over all weights, such as 4.6, spent where "
    "measurements say that it matters. Default: none.",
)  # fmt: skip
@click.option(
    "--max-bytes", type=int,
    help="The same budget in bytes, of weights and graph, without tokenizer files and the copy of "
    "--prefill-int8. Default: none.",
)  # fmt: skip
@click.option(
    "--asymmetric", is_flag=True,
    help="4-bit groups may have zero points of their own: closer for their size, 1 or 2 % slower.",
)  # fmt: skip
@click.option(
    "--prefer", type=click.Choice(["quality", "speed"]), default="quality", show_default=True,
    help="speed: fewer bytes in what multiplies fastest (groups of 128, no 6 bits), for 4 bits, "
    "8 bits and budgets.",
)  # fmt: skip
@click.option(
    "--calibration", type=click.Path(),
    help="The text to measure with and to fit to. Default: a built-in mix.",
)  # fmt: skip
@click.option(
    "--kv-bits", type=click.Choice(["8"]),
    help="With --to onnx: a KV cache in 8 bits, a quarter of float32, fitted to a text in a minute "
    "or more. Default: in the float type.",
)  # fmt: skip
@click.option(
    "--prefill-int8", is_flag=True,
    help="With --to onnx, on the CPU: also write a graph that reads prompts by products of int8, "
    "with a copy of the layers' weights: a byte for each, on disk and in memory.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]),
    help="What an ONNX graph is built for. Default: cpu. An MLX folder is for every device.",
)  # fmt: skip
@click.option(
    "--graph", is_flag=True,
    help="With --to mlx: also trace the forward pass into decode.mlxfn, for run --graph.",
)  # fmt: skip
@click.option("--max-context", type=int, help="Positions to prepare for. Default: all it can.")
@click.option(
    "--yarn", callback=read_factors,
    help="YaRN factors to choose from when it runs, such as 1,2,4 for 131,072 positions of a model "
    "with 32,768. Default: 1,2,4 for an Instruct model with 32,768, 1 and its own for a config "
    "with YaRN, else 1.",
)  # fmt: skip
@click.option(
    "--original-context", type=click.IntRange(1),
    help="Positions that the model was trained with. Default: what the config says.",
)  # fmt: skip
@click.option("--revision", help="Branch, tag or commit, when SOURCE is a hub id. Default: main.")
@click.option("--dry-run", is_flag=True, help="Only show files, bytes, bits per weight, memory.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@json_option
def command(
    source: str,
    out: Path | None,
    bits: str | None,
    group_size: str | None,
    kv_bits: str | None,
    revision: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a Hugging Face folder or hub id, into the folder OUT.

    Weights are read, quantized and written row by row, so memory does not grow with the model; with
    --method gptq or --kv-bits one layer and the text's activations are in memory. An export that
    was killed goes on where it stopped when the same command is run again.

    A GPTQ or AWQ checkpoint keeps its integers; --bits 8 is then for its embedding and head alone.
    """
    from qwen2x.exporters.options import Options

    has_budget = options["bits_per_weight"] is not None or options["max_bytes"] is not None
    if bits is None and not has_budget:
        _refuse_without_bits(kv_bits)
    chosen = Options(
        bits=int(bits) if bits else None,
        group_size=int(group_size) if group_size else None,
        kv_bits=int(kv_bits) if kv_bits else None,
        **options,
    )
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
            source, out=out, revision=revision, force=force, progress=progress,
            on_layer=layer_progress(quiet=as_json), **vars(chosen),
        )  # fmt: skip
    _warn(chosen, done.manifest)
    result = _result(done, time.monotonic() - started)
    if as_json:
        print_json(result)
    else:
        _print(source, done, result)


def _warn(chosen: Options, manifest: dict[str, Any]) -> None:
    """What came out other than some would expect."""
    if chosen.dtype == "bfloat16" and manifest["dtype"] == "float32":
        log("on the CPU a bfloat16 export computes in float32; --device cuda keeps bfloat16")
    if "tokenizer.json" not in manifest["files"]:
        log("the checkpoint has no tokenizer.json: run, chat and validate will need one")
    for note in manifest["notes"]:
        log(f"{note}; qwen2x run follows the checkpoint")


def _result(done: Export, seconds: float) -> dict[str, Any]:
    """The object that ``export --json`` prints."""
    manifest = done.manifest
    files = [{"name": name, **facts} for name, facts in manifest["files"].items()]
    return {
        "bundle": str(done.bundle),
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "bits_per_weight": manifest["bits_per_weight"],
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "scheme": manifest["scheme"],
        "target": manifest["target"],
        "dtype": manifest["dtype"],
    }


def _print(source: str, done: Export, result: dict[str, Any]) -> None:
    manifest = done.manifest
    place = "" if manifest["device"] == "any" else f" for {manifest['device']}"
    click.echo(f"{done.bundle}: {manifest['target']} {manifest['scheme']}{place}")
    size, bits = size_text(result["bytes"]), result["bits_per_weight"]
    print_table(
        [
            ("size", f"{size}, {bits:.2f} bits per weight"),
            ("time", f"{result['seconds']:.1f} s"),
            ("peak memory", size_text(result["peak_memory_bytes"])),
            ("check it", f"qwen2x validate {done.bundle} --against {source}"),
            ("run it", f'qwen2x run {done.bundle} "Hello"'),
        ]
    )


def _refuse_without_bits(kv_bits: str | None) -> None:
    """Options of quantization that were given, but would have no effect."""
    names = ("group_size", "method", "asymmetric", "prefer", *(() if kv_bits else ("calibration",)))
    context = click.get_current_context()
    given = [
        f"--{name.replace('_', '-')}"
        for name in names
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{' and '.join(given)} needs --bits 4 or --bits 8", context)


def _dry_run(source: str, options: Options, revision: str | None, as_json: bool) -> None:
    from qwen2x.exporters.bundle_writer import estimate_peak_memory
    from qwen2x.exporters.config import read_config
    from qwen2x.exporters.export_plan import planned_files
    from qwen2x.exporters.exporter import plan_export
    from qwen2x.exporters.hub import resolve_source
    from qwen2x.exporters.weights import bits_per_weight
    from qwen2x.exporters.yarn_factors import choose_factors

    folder = resolve_source(source, revision=revision, weights=False)
    options = choose_factors(options, folder)
    plan = plan_export(read_config(folder, options.original_context), options)
    files = planned_files(plan)
    bits, scheme = bits_per_weight(plan.weights), plan.bit_plan.name
    expected = ", as is typical: measurements will decide" if options.is_planned else ""
    context, peak = options.context_of(plan.config), estimate_peak_memory(plan)
    factors = [rope.factor for rope in options.ropes_of(plan.config)]
    if as_json:
        print_json(
            {
                "dry_run": True,
                "files": [{"name": name, "bytes": size} for name, size in files.items()],
                "bytes": sum(files.values()),
                "bits_per_weight": round(bits, 4),
                "scheme": scheme,
                "peak_memory_bytes": peak,
                "max_context": context,
                "yarn": factors,
                "is_expected": options.is_planned,
            }
        )
        return
    print_table(
        [(name, size_text(size)) for name, size in files.items()]
        + [
            ("bits per weight", f"{bits:.2f} ({scheme}){expected}"),
            ("peak memory", f"at most {size_text(peak)}"),
            ("context", f"{context} positions{_factors_text(factors)}"),
        ]
    )


def _factors_text(factors: list[float]) -> str:
    """Nothing for the plain rope alone."""
    listed = ", ".join(f"{factor:g}" for factor in factors)
    return "" if factors == [1] else f", YaRN factor {listed}"
