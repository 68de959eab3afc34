"""What an MLX folder's cache and runs take of memory."""

from __future__ import annotations

import mlx.core as mx

from qwen2x.exporters.bundle import Bundle
from qwen2x.exporters.mlx_attention import FUSED_HEAD_SIZES
from qwen2x.runtimes.memory import free_host_bytes
from qwen2x.runtimes.memory_needs import MemoryNeeds, activation_bytes
from qwen2x.runtimes.mlx_cache import float_layout
from qwen2x.runtimes.mlx_cache import free_bytes as free_default_bytes
from qwen2x.runtimes.mlx_int8_cache import int8_layout

# Bytes per score and query head: one float32 matrix of them without a fused kernel; with an 8-bit
# cache they are masked and normalized too (measured, mlx 0.32.4 on the CPU).
_FLOAT_SCORE, _INT8_SCORE = 5, 10


def planned_device(bundle: Bundle, device: str) -> str:
    """Where a folder is run; ``auto`` is a GPU, if there is one."""
    has_gpu = mx.default_device().type == mx.gpu
    return ("gpu" if has_gpu else "cpu") if device == "auto" else device


def free_bytes(device: str) -> int | None:
    """Memory for a cache; None where nobody says."""
    return free_host_bytes() if device == "cpu" else free_default_bytes()


def needs_of(bundle: Bundle, device: str, kv_bits: int | None) -> MemoryNeeds:
    """Of a folder on a device, with a cache of floats (None) or of 8 bits."""
    layout = float_layout(bundle.cache) if kv_bits is None else int8_layout(bundle.cache)
    is_fused = device != "cpu" and bundle.cache["head_dim"] in FUSED_HEAD_SIZES
    score = _INT8_SCORE if kv_bits else 0 if is_fused else _FLOAT_SCORE
    return MemoryNeeds(
        per_position=layout.bytes_per_position,
        per_token=activation_bytes(bundle),
        per_score=score * bundle.model_config.num_attention_heads,
    )


def prompt_bytes(bundle: Bundle) -> int:
    """There is no second graph."""
    return 0
