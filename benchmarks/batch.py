"""Decode of several sequences in one session against one alone.

    python -m benchmarks.batch CHECKPOINT [--repeat 3] [--threads 2] [--bundle BUNDLE]

512 prompt and 64 new tokens. Each size is measured in turn with one alone, A B A B; medians.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.measure import opened_bundle, write_result
from qwen2x.cli.judging import read_text
from qwen2x.runtimes.bench import bench_batch, prompt_of
from qwen2x.runtimes.generate import read_text_files
from qwen2x.runtimes.runtime import open_runtime

PROMPT, NEW = 512, 64
SIZES = (2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bundle", type=Path, help="measure this one instead of exporting 4 bits")
    args = parser.parse_args()
    results: dict[int, dict[str, Any]] = {}
    with (
        opened_bundle(args.checkpoint, args.bundle) as bundle,
        open_runtime(bundle, threads=args.threads) as runtime,
    ):
        text = read_text_files(runtime.folder).tokenizer.encode(read_text(None))
        prompt = prompt_of(text, PROMPT)
        for size in SIZES:
            speed = bench_batch(runtime, prompt, NEW, size, args.repeat)
            together, alone = speed.batch_decode_tokens_per_s, speed.single_decode_tokens_per_s
            results[size] = {**vars(speed), "ratio": together / alone}
    write_result(
        "batch",
        {
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "threads": args.threads,
            "repeats": args.repeat,
            "by_sequences": results,
        },
    )


if __name__ == "__main__":
    main()
