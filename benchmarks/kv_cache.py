"""What an 8-bit KV cache costs and gives in ONNX Runtime, against the same bundle with floats.

    python -m benchmarks.kv_cache CHECKPOINT [--tokens 4096] [--new-tokens 32] [--rounds 3]

With float32 weights and with 4 bits: the KL divergence that the cache adds, in chunks behind the
cache over 4,096 tokens, once prose first and once code first, so that both are read early and late;
bytes of the cache; and decode speed behind all those tokens, in turn on one machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import TEXTS, write_result
from qwen2x.cli.inspect import inspect_bundle
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.compare import kl_divergence
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.tokenizer import Tokenizer

# Plainly rounded: what a cache adds does not depend on how 4 bits were found.
WEIGHTS: dict[str, dict[str, Any]] = {"float32": {}, "int4": {"bits": 4, "method": "rtn"}}
ORDERS = (("prose", "code"), ("code", "prose"))
CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    result: dict[str, Any] = {"tokens": args.tokens}
    for name, options in WEIGHTS.items():
        with tempfile.TemporaryDirectory() as place:
            plain, small = Path(place) / "float-cache", Path(place) / "int8-cache"
            export(args.checkpoint, out=plain, **options)
            started = time.monotonic()
            export(args.checkpoint, out=small, kv_bits=8, **options)
            seconds = time.monotonic() - started
            with open_runtime(plain) as floats, open_runtime(small) as codes:
                added = read_both(floats, codes, Tokenizer(args.checkpoint), args.tokens)
                speed = decode_both(floats, codes, args.new_tokens, args.rounds)
            result[name] = {
                "export_seconds": round(seconds, 1),
                "kl_added": added,
                "cache": cache_sizes(plain, small, args.tokens),
                "decode_tokens_per_s": speed,
            }
    write_result("kv_cache", result)


def read_both(floats: Runtime, codes: Runtime, tokenizer: Tokenizer, tokens: int) -> dict[str, Any]:
    """KL divergence of the second to the first, by text; both caches hold the last one then."""
    added: dict[str, Any] = {}
    for order in ORDERS:
        parts = [tokenizer.encode((TEXTS / f"{kind}.txt").read_text("utf-8")) for kind in order]
        ids = [token for part in parts for token in part][:tokens]
        floats.reset()
        codes.reset()
        kl = np.concatenate([_divergence(floats, codes, chunk) for chunk in _chunks(ids)])
        border = len(parts[0])
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
