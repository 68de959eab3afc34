"""A decode step behind caches of several lengths: attention by products, and by the one operator.

    python -m benchmarks.long_decode CHECKPOINT [--bundle BUNDLE] [--threads 2] [--rounds 3]

Both ways take turns in one process on one cache, A B A B; medians of steps. First the shortest
length is measured in a session whose graph has no choice, which is what short answers run.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import opened_bundle, write_result
from qwen2x.cli.judging import read_text
from qwen2x.runtimes.generate import read_text_files
from qwen2x.runtimes.onnx_runtime import OnnxRuntime
from qwen2x.runtimes.runtime import Runtime, open_runtime

LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
STEPS = 24
WARM_S = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path, help="measure this one instead of exporting 4 bits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with opened_bundle(args.checkpoint, args.bundle) as bundle:
        with open_runtime(bundle, threads=args.threads, room=LENGTHS[0] + STEPS) as runtime:
            ids = _text(runtime)
            runtime.append(ids[: LENGTHS[0]])
            _warm_up(runtime, ids)
            without = median(_step(runtime, ids) for _ in range(2 * args.rounds))
        with open_runtime(bundle, threads=args.threads) as runtime:
            assert isinstance(runtime, OnnxRuntime)
            runtime.append(ids[: LENGTHS[0]])
            _warm_up(runtime, ids)
            found = {length: measure(runtime, ids, length, args.rounds) for length in LENGTHS}
    first = found[LENGTHS[0]]["operator_s"]
    for each in found.values():
        each["ratio"] = each["operator_s"] / each["products_s"]
        each["speed_over_shortest"] = without / min(each["operator_s"], each["products_s"])
    write_result(
        "long_decode",
        {
            "bundle": bundle.name,
            "threads": args.threads,
            "rounds": args.rounds,
            "without_choice_s": without,
            "choice_s": first - without,
            "by_positions": found,
        },
    )


def measure(runtime: OnnxRuntime, ids: list[int], length: int, rounds: int) -> dict[str, Any]:
    """Seconds per step behind so many positions."""
    if length > runtime.cache_length:
        runtime.append(ids[runtime.cache_length : length])
    ways: dict[str, list[float]] = {"operator_s": [], "products_s": []}
    for _ in range(rounds):
        for way, taken in ways.items():
            runtime.products_from = 0 if way == "products_s" else runtime.max_context + 1
            taken.append(_step(runtime, ids))
    return {way: median(taken) for way, taken in ways.items()}


def _warm_up(runtime: Runtime, ids: list[int]) -> None:
    """Weights move into large pages beside the first steps."""
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_S:
        _step(runtime, ids)


def _step(runtime: Runtime, ids: list[int]) -> float:
    """The median of some steps, which are taken back."""
    length = runtime.cache_length
    seconds = []
    for token in ids[:STEPS]:
        started = time.perf_counter()
        runtime.decode(token)
        seconds.append(time.perf_counter() - started)
    runtime.truncate(length)
    return median(seconds)


def _text(runtime: Runtime) -> list[int]:
    ids = read_text_files(runtime.folder).tokenizer.encode(read_text(None))
    return ids * math.ceil(max(LENGTHS) / len(ids))


if __name__ == "__main__":
    main()
