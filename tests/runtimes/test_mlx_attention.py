"""Attention over MLX's own, against NumPy in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

FLOAT32 = 1e-5
# Outputs of size 1, rounded to 11 and 8 bits.
HALF = {"float16": 2e-3, "bfloat16": 2e-2}


def expected(queries: Any, keys: Any, values: Any) -> NDArray[np.float64]:
    """Causal attention of the last queries, [B, H, S, D]."""
    q, k, v = (np.array(part.astype(mx.float32), np.float64) for part in (queries, keys, values))
    groups, count, positions = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    hidden = np.arange(positions) > np.arange(positions - count, positions)[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed: NDArray[np.float64] = weights / weights.sum(-1, keepdims=True) @ v
    return mixed


def random(heads: int, count: int, size: int, dtype: str, seed: int) -> Any:
    values = np.random.default_rng(seed).standard_normal((2, heads, count, size))
    return mx.array(values).astype(getattr(mx, dtype))


@pytest.mark.parametrize("past", [0, 70])
@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 300])
def test_blocks_and_single_rows_give_what_the_whole_gives(count: int, past: int) -> None:
    from qwen2x.exporters.mlx_attention import attention
    from qwen2x.exporters.mlx_model import Slices

    queries = random(6, count, 32, "float32", 0)
    keys, values = (random(2, past + count, 32, "float32", seed) for seed in (1, 2))
    mask = Slices(past, past + count).mask(count)
    found = np.array(attention(queries, keys, values, mask))
    np.testing.assert_allclose(found, expected(queries, keys, values), atol=FLOAT32)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("count", [1, 140])
def test_scores_beyond_the_type_are_computed_in_float32(count: int, dtype: str) -> None:
    from qwen2x.exporters.mlx_attention import attention

    # Scores in the thousands, as Qwen2's biases make them: in 16 bits they differ by whole steps.
    queries, keys = (60 * random(2, n, 64, dtype, seed) for n, seed in ((count, 3), (140, 4)))
    values = random(2, 140, 64, dtype, 5)
    mixed = attention(queries, keys, values, "causal" if count > 1 else None)
    assert mixed.dtype == getattr(mx, dtype)
    found = np.array(mixed.astype(mx.float32))
    np.testing.assert_allclose(found, expected(queries, keys, values), atol=HALF[dtype])


@pytest.mark.parametrize(
    ("gpu", "head_dim", "count", "is_masked", "is_fused"),
    [
        ("none", 64, 1, False, False),
        ("metal", 64, 1, True, True),
        ("metal", 128, 512, False, True),
        ("metal", 128, 4, False, True),
        # Seven heads in a group: 8 * 7 rows are more than the vector kernel has.
        ("metal", 128, 8, False, False),
        ("metal", 32, 1, False, False),
        ("ampere", 64, 1, False, True),
        ("ampere", 64, 1, True, False),
        ("ampere", 64, 128, True, True),
        ("turing", 64, 1, False, True),
        ("turing", 64, 3, False, True),
        ("turing", 64, 4, False, False),
    ],
)
def test_fused_kernels_are_trusted_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch,
    gpu: str,
    head_dim: int,
    count: int,
    is_masked: bool,
    is_fused: bool,
) -> None:
    from qwen2x.exporters import mlx_attention

    device = mx.cpu if gpu == "none" else mx.gpu
    queries, keys = (mx.zeros((1, heads, count, head_dim)) for heads in (7, 1))
    mask = mx.ones((count, count), mx.bool_) if is_masked else None
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=device))
    monkeypatch.setattr(mx.metal, "is_available", lambda: gpu == "metal")
    monkeypatch.setattr(mlx_attention, "_has_cudnn_attention", lambda: gpu == "ampere")
    assert mlx_attention._is_fused(queries, keys, mask) == is_fused
