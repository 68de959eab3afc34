"""Prefill and decode speed of our 4-bit bundle against onnxruntime-genai on its own 4-bit export.

    python -m benchmarks.speed CHECKPOINT [--repeat 3] [--rounds 2] [--threads 2]

Same checkpoint, same prompt of 512 tokens, 128 new tokens; in turn, and the best median of the
rounds counts. The peer runs twice: as its builder configures it (which is one thread on some
machines), and with the same number of threads as ours forced by an overlay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    QWEN2X,
    build_with_genai,
    genai_environment,
    run_json,
    run_measured,
    write_result,
)
from qwen2x.cli.judging import read_text
from qwen2x.runtimes.tokenizer import Tokenizer

PROMPT, NEW = 512, 128
PEER, PEER_FORCED = "onnxruntime-genai", "onnxruntime-genai, threads forced"
SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    environment = genai_environment()
    ids = Tokenizer(args.checkpoint).encode(read_text(None))[:PROMPT]
    script = Path(__file__).with_name("genai_speed.py")
    rounds: dict[str, list[dict[str, Any]]] = {"qwen2x": [], PEER: [], PEER_FORCED: []}
    with tempfile.TemporaryDirectory() as folder:
        bundle, genai = Path(folder) / "ours", Path(folder) / "genai"
        run_measured(
            [*QWEN2X, "export", args.checkpoint, "--bits", "4", "--method", "rtn", "-o", bundle]
        )
        build_with_genai(environment, args.checkpoint, genai)
        ours = [
            *QWEN2X, "bench", bundle, "--prompt-tokens", PROMPT, "--new-tokens", NEW,
            "--repeat", args.repeat, "--threads", args.threads, "--json",
        ]  # fmt: skip
        theirs = [environment.python, script, genai, json.dumps(ids), NEW, args.repeat]
        for _ in range(args.rounds):
            rounds["qwen2x"].append(run_json(ours))
            rounds[PEER].append(run_json([*theirs, 0]))
            rounds[PEER_FORCED].append(run_json([*theirs, args.threads]))
    best = {
        who: {name: max(run[name] for run in runs) for name in SPEEDS}
        for who, runs in rounds.items()
    }
    ratios = {
        who: {name: best["qwen2x"][name] / best[who][name] for name in SPEEDS}
        for who in (PEER, PEER_FORCED)
    }
    write_result(
        "speed",
        {
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "threads": args.threads,
            "rounds": rounds,
            "best": best,
            "ratio_to": ratios,
        },
    )


if __name__ == "__main__":
    main()
