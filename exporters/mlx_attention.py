"""Scaled dot product attention in MLX, with scores in float32 on every device.

Letters as in ``mlx_model.py``.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

# Head sizes for which MLX has fused attention for one query and for many, on Metal and on CUDA.
FUSED_HEAD_SIZES = (64, 96, 128)
# On Metal, up to 8 queries take the vector kernel, which holds 32 rows of queries and groups.
_VECTOR_QUERIES, _VECTOR_ROWS = 8, 32
# On CUDA, fewer than 4 without a mask take one; more of them need cuDNN's, from Ampere on.
_CUDA_VECTOR_QUERIES, _AMPERE = 4, 8
# Queries that unfused attention takes at once.
_BLOCK = 128


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None
) -> mx.array:
    """Scaled dot product attention [B, H, S, D] with scores in float32.

    MLX's fused kernels (on a GPU) sum in float32; what it does without one computes scores in the
    type of its inputs, which is wrong on Qwen2 in 16 bits (transformers #33317).
    """
    if _is_fused(queries, keys, mask):
        return _scaled_dot_product(queries, keys, values, mask)
    dtype, count = queries.dtype, queries.shape[2]
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    if count == 1:
        # The heads of a group are queries of one head, which spares a product for each of them.
        grouped = queries.reshape(*keys.shape[:2], -1, keys.shape[3])
        mixed = _scaled_dot_product(grouped, keys, values, mask)
        return mixed.reshape(queries.shape).astype(dtype)
    if mask != "causal" or count <= _BLOCK:
        return _scaled_dot_product(queries, keys, values, mask).astype(dtype)
    # Block by block, so that what no query of a block may see is not computed.
    past, blocks = keys.shape[2] - count, []
    for start in range(0, count, _BLOCK):
        stop = min(count, start + _BLOCK)
        block, seen = queries[:, :, start:stop], slice(0, past + stop)
        blocks.append(_scaled_dot_product(block, keys[:, :, seen], values[:, :, seen], "causal"))
    return mx.concatenate(blocks, axis=2).astype(dtype)


def _scaled_dot_product(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None
) -> mx.array:
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _is_fused(queries: mx.array, keys: mx.array, mask: mx.array | str | None) -> bool:
    """Whether MLX has one kernel for it: ``has_fused_kernel`` in MLX 0.32.4.

    That is in mlx/backend/metal and mlx/backend/cuda/scaled_dot_product_attention.cpp.
    """
    count, groups = queries.shape[2], queries.shape[1] // keys.shape[1]
    if mx.default_device().type == mx.cpu or queries.shape[-1] not in FUSED_HEAD_SIZES:
        return False
    if mx.metal.is_available():
        return count > _VECTOR_QUERIES or count * groups <= _VECTOR_ROWS
    is_vector = count < _CUDA_VECTOR_QUERIES and not isinstance(mask, mx.array)
    return is_vector or (count > 1 and _has_cudnn_attention())


@cache
def _has_cudnn_attention() -> bool:
    """From Ampere on."""
    major = mx.device_info(mx.gpu).get("compute_capability_major", 0)
    return int(major) >= _AMPERE
