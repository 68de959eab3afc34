"""``qwen2x bench``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2x.cli.machine import peak_memory_bytes, physical_cores
from qwen2x.cli.options import json_option, place_options, yarn_option
from qwen2x.cli.output import log, print_columns, print_json, print_table, size_text

if TYPE_CHECKING:
    from qwen2x.runtimes.bench import Speed
    from qwen2x.runtimes.profile import Profile

_SHOWN_OPERATORS = 8


@click.command("bench", epilog="\b\nExample: qwen2x bench qwen-int4 --threads 2")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Length of the prompt.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(2),
    default=128,
    show_default=True,
    help="Length of the answer.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Runs that the medians are of.",
)
@click.option(
    "--profile",
    "with_profile",
    is_flag=True,
    help="Also show where a prefill and a decode step go: operators, sampling, Python, and reading "
    "the weights. Default: speeds only.",
)
@click.option(
    "--batch",
    type=click.IntRange(2, 64),
    help="Also measure so many sequences that decode together. Default: one alone.",
)
@place_options
@yarn_option
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure prefill and decode speed of BUNDLE: medians of repeats after one to warm up."""
    result = run_bench(bundle, quiet=as_json, **options)
    if as_json:
        print_json(result)
        return
    click.echo(
        f"{bundle}: {result['bits_per_weight']:.2f} bits per weight, "
        f"{result['backend']} on {result['device']}, {result['threads']} threads"
    )
    print_table(
        [
            ("prefill", f"{result['prefill_tokens_per_s']:.1f} tokens/s "
                        f"({result['prompt_tokens']} tokens)"),
            ("decode", f"{result['decode_tokens_per_s']:.1f} tokens/s "
                       f"({result['new_tokens']} tokens)"),
            *_batch_lines(result),
            ("first token", f"{result['time_to_first_token_s']:.3f} s"),
            ("load", f"{result['load_s']:.2f} s"),
            ("weights", size_text(result["weight_bytes"])),
            ("peak memory", size_text(result["peak_memory_bytes"])),
        ]
    )  # fmt: skip
    if "profile" in result:
        show_profile(result)


def show_profile(result: Mapping[str, Any]) -> None:
    """The stages' longest operators, and what is around the graph."""
    found = result["profile"]
    click.echo(
        f"\nmemory gives {found['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s to "
        f"{result['threads']} threads; a decode step uses {found['weights_share']:.0%} of that for "
        "its weights"
    )
    for name, what in (("prefill", f"{result['prompt_tokens']} tokens"), ("decode", "one step")):
        stage = found[name]
        click.echo(f"\n{name}, {what}: {1e3 * stage['seconds']:.1f} ms")
        parts = [*stage["operators"][:_SHOWN_OPERATORS]]
        rest = stage["operators"][_SHOWN_OPERATORS:]
        parts.append(_sum_of("other operators", rest))
        parts.append({"name": "sampling", "seconds": stage["sampling_s"]})
        parts.append({"name": "Python around the graph", "seconds": stage["host_s"]})
        print_columns(
            [
                (
                    part["name"],
                    f"{1e3 * part['seconds']:8.2f} ms",
                    f"{part['seconds'] / stage['seconds']:6.1%}",
                    f"{part['calls']} calls" if part.get("calls") else "",
                )
                for part in parts
                if part["seconds"]
            ]
        )


def _sum_of(name: str, operators: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "calls": sum(operator["calls"] for operator in operators),
        "seconds": sum(operator["seconds"] for operator in operators),
    }


def _batch_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    if "batch" not in result:
        return []
    together, alone = result["batch_decode_tokens_per_s"], result["single_decode_tokens_per_s"]
    return [
        (
            f"batch of {result['batch']}",
            f"{together:.1f} tokens/s together, {together / alone:.2f} times one alone",
        )
    ]


def run_bench(
    bundle: Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repeat: int = 3,
    batch: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    graph: bool = False,
    kv_bits: str | None = None,
    yarn: Any = "auto",
    with_profile: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """The object that ``bench --json`` prints; each run is told on standard error unless quiet."""
    from qwen2x.cli.judging import read_text
    from qwen2x.runtimes.bench import bench, bench_batch, prompt_of
    from qwen2x.runtimes.generate import read_text_files
    from qwen2x.runtimes.profile import profile
    from qwen2x.runtimes.runtime import open_runtime

    started = time.perf_counter()
    place: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "graph": graph,
        "kv_bits": int(kv_bits) if kv_bits else None,
        "room": prompt_tokens + new_tokens,
    }
    with open_runtime(bundle, **place) as runtime:
        load_s = time.perf_counter() - started
        text_ids = read_text_files(runtime.folder).tokenizer.encode(read_text(None))
        if not quiet:
            log("warming up")
        tell = (
            (lambda run, speed: None) if quiet else (lambda run, speed: _tell(run, speed, repeat))
        )
        speed = bench(runtime, text_ids, prompt_tokens, new_tokens, repeat, tell, yarn=yarn)
        together: dict[str, Any] = {}
        if batch is not None:
            prompt = prompt_of(text_ids, prompt_tokens)
            measured = bench_batch(runtime, prompt, new_tokens, batch, repeat)
            together = {"batch": batch, **vars(measured)}
        result: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repeats": repeat,
            "prefill_tokens_per_s": speed.prefill_tokens_per_s,
            "decode_tokens_per_s": speed.decode_tokens_per_s,
            "time_to_first_token_s": speed.time_to_first_token_s,
            **together,
            "load_s": load_s,
            "weight_bytes": runtime.weight_bytes,
            "bits_per_weight": runtime.bits_per_weight,
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": threads or physical_cores(),
            "backend": runtime.backend,
            "device": runtime.device,
            "rope_factor": runtime.rope_factor,
        }
    if with_profile:
        # Recording takes time: it has a runtime of its own.
        with open_runtime(bundle, **place, record=True) as runtime:
            runtime.use_rope(result["rope_factor"])
            cores = threads or physical_cores()
            found = profile(runtime, text_ids, prompt_tokens, new_tokens, cores)
            result["profile"] = _profile_json(found, runtime.weight_bytes)
    return result


def _profile_json(found: Profile, weight_bytes: int) -> dict[str, Any]:
    stages = {name: asdict(stage) for name, stage in found.stages.items()}
    for name, stage in found.stages.items():
        stages[name]["host_s"] = stage.host_s
    return {
        "read_bandwidth_bytes_per_s": found.read_bandwidth,
        "weights_share": found.weights_share(weight_bytes),
        **stages,
    }


def _tell(run: int, speed: Speed, repeat: int) -> None:
    name = f"run {run} of {repeat}" if run else "warm-up"
    log(
        f"{name}: prefill {speed.prefill_tokens_per_s:.1f} tokens/s, "
        f"decode {speed.decode_tokens_per_s:.1f} tokens/s"
    )
