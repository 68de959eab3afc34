"""A fact hidden in filler text, asked for afterwards: is it found, wherever it lies?

    python -m benchmarks.needle CHECKPOINT [--bundle FOLDER] [--bits 4|8] [--kv-bits 8]
        [--lengths 2048,8192,32000] [--depths 0,0.25,0.5,0.75,1] [--yarn auto|1|2|4] [--name needle]

The whole of what the model's card promises, in several factors, which takes hours on a CPU:

    python -m benchmarks.needle CHECKPOINT --bits 8 --lengths 32000,65000,131000 --name needle_long

A prompt has so many tokens, with the chat template and 32 left for the answer; the fact stands at
that share of the filler. Each length and depth has a number of its own, and is read from an empty
cache. The result holds the answers, the factor that was used, and prefill's speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.measure import TEXTS, write_result
from qwen2x.cli.machine import peak_memory_bytes
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.generate import generate, read_text_files
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.sampler import Sampling

NEW_TOKENS = 32
FACT = " The number of the locker in which Ada keeps her violin is {number}."
QUESTION = (
    "\n\nWhat is the number of the locker in which Ada keeps her violin? "
    "Answer with the number alone."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path, help="one that is there already")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--kv-bits", type=int)
    parser.add_argument("--lengths", type=numbers(int), default=[2048, 8192])
    parser.add_argument("--depths", type=numbers(float), default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--yarn", default="auto")
    parser.add_argument("--name", default="needle")
    args = parser.parse_args()
    with ExitStack() as left:
        bundle = args.bundle
        if bundle is None:
            bundle = Path(left.enter_context(tempfile.TemporaryDirectory())) / "bundle"
            method = {"method": "rtn"} if args.bits else {}
            export(args.checkpoint, out=bundle, bits=args.bits, kv_bits=args.kv_bits, **method)
        runtime = left.enter_context(open_runtime(bundle))
        runs = [
            ask(runtime, length, depth, args.yarn)
            for length in args.lengths
            for depth in args.depths
        ]
    found = sum(run["is_found"] for run in runs)
    write_result(
        args.name,
        {
            "bits": args.bits,
            "kv_bits": args.kv_bits,
            "yarn": args.yarn,
            "found": f"{found} of {len(runs)}",
            "peak_memory_bytes": peak_memory_bytes(),
            "runs": runs,
        },
    )


def numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Reads a list with commas."""
    return lambda text: [kind(word) for word in text.split(",")]


def ask(runtime: Runtime, length: int, depth: float, yarn: str) -> dict[str, Any]:
    """One prompt, read from an empty cache, and its greedy answer."""
    number = 10_000 + (length * 7919 + round(depth * 1000) * 104_729) % 90_000
    prompt = hidden(runtime, FACT.format(number=number), length - NEW_TOKENS, depth)
    runtime.reset()
    started = time.monotonic()
    answer = generate(
        runtime,
        prompt,
        max_tokens=NEW_TOKENS,
        sampling=Sampling(),
        yarn=yarn if yarn == "auto" else float(yarn),
    ).run()
    run = {
        "prompt_tokens": len(prompt),
        "depth": depth,
        "rope_factor": answer.rope_factor,
        "is_found": str(number) in answer.text,
        "number": number,
        "answer": answer.text,
        "prefill_tokens_per_s": round(len(prompt) / answer.prefill_s, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(run, file=sys.stderr, flush=True)
    return run


def hidden(runtime: Runtime, fact: str, tokens: int, depth: float) -> list[int]:
    """The prompt of at most so many tokens, in whole sentences, with the fact among them."""
    files = read_text_files(runtime.folder)

    def prompt_ids(sentences: list[str]) -> list[int]:
        place = round(depth * len(sentences))
        text = "".join([*sentences[:place], fact, *sentences[place:]]).lstrip()
        return files.prompt_ids([{"role": "user", "content": text + QUESTION}])

    room = tokens - len(prompt_ids([]))
    sentences: list[str] = []
    for sentence in cycle(filler()):
        room -= len(files.tokenizer.encode(sentence))
        if room < 0:
            break
        sentences.append(sentence)
    # Sentences side by side may have a token more or less than each alone.
    while len(ids := prompt_ids(sentences)) > tokens and sentences:
        sentences.pop()
    return ids


def filler() -> list[str]:
    """The sentences of a prose text."""
    text = " ".join((TEXTS / "prose.txt").read_text("utf-8").split())
    # Tokens of a word hold the space before it: so the counts of sentences add up.
    return [f" {sentence.strip('.')}." for sentence in text.split(". ") if sentence]


if __name__ == "__main__":
    main()
