"""Our MLX runtime against mlx-lm's on the same folder, same device, in turn.

    python -m benchmarks.mlx_speed [FOLDER ...] [--prompt-tokens 512] [--new-tokens 128]

Without folders, the small checkpoint that ships is exported as float32, as bfloat16 and in 4 bits:
on ``mlx[cpu]``, whose quantized product is scalar, larger ones say nothing. Tokens are greedy, made
by ``sample_ahead`` here and by ``generate_step`` there; medians of the repeats. CPU seconds are
given beside the wall's, since on a busy machine they say more. A GPU's result has its own file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step

from benchmarks.measure import ROOT, write_result
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.runtime import open_runtime
from qwen2x.runtimes.sampler import Sampling

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int4-g32 float32": {"dtype": "float32", "bits": 4, "method": "rtn"},
}
Tokens = Callable[[list[int], int], Iterator[int]]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one answer, by the wall's clock and by the CPU's."""

    prefill: float
    decode: float
    prefill_cpu: float
    decode_cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    sizes = args.prompt_tokens, args.new_tokens, args.repeat
    with tempfile.TemporaryDirectory() as place:
        folders = {str(folder): folder for folder in args.folders}
        if not folders:
            for name, options in VARIANTS.items():
                folders[name] = Path(place) / name.replace(" ", "-")
                source = ROOT / "examples" / "tiny-qwen2"
                export(source, "mlx", out=folders[name], **options)
        results = {name: measure(folder, *sizes) for name, folder in folders.items()}
    write_result(
        "mlx_speed" if mx.default_device().type == mx.cpu else "mlx_speed_gpu",
        {
            "device": mx.default_device().type.name,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "by_folder": results,
        },
    )


def measure(folder: Path, prompt_tokens: int, new_tokens: int, repeat: int) -> dict[str, Any]:
    """Tokens per second of both, and ours over theirs."""
    prompt = np.random.default_rng(0).integers(0, 2000, prompt_tokens).tolist()
    model = load(str(folder))[0]
    with open_runtime(folder) as runtime:

        def ours(ids: list[int], count: int) -> Iterator[int]:
            runtime.reset()
            return runtime.sample_ahead(  # type: ignore[attr-defined, no-any-return]
                ids, Sampling(), context=ids, known=runtime.vocab_size, limit=count
            )

        def theirs(ids: list[int], count: int) -> Iterator[int]:
            return (
                int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=count)
            )

        timings: dict[str, list[Timing]] = {"qwen2x": [], "mlx-lm": []}
        for run in range(repeat + 1):
            for name, way in (("qwen2x", ours), ("mlx-lm", theirs)):
                timing = time_answer(way, prompt, new_tokens)
                if run:  # the first one warms up
                    timings[name].append(timing)
    speeds = {name: speed(runs, prompt_tokens, new_tokens) for name, runs in timings.items()}
    ratios = {key: value / speeds["mlx-lm"][key] for key, value in speeds["qwen2x"].items()}
    return {**speeds, "ratio": ratios}


def time_answer(way: Tokens, prompt: list[int], new_tokens: int) -> Timing:
    clocks = [(time.perf_counter(), time.process_time())]
    tokens = way(prompt, new_tokens)
    next(tokens)
    clocks.append((time.perf_counter(), time.process_time()))
    for _ in tokens:
        pass
    clocks.append((time.perf_counter(), time.process_time()))
    start, first, end = clocks
    return Timing(
        prefill=first[0] - start[0],
        decode=end[0] - first[0],
        prefill_cpu=first[1] - start[1],
        decode_cpu=end[1] - first[1],
    )


def speed(runs: list[Timing], prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Tokens per second, of the wall's clock and of the CPU's."""
    counts = {"prefill": prompt_tokens, "decode": new_tokens - 1}
    return {
        f"{part}{clock}_tokens_per_s": count
        / median(getattr(timing, f"{part}{clock}") for timing in runs)
        for part, count in counts.items()
        for clock in ("", "_cpu")
    }


if __name__ == "__main__":
    main()
