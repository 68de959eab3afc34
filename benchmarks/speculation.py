"""Decode with guesses from the text against plain decode: on tasks that copy, and on others.

    python -m benchmarks.speculation CHECKPOINT [--rounds 3] [--threads 2] [--bundle BUNDLE]

Plain and ahead answer each task in turn, A B A B; the ratio is that of the medians of their seconds
per token. Greedy text is compared token by token. How far rounding alone goes is measured too: rows
of passes of four tokens against rows of single ones, on text that no model has read. Where the
likeliest token of such rows differs, a text may go another way, with as much right as the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, TEXTS, opened_bundle, write_result
from qwen2x.runtimes.generate import Generation, generate, read_text_files
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.sampler import Sampling

TOGETHER = 4


def tasks() -> dict[str, tuple[str, int]]:
    """Prompts, and how many tokens are answered; those that copy are named so."""
    code = (ROOT / "runtimes" / "surprises.py").read_text(encoding="utf-8")
    prose = (TEXTS / "prose.txt").read_text(encoding="utf-8")[:1500]
    return {
        "copy: edit this file": (
            "Rename the argument `top` to `limit`, and change nothing else. Give the whole file."
            f"\n\n```python\n{code}```",
            400,
        ),
        "copy: correct this text": (
            "Correct the spelling of this text, and repeat the rest of it word for word:\n\n"
            f"{prose}",
            300,
        ),
        "introduction": ("Give me a short introduction to large language models.", 150),
        "story": ("Write a story about a lighthouse keeper and a lost ship.", 200),
        "code": ("Write a Python function that parses a date, with tests.", 200),
        "summary": (f"Say in two sentences what this text is about:\n\n{prose}", 100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bundle", type=Path, help="measure this one instead of exporting 4 bits")
    args = parser.parse_args()
    with (
        opened_bundle(args.checkpoint, args.bundle) as bundle,
        open_runtime(bundle, threads=args.threads) as runtime,
    ):
        results = {
            name: measure(runtime, prompt, count, args.rounds)
            for name, (prompt, count) in tasks().items()
        }
        rounding = {kind: rounding_of(runtime, kind) for kind in ("prose", "code")}
    write_result(
        "speculation",
        {"threads": args.threads, "rounds": args.rounds, "tasks": results, "rounding": rounding},
    )


def measure(runtime: Runtime, prompt: str, count: int, rounds: int) -> dict[str, Any]:
    """Seconds per token of both, their ratio, and whether they say the same."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    last: dict[bool, Generation] = {}
    for _ in range(rounds):
        for ahead in seconds:
            runtime.reset()
            answer = generate(
                runtime, prompt, max_tokens=count, sampling=Sampling(), speculate=ahead
            ).run()
            seconds[ahead].append(answer.decode_s / max(1, len(answer.token_ids) - 1))
            last[ahead] = answer
    plain, guessed = last[False].token_ids, last[True].token_ids
    pairs = enumerate(zip(plain, guessed, strict=False))
    differs = next((place for place, (one, other) in pairs if one != other), None)
    return {
        "tokens": len(plain),
        "plain_tokens_per_s": 1 / median(seconds[False]),
        "ahead_tokens_per_s": 1 / median(seconds[True]),
        "ratio": median(seconds[False]) / median(seconds[True]),
        "is_identical": plain == guessed,
        "first_difference": differs,
        "speculation": vars(last[True].speculation or object()),
    }


def rounding_of(runtime: Runtime, kind: str, positions: int = 192) -> dict[str, Any]:
    """Rows of passes of several tokens against rows of passes of one, on a text that is given."""
    text = (TEXTS / f"{kind}.txt").read_text(encoding="utf-8")
    ids = read_text_files(runtime.folder).tokenizer.encode(text)[: 256 + positions]
    runtime.reset()
    runtime.prefill(ids[:256])
    single = np.stack([runtime.decode(token).copy() for token in ids[256:]])
    runtime.truncate(256)
    together = np.concatenate(
        [
            runtime.decode_guessed(ids[start : start + TOGETHER])
            for start in range(256, 256 + positions, TOGETHER)
        ]
    )
    return {
        "positions": positions,
        "tokens_per_pass": TOGETHER,
        "rows_equal_in_every_bit": int((single == together).all(axis=1).sum()),
        "max_abs_diff": float(np.abs(single - together).max()),
        "likeliest_differs": int((single.argmax(axis=1) != together.argmax(axis=1)).sum()),
    }


if __name__ == "__main__":
    main()
