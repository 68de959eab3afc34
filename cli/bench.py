"""``qwen2x bench``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from qwen2x.cli.machine import peak_memory_bytes, physical_cores
from qwen2x.cli.options import json_option, place_options
from qwen2x.cli.output import log, print_json, print_table, size_text

if TYPE_CHECKING:
    from qwen2x.runtimes.runtime import Logits, Runtime


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
@place_options
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
            ("first token", f"{result['time_to_first_token_s']:.3f} s"),
            ("load", f"{result['load_s']:.2f} s"),
            ("weights", size_text(result["weight_bytes"])),
            ("peak memory", size_text(result["peak_memory_bytes"])),
        ]
    )  # fmt: skip


def run_bench(
    bundle: Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repeat: int = 3,
    threads: int | None = None,
    device: str = "auto",
    graph: bool = False,
    kv_bits: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """The object that ``bench --json`` prints; each run is told on standard error unless quiet."""
    from qwen2x.cli.judging import read_text
    from qwen2x.runtimes.bench import bench
    from qwen2x.runtimes.generate import read_text_files
    from qwen2x.runtimes.runtime import open_runtime

    started = time.perf_counter()
    with open_runtime(bundle, device=device, threads=threads, graph=graph) as runtime:
        load_s = time.perf_counter() - started
        text_ids = read_text_files(runtime.folder).tokenizer.encode(read_text(None))
        timed = runtime if quiet else cast("Runtime", _Told(runtime, repeat))
        speed = bench(timed, text_ids, prompt_tokens, new_tokens, repeat)
        return {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repeats": repeat,
            "prefill_tokens_per_s": speed.prefill_tokens_per_s,
            "decode_tokens_per_s": speed.decode_tokens_per_s,
            "time_to_first_token_s": speed.time_to_first_token_s,
            "load_s": load_s,
            "weight_bytes": runtime.weight_bytes,
            "bits_per_weight": runtime.bits_per_weight,
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": threads or physical_cores(),
            "backend": runtime.backend,
            "device": runtime.device,
        }


class _Told:
    """A runtime that tells of every run, which begins and ends with a reset.

    It speaks in ``reset`` only, where ``bench`` does not measure.
    """

    def __init__(self, runtime: Runtime, repeat: int) -> None:
        self._runtime = runtime
        self._names = ["warm-up", *(f"run {run} of {repeat}" for run in range(1, repeat + 1))]
        self._prompt_tokens = self._steps = 0
        self._prefill_s = self._prefilled = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def prefill(self, token_ids: Sequence[int]) -> Logits:
        """See ``Runtime``."""
        started = time.perf_counter()
        logits = self._runtime.prefill(token_ids)
        self._prefilled = time.perf_counter()
        self._prefill_s, self._prompt_tokens = self._prefilled - started, len(token_ids)
        return logits

    def decode(self, token_id: int) -> Logits:
        """See ``Runtime``."""
        self._steps += 1
        return self._runtime.decode(token_id)

    def reset(self) -> None:
        """See ``Runtime``."""
        if self._steps:
            decode_s = time.perf_counter() - self._prefilled
            log(
                f"{self._names.pop(0)}: prefill {self._prompt_tokens / self._prefill_s:.1f} "
                f"tokens/s, decode {self._steps / decode_s:.1f} tokens/s"
            )
            self._steps = 0
        else:
            log("warming up")
        self._runtime.reset()
