"""What YaRN factors cost a short prompt: a bundle with 1, 2 and 4 beside one without, in turn.

    python -m benchmarks.yarn_cost CHECKPOINT [--rounds 9] [--threads 2]

Both are rounded alike to 4 bits. Logits of both texts are compared bit for bit, prefill of 512 and
decode of 64 tokens by ``qwen2x bench``, each run a process of its own; medians count.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measure import TEXTS, bench_bundle, write_result
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.runtime import open_runtime
from qwen2x.runtimes.tokenizer import Tokenizer

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")
SIDES: dict[str, tuple[float, ...]] = {"plain": (1.0,), "factors": (1.0, 2.0, 4.0)}
PROMPT, NEW = 512, 64
# Of decode's speed.
MOST_LOST = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tokenizer = Tokenizer(args.checkpoint)
    texts = {
        name: tokenizer.encode((TEXTS / f"{name}.txt").read_text(encoding="utf-8"))[:PROMPT]
        for name in ("prose", "code")
    }
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in SIDES}
        for name, folder in folders.items():
            export(args.checkpoint, out=folder, bits=4, method="rtn", yarn=SIDES[name])
        is_equal = {text: same_logits(list(folders.values()), ids) for text, ids in texts.items()}
        rounds = [
            {name: bench(folder, args.threads) for name, folder in folders.items()}
            for _ in range(args.rounds)
        ]
    medians = {
        name: {key: median(found[name][key] for found in rounds) for key in SPEEDS}
        for name in SIDES
    }
    ratio = {key: medians["factors"][key] / medians["plain"][key] for key in SPEEDS}
    write_result(
        "yarn_cost",
        {
            "threads": args.threads,
            "logits_bit_identical": is_equal,
            "median": medians,
            "ratio": ratio,
            "decode_within_limit": ratio["decode_tokens_per_s"] >= 1 - MOST_LOST,
            "rounds": rounds,
        },
    )


def same_logits(folders: list[Path], ids: list[int]) -> bool:
    """Whether both give the same bits for a text."""
    rows = []
    for folder in folders:
        with open_runtime(folder) as runtime:
            runtime.use_rope(1.0)
            rows.append(runtime.logits(np.array([ids], np.int64)))
    return bool(np.array_equal(*rows))


def bench(folder: Path, threads: int) -> dict[str, Any]:
    """Speeds after a run to warm up."""
    found = bench_bundle(folder, threads=threads, prompt=PROMPT, new=NEW)
    return {key: found[key] for key in SPEEDS}


if __name__ == "__main__":
    main()
