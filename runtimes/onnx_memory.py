"""What an ONNX bundle's cache and runs take of memory, and what there is."""

from __future__ import annotations

import numpy as np
from ml_dtypes import bfloat16

from qwen2x.exporters.bundle import Bundle
from qwen2x.runtimes import device_memory
from qwen2x.runtimes.memory import free_host_bytes
from qwen2x.runtimes.memory_needs import MemoryNeeds, activation_bytes
from qwen2x.runtimes.onnx_provider import sums_are_exact

_BYTES = {name: np.dtype(name).itemsize for name in ("float32", "float16", "int8")} | {
    "bfloat16": np.dtype(bfloat16).itemsize
}
# GroupQueryAttention on the CPU computes the scores of a whole piece, also those that nobody sees,
# and what lies between the products leaves a processor's cache (docs/performance.md).
_MOST_ON_CPU = 256


def needs_of(bundle: Bundle, device: str, kv_bits: int | None) -> MemoryNeeds:
    """GroupQueryAttention keeps no scores (measured, onnxruntime 1.32, float32 and int8 cache).

    Where a graph for prompts lets it, behind short caches, they are 64 MiB at most.
    """
    cache = bundle.cache
    numbers = 2 * cache["layers"] * cache["num_key_value_heads"] * cache["head_dim"]
    return MemoryNeeds(
        per_position=numbers * _BYTES[cache["dtype"]],
        per_token=activation_bytes(bundle),
        most=_MOST_ON_CPU if device == "cpu" else None,
    )


def planned_device(bundle: Bundle, device: str) -> str:
    """Where a bundle is run; ``auto`` is what it was made for."""
    return bundle.device if device == "auto" else device


def free_bytes(device: str) -> int | None:
    """Memory for a cache; None where nobody says."""
    return free_host_bytes() if device == "cpu" else device_memory.free_bytes()


def prompt_bytes(bundle: Bundle) -> int:
    """Of the weights of the graph that reads prompts, where it is used."""
    return bundle.prefill_bytes if bundle.has_prefill and sums_are_exact() else 0
