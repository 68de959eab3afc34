"""What an 8-bit KV cache costs and gives in ONNX Runtime, against the same bundle with floats.

    python -m benchmarks.kv_cache CHECKPOINT [--tokens 4096] [--new-tokens 32] [--rounds 3]
        [--only float32|int4|int4_noise]

With float32 weights and with 4 bits: the KL divergence that the cache adds, in chunks behind the
cache over 4,096 tokens, once prose first and once code first, so that both are read early and late;
bytes of the cache; and decode speed behind all those tokens, in turn on one machine.

A 4-bit graph rounds its activations too, which any small change lets fall otherwise. So int4_noise
says how far the bundle with floats is from itself, read in chunks of 3, and how far both caches are
from the float32 model. ``--only`` keeps the last result's other parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS, TEXTS, write_result
from qwen2x.cli.inspect import inspect_bundle
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.compare import kl_divergence
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.tokenizer import Tokenizer

# Plainly rounded: what a cache adds does not depend on how 4 bits were found.
WEIGHTS: dict[str, dict[str, Any]] = {"float32": {}, "int4": {"bits": 4, "method": "rtn"}}
KV8 = {"kv_bits": 8}
ORDERS = (("prose", "code"), ("code", "prose"))
CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[*WEIGHTS, "int4_noise"])
    args = parser.parse_args()
    parts = [args.only] if args.only else [*WEIGHTS, "int4_noise"]
    result: dict[str, Any] = last_result() if args.only else {}
    for part in parts:
        with tempfile.TemporaryDirectory() as place:
            measured = (
                noise(Path(place), args)
                if part == "int4_noise"
                else cost(Path(place), args, WEIGHTS[part])
            )
        result[part] = {"tokens": args.tokens, **measured}
    write_result("kv_cache", result)


def last_result() -> dict[str, Any]:
    """The parts that were measured before."""
    path = RESULTS / "kv_cache.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {name: found[name] for name in (*WEIGHTS, "int4_noise") if name in found}


def cost(place: Path, args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """What the cache adds, takes and gives, for one kind of weights."""
    plain, small = place / "float-cache", place / "int8-cache"
    export(args.checkpoint, out=plain, **options)
    started = time.monotonic()
    export(args.checkpoint, out=small, kv_bits=8, **options)
    seconds = time.monotonic() - started
    with open_runtime(plain) as floats, open_runtime(small) as codes:
        added = read_both(floats, codes, Tokenizer(args.checkpoint), args.tokens)
        speed = decode_both(floats, codes, args.new_tokens, args.rounds)
    return {
        "export_seconds": round(seconds, 1),
        "kl_added": added,
        "cache": cache_sizes(plain, small, args.tokens),
        "decode_tokens_per_s": speed,
    }


def noise(place: Path, args: argparse.Namespace) -> dict[str, float]:
    """Mean KL divergences of the 4-bit bundle, prose first."""
    bundles: dict[str, dict[str, Any]] = {
        "float32": {},
        "int4": WEIGHTS["int4"],
        "int8-cache": WEIGHTS["int4"] | KV8,
    }
    for name, options in bundles.items():
        export(args.checkpoint, out=place / name, **options)
    ids = text_ids(Tokenizer(args.checkpoint), ORDERS[0], args.tokens)
    with (
        open_runtime(place / "float32") as judge,
        open_runtime(place / "int4") as floats,
        open_runtime(place / "int4", prefill_chunk=3) as again,
        open_runtime(place / "int8-cache") as codes,
    ):
        found: dict[str, list[np.ndarray]] = {}
        for chunk in _chunks(ids):
            rows = [each.append(chunk, keep=len(chunk)) for each in (judge, floats, again, codes)]
            for name, one, other in (
                ("cache_to_float_cache", 1, 3),
                ("chunks_of_3_to_chunks_of_512", 1, 2),
                ("float_cache_to_float32", 0, 1),
                ("int8_cache_to_float32", 0, 3),
            ):
                found.setdefault(name, []).append(kl_divergence(rows[one], rows[other]))
    return {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}


def text_ids(tokenizer: Tokenizer, order: tuple[str, str], tokens: int) -> list[int]:
    """The beginning of two texts, one behind the other."""
    texts = [(TEXTS / f"{kind}.txt").read_text("utf-8") for kind in order]
    return [token for text in texts for token in tokenizer.encode(text)][:tokens]


def read_both(floats: Runtime, codes: Runtime, tokenizer: Tokenizer, tokens: int) -> dict[str, Any]:
    """KL divergence of the second to the first, by text; both caches hold the last one then."""
    added: dict[str, Any] = {}
    for order in ORDERS:
        ids = text_ids(tokenizer, order, tokens)
        floats.reset()
        codes.reset()
        kl = np.concatenate([_divergence(floats, codes, chunk) for chunk in _chunks(ids)])
        border = len(tokenizer.encode((TEXTS / f"{order[0]}.txt").read_text("utf-8")))
        added[f"{order[0]}, then {order[1]}"] = {
            "kl_mean": float(kl.mean()),
            "kl_max": float(kl.max()),
            f"kl_mean_{order[0]}": float(kl[:border].mean()),
            f"kl_mean_{order[1]}": float(kl[border:].mean()),
            "kl_mean_last_512": float(kl[-512:].mean()),
        }
    return added


def decode_both(floats: Runtime, codes: Runtime, new: int, rounds: int) -> dict[str, float]:
    """Medians behind what the caches hold, measured in turn."""
    rates: dict[str, list[float]] = {"float": [], "int8": []}
    for _ in range(rounds):
        for name, runtime in (("float", floats), ("int8", codes)):
            rates[name].append(_rate(runtime, new))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return medians | {"ratio": medians["int8"] / medians["float"]}


def cache_sizes(plain: Path, small: Path, tokens: int) -> dict[str, Any]:
    """Bytes that the tokens take."""
    each = [inspect_bundle(folder)["cache_bytes_per_token"] for folder in (plain, small)]
    return {
        "float_bytes": each[0] * tokens,
        "int8_bytes": each[1] * tokens,
        "ratio": each[1] / each[0],
    }


def _chunks(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]


def _divergence(floats: Runtime, codes: Runtime, chunk: Sequence[int]) -> np.ndarray:
    theirs = floats.append(chunk, keep=len(chunk))
    return kl_divergence(theirs, codes.append(chunk, keep=len(chunk)))


def _rate(runtime: Runtime, new: int) -> float:
    """Tokens per second; the cache is then as it was."""
    past, token = runtime.cache_length, runtime.cached_ids[-1]
    runtime.decode(token)
    started = time.perf_counter()
    for _ in range(new):
        runtime.decode(token)
    seconds = time.perf_counter() - started
    runtime.truncate(past)
    return new / seconds


if __name__ == "__main__":
    main()
