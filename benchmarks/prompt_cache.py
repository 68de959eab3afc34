"""Time to the first token about a long document: first question, and next with ``--prompt-cache``.

    python -m benchmarks.prompt_cache CHECKPOINT [--tokens 16384] [--threads 2] [--mlx]

Both questions are ``qwen2x run`` processes of their own about the same text and a 4-bit bundle. The
time to the first token is from the prompt's token ids to the first new one; with the file it
includes opening, checking and reading it. A third run asks the second question without the file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.long_prefill import long_text
from benchmarks.measure import QWEN2X, run_json, run_measured, write_result
from qwen2x.runtimes.tokenizer import Tokenizer

QUESTIONS = ("What is this text about?", "Which name comes first in it?")
NEW = 16
TARGET = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mlx", action="store_true")
    parser.add_argument("--dry", action="store_true", help="Print the result, and keep none.")
    args = parser.parse_args()
    text = long_text(Tokenizer(args.checkpoint), args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        bundle, kept = Path(folder) / "bundle", Path(folder) / "document.cache"
        target = "mlx" if args.mlx else "onnx"
        run_measured(
            [*QWEN2X, "export", args.checkpoint, "--to", target, "--bits", "4", "--method", "rtn",
             "-o", bundle]
        )  # fmt: skip
        first = ask(bundle, text, 0, args.threads, kept)
        file_bytes = kept.stat().st_size
        second = ask(bundle, text, 1, args.threads, kept)
        plain = ask(bundle, text, 1, args.threads, None)
    ratio = second["timings"]["prefill_s"] / first["timings"]["prefill_s"]
    result = {
        "target": target,
        "threads": args.threads,
        "prompt_tokens": first["prompt_tokens"],
        "file_bytes": file_bytes,
        "first": figures(first),
        "second": figures(second),
        "second_without_file": figures(plain),
        "ratio": ratio,
        "is_within_target": ratio <= TARGET,
        "same_answer": second["token_ids"] == plain["token_ids"],
    }
    name = "prompt_cache_mlx" if args.mlx else "prompt_cache"
    write_result(name, result, keep=not args.dry)


def ask(bundle: Path, text: str, question: int, threads: int, kept: Path | None) -> dict[str, Any]:
    """What ``run --json`` prints, of a prompt on standard input."""
    prompt = bundle.with_name(f"prompt-{question}.txt")
    prompt.write_text(f"{text}\n\n{QUESTIONS[question]}", encoding="utf-8")
    words = [
        *QWEN2X, "run", bundle, "-", "--max-tokens", NEW, "--temperature", "0",
        "--repetition-penalty", "1", "--threads", threads, "--json",
    ]  # fmt: skip
    return run_json([*words, *(["--prompt-cache", kept] if kept else [])], stdin=prompt)


def figures(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "time_to_first_token_s": answer["timings"]["prefill_s"],
        "cached_tokens": answer["cached_tokens"],
        "peak_memory_bytes": answer["peak_memory_bytes"],
    }


if __name__ == "__main__":
    main()
