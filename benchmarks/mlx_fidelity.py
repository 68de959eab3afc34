"""MLX against PyTorch in float32, the cost of an 8-bit KV cache, and memory per token.

    python -m benchmarks.mlx_fidelity CHECKPOINT [--positions 32] [--cache-tokens 256]

The small checkpoint that ships is compared by its largest difference of logits, CHECKPOINT by KL
divergence over its first positions of prose. The 8-bit cache is compared with the float one on the
same runtime, token ids and positions. Memory is MLX's own count while 256 tokens are decoded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.measure import ROOT, TEXTS, write_result
from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.compare import kl_divergence
from qwen2x.runtimes.generate import read_text_files
from qwen2x.runtimes.runtime import open_runtime

EXAMPLE = ROOT / "examples" / "tiny-qwen2"
DECODED = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--cache-tokens", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        small, large = Path(place) / "small", Path(place) / "large"
        export(EXAMPLE, "mlx", out=small, dtype="float32")
        export(args.checkpoint, "mlx", out=large, dtype="float32")
        write_result(
            "mlx_fidelity",
            {
                "small checkpoint": {
                    **against_torch(small, EXAMPLE, 512),
                    "kv_8_bits": against_float_cache(small, args.cache_tokens),
                    "memory": memory_of_decoding(small),
                },
                "checkpoint": {
                    **against_torch(large, args.checkpoint, args.positions),
                    "kv_8_bits": against_float_cache(large, args.cache_tokens),
                },
            },
        )


def prose(folder: Path, tokens: int) -> np.ndarray:
    text = (TEXTS / "prose.txt").read_text(encoding="utf-8")
    return np.array([read_text_files(folder).tokenizer.encode(text)[:tokens]], np.int64)


def against_torch(folder: Path, checkpoint: Path, positions: int) -> dict[str, Any]:
    """Largest difference of logits and mean KL divergence."""
    ids = prose(folder, positions)
    with open_runtime(checkpoint, backend="torch", device="cpu") as judge:
        theirs = judge.logits(ids)[0]
    with open_runtime(folder) as runtime:
        ours = runtime.logits(ids)[0]
    return {
        "positions": ids.shape[1],
        "max_abs_diff": float(np.abs(ours - theirs).max()),
        "kl_mean": float(kl_divergence(theirs, ours).mean()),
    }


def against_float_cache(folder: Path, tokens: int) -> dict[str, Any]:
    """KL divergence that 8 bits add, read token by token through the cache."""
    ids = prose(folder, tokens)[0].tolist()
    rows = {}
    for kv_bits in (None, 8):
        with open_runtime(folder, kv_bits=kv_bits) as runtime:
            half = len(ids) // 2
            first = runtime.append(ids[:half], keep=half)
            rows[kv_bits] = np.concatenate([first, runtime.append(ids[half:], keep=half)])
    kl = kl_divergence(rows[None], rows[8])
    agree = (rows[None].argmax(-1) == rows[8].argmax(-1)).mean()
    return {
        "tokens": len(ids),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float(agree),
    }


def memory_of_decoding(folder: Path) -> dict[str, int]:
    """MLX's peak above what was held before, and what the cache itself takes."""
    with open_runtime(folder) as runtime:
        prompt = prose(folder, 64)[0].tolist()
        runtime.prefill(prompt)
        runtime.decode(prompt[0])
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for _ in range(DECODED):
            runtime.decode(prompt[0])
        elements = open_bundle(folder).model_config.cache_elements_per_token
        return {
            "tokens": DECODED,
            "peak_growth_bytes": mx.get_peak_memory() - before,
            "cache_growth_bytes": mx.get_active_memory() - before,
            "cache_bytes": 4 * elements * runtime.cache_length,
        }


if __name__ == "__main__":
    main()
