"""Reading a long prompt: tokens per second and peak memory, beside llama.cpp in the same run.

    python -m benchmarks.long_prefill CHECKPOINT [--tokens 16384 32768] [--threads 2] [--rounds 1]

Ours is a 4-bit ONNX bundle, plainly rounded, without and with ``--prefill-int8``, and the same with
an 8-bit cache if ``--kv-bits`` is given; llama.cpp's is its Q4_0 with its own defaults (pieces of
512, flash attention where it chooses so, a float16 cache). Each is a process of its own, in turn,
and says its peak memory. Speed does not include loading. ``beyond_bytes`` is ours beyond the
bundle's weights and the cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import QWEN2X, TEXTS, run_json, run_measured, write_result
from benchmarks.quality_llama import llama_environment, quantize_with_llama
from qwen2x.runtimes.tokenizer import Tokenizer

LLAMA = "llama.cpp Q4_0"
SCRIPT = Path(__file__).with_name("long_prefill_llama.py")
# What the issue asks for: beyond weights and cache, and against llama.cpp's speed.
MOST_BEYOND, LEAST_RATIO = 1_000_000_000, 0.9
Measure = Callable[[int], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kv-bits", action="store_true", help="Measure an 8-bit cache too.")
    parser.add_argument("--dry", action="store_true", help="Print the result, and keep none.")
    args = parser.parse_args()
    environment = llama_environment()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = long_text(Tokenizer(args.checkpoint), max(args.tokens))
        ids = folder / "ids.json"
        ids.write_text(json.dumps(Tokenizer(args.checkpoint).encode(text)), encoding="utf-8")
        kinds: dict[str, tuple[str, ...]] = {
            "qwen2x": (),
            "qwen2x, --prefill-int8": ("--prefill-int8",),
        }
        if args.kv_bits:
            kinds["qwen2x, 8-bit cache"] = ("--kv-bits", "8")
        measures: dict[str, Measure] = {}
        for number, (name, options) in enumerate(kinds.items()):
            bundle = folder / f"ours-{number}"
            run_measured(
                [*QWEN2X, "export", args.checkpoint, "--bits", "4", "--method", "rtn", *options,
                 "-o", bundle]
            )  # fmt: skip
            measures[name] = ours(bundle, ids, args.threads)
        quantize_with_llama(environment, args.checkpoint, folder / "theirs.gguf", "Q4_0")
        measures[LLAMA] = theirs(environment.python, folder / "theirs.gguf", ids, args.threads)
        lengths = [compare(measures, count, args.rounds) for count in args.tokens]
    result = {"threads": args.threads, "rounds": args.rounds, "lengths": lengths}
    write_result("long_prefill", result, keep=not args.dry)


def long_text(tokenizer: Tokenizer, tokens: int) -> str:
    """Text of so many tokens: the benchmarks' own, again and again under other headings."""
    texts = [(TEXTS / f"{kind}.txt").read_text("utf-8") for kind in ("prose", "code")]
    parts: list[str] = []
    count = 0
    while count <= tokens:
        parts.append(f"Part {len(parts) + 1}\n\n{texts[len(parts) % len(texts)]}\n\n")
        count += len(tokenizer.encode(parts[-1]))
    return tokenizer.decode(tokenizer.encode("".join(parts))[:tokens])


def compare(measures: dict[str, Measure], count: int, rounds: int) -> dict[str, Any]:
    """The fastest of the rounds and the highest peak, by who."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure(count))
            print(name, found[name][-1], file=sys.stderr)
    best = {
        name: {
            **runs[0],
            "tokens_per_s": max(run["tokens_per_s"] for run in runs),
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        }
        for name, runs in found.items()
    }
    for name, run in best.items():
        if name != LLAMA:
            known = run["weight_bytes"] + run["cache_bytes"]
            run["beyond_bytes"] = run["peak_memory_bytes"] - known
            run["is_within_memory"] = run["beyond_bytes"] <= MOST_BEYOND
            run["ratio_to_llama"] = run["tokens_per_s"] / best[LLAMA]["tokens_per_s"]
            run["is_fast_enough"] = run["ratio_to_llama"] >= LEAST_RATIO
    return {"tokens": count, **best}


def ours(bundle: Path, ids: Path, threads: int) -> Measure:
    """Measures a bundle in a process of this module."""
    words = [sys.executable, "-m", "benchmarks.long_prefill", "--child", bundle, ids, threads]
    return lambda count: run_json([*words, count])


def theirs(python: Path, path: Path, ids: Path, threads: int) -> Measure:
    """Measures a GGUF file in llama.cpp's environment."""
    return lambda count: run_json([python, SCRIPT, path, ids, threads, count])


def child(bundle: str, ids: str, threads: str, count: str) -> None:
    """Prints what reading takes; the cache is made for the prompt beforehand, as ``run`` does."""
    from qwen2x.cli.machine import peak_memory_bytes
    from qwen2x.exporters.bundle import open_bundle
    from qwen2x.runtimes.runtime import open_runtime

    tokens: list[int] = json.loads(Path(ids).read_text(encoding="utf-8"))[: int(count)]
    with open_runtime(bundle, threads=int(threads)) as runtime:
        runtime.reserve(len(tokens))
        started = time.perf_counter()
        runtime.prefill(tokens)
        seconds = time.perf_counter() - started
        needs: Any = runtime
        result = {
            "prompt_tokens": len(tokens),
            "tokens_per_s": len(tokens) / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "weight_bytes": runtime.weight_bytes + open_bundle(Path(bundle)).prefill_bytes,
            "cache_bytes": len(tokens) * needs.needs.per_position,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
