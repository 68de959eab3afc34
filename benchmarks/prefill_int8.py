"""What ``export --prefill-int8`` gives and costs: speed of a prompt, and logits behind it.

    python -m benchmarks.prefill_int8 CHECKPOINT [--rounds 5] [--threads 2] [--only 8]

Of each kind a bundle with the second graph and one without, in turn on one machine: prefill of 512
tokens, decode, and peak memory, by ``qwen2x bench``. Divergence is of the second half of every
window, read behind a cache that the first half was prefilled into, against transformers in float32.
4 bits are rounded plainly: what the second graph changes does not depend on how they were found.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import TEXTS, bench_bundle, write_result
from benchmarks.quality_reference import Reference, kl_divergence, log_softmax
from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.compare import windows_of
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.tokenizer import Tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "method": "rtn"},
    "8 bits": {"bits": 8},
    "8 bits for speed": {"bits": 8, "prefer": "speed"},
}
SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes")
PROMPT, NEW, TOKENS, WINDOW = 512, 64, 2048, 512
Windows = dict[str, list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="kinds whose names begin so")
    parser.add_argument("--dry", action="store_true", help="Print the result, and keep none.")
    args = parser.parse_args()
    tokenizer, reference = Tokenizer(args.checkpoint), Reference(args.checkpoint)
    windows = {
        text: windows_of(
            tokenizer.encode((TEXTS / f"{text}.txt").read_text(encoding="utf-8")), TOKENS, WINDOW
        )
        for text in ("prose", "code")
    }
    kinds = {}
    for kind, options in KINDS.items():
        if kind.startswith(args.only):
            with tempfile.TemporaryDirectory() as place:
                kinds[kind] = compare(args, Path(place), options, reference, windows)
    settings = {"threads": args.threads, "rounds": args.rounds, "prompt_tokens": PROMPT}
    write_result("prefill_int8", {**settings, "kinds": kinds}, keep=not args.dry)


def compare(
    args: argparse.Namespace,
    place: Path,
    options: dict[str, Any],
    reference: Reference,
    windows: Windows,
) -> dict[str, Any]:
    """Both bundles of a kind."""
    folders = {"plain": place / "plain", "int8": place / "int8"}
    for name, folder in folders.items():
        export(args.checkpoint, out=folder, prefill_int8=name == "int8", **options)
    runs = [
        {name: bench(folder, args.threads) for name, folder in folders.items()}
        for _ in range(args.rounds)
    ]
    sides: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        with open_runtime(folder, threads=args.threads) as runtime:
            divergence = {
                text: behind_prompt(runtime, reference, windows[text]) for text in windows
            }
        speeds = {key: median(run[name][key] for run in runs) for key in SPEEDS}
        sides[name] = {**speeds, "kl_mean": divergence}
    added = open_bundle(folders["int8"]).prefill_bytes
    ratio = {key: sides["int8"][key] / sides["plain"][key] for key in SPEEDS}
    return {**sides, "ratio": ratio, "added_weight_bytes": added, "runs": runs}


def bench(folder: Path, threads: int) -> dict[str, float]:
    """The speeds of one process, after a run to warm up."""
    found = bench_bundle(folder, threads=threads, prompt=PROMPT, new=NEW)
    return {key: found[key] for key in SPEEDS}


def behind_prompt(
    runtime: Runtime, reference: Reference, windows: Sequence[Sequence[int]]
) -> float:
    """Mean KL divergence of the second halves of windows, the first being a prompt."""
    found = []
    for window in windows:
        half = len(window) // 2
        runtime.reset()
        runtime.prefill(window[:half])
        given = torch.from_numpy(runtime.append(window[half:], keep=len(window) - half))
        found.append(kl_divergence(reference.log_probabilities(window)[half:], log_softmax(given)))
    return float(torch.cat(found).clamp(min=0).mean())


if __name__ == "__main__":
    main()
