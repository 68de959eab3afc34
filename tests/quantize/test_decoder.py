"""Calibration's forward pass against transformers' own Qwen2 layer, part by part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import silu
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from qwen2x.quantize.decoder import Shape, activate, attend, norm

Floats = NDArray[np.float32]
# Numbers of size 1 in float32, summed in another order; sums over up to 300 keys.
CLOSE = 5e-6
# Below, at and just above a block of queries, and several blocks.
LENGTHS = [1, 127, 128, 129, 300]
PLAIN: dict[str, Any] = {"rope_type": "default"}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "attention_factor": 1.3,
}


def make_config(
    heads: int = 4, kv_heads: int = 2, rope: dict[str, Any] | None = None, **more: Any
) -> Qwen2Config:
    """Heads of 16; the hidden size is that of all heads."""
    return Qwen2Config(
        hidden_size=16 * heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 10000.0} | (rope or PLAIN),
        rms_norm_eps=1e-6,
        attn_implementation="sdpa",
        **more,
    )


def shape_of(config: Qwen2Config) -> Shape:
    """With the frequencies that transformers computes."""
    rotary = Qwen2RotaryEmbedding(config)
    return Shape(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=16,
        rms_norm_eps=config.rms_norm_eps,
        inverse_frequencies=rotary.inv_freq.numpy(),
        attention_factor=float(rotary.attention_scaling),
    )


def positions_of(config: Qwen2Config, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformers' cosines and sines for windows [W, S, hidden]."""
    cosines, sines = Qwen2RotaryEmbedding(config)(x, torch.arange(x.shape[1])[None])
    return cosines, sines


def drawn(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_norm_is_transformers_norm() -> None:
    x, weight = drawn(0, 3, 5, 64), drawn(1, 64)
    x[0, 0] = 0
    x[0, 1] *= 1e-4  # where epsilon matters
    x[0, 2, 7] = 3e3
    judge = Qwen2RMSNorm(64, eps=1e-6)
    judge.weight.data = torch.from_numpy(weight)
    expected = judge(torch.from_numpy(x)).detach().numpy()
    assert np.abs(norm(x, weight, 1e-6) - expected).max() < CLOSE
    assert norm(x, weight, 1e-6).dtype == np.float32


def test_activate_is_transformers_gate_in_the_place_of_its_first_argument() -> None:
    gate, up = drawn(2, 3, 7, 96) * 5, drawn(3, 3, 7, 96)
    gate[0, 0, :4] = [-200, -88.8, 200, 0]  # beyond what exp can give in float32
    expected = (silu(torch.from_numpy(gate)) * torch.from_numpy(up)).numpy()
    activated = activate(gate, up)
    assert activated is gate
    np.testing.assert_allclose(activated, expected, rtol=1e-5, atol=CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rope", [PLAIN, YARN], ids=lambda rope: str(rope["rope_type"]))
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_attend_is_transformers_attention(
    heads: tuple[int, int], rope: dict[str, Any], length: int
) -> None:
    config = make_config(*heads, rope)
    size, kv_size = config.hidden_size, 16 * heads[1]
    judge = Qwen2Attention(config, 0).eval()
    # Twice as large, for sharper weights.
    projected = [2 * drawn(4, 2, length, size), 2 * drawn(5, 2, length, kv_size)]
    projected += [drawn(6, 2, length, kv_size)]
    expected = judged(judge, config, projected)
    given = attend(projected, shape_of(config))
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() < CLOSE


def judged(judge: Qwen2Attention, config: Qwen2Config, projected: list[Floats]) -> Floats:
    """Attention's output before o_proj."""
    parts = [torch.from_numpy(part) for part in projected]

    class Given(torch.nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.value = value

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.value

    judge.q_proj, judge.k_proj, judge.v_proj = (Given(part) for part in parts)
    judge.o_proj = torch.nn.Identity()
    with torch.inference_mode():
        mixed, _ = judge(parts[0], positions_of(config, parts[0]), None)
    return np.asarray(mixed.numpy(), np.float32)


def test_attend_does_not_change_what_it_is_given_and_keeps_windows_apart() -> None:
    config = make_config()
    projected = [drawn(7, 3, 130, 64), drawn(8, 3, 130, 32), drawn(9, 3, 130, 32)]
    before = [part.copy() for part in projected]
    together = attend(projected, shape_of(config))
    for part, kept in zip(projected, before, strict=True):
        np.testing.assert_array_equal(part, kept)
    for window in range(3):
        alone = attend([part[[window]] for part in projected], shape_of(config))
        np.testing.assert_array_equal(together[[window]], alone)


def test_attend_sees_no_later_token() -> None:
    config = make_config()
    projected = [drawn(10, 1, 260, 64), drawn(11, 1, 260, 32), drawn(12, 1, 260, 32)]
    whole = attend(projected, shape_of(config))
    for length in (1, 100, 128, 200, 256):
        cut = attend([part[:, :length].copy() for part in projected], shape_of(config))
        # Other block sizes are other orders of summing.
        assert np.abs(whole[:, :length] - cut).max() < CLOSE


def test_massive_scores_give_numbers() -> None:
    """Qwen2's biases of keys reach hundreds, and scores what exp cannot give."""
    config = make_config()
    projected = [300 * drawn(13, 1, 140, 64), 300 * drawn(14, 1, 140, 32), drawn(15, 1, 140, 32)]
    mixed = attend(projected, shape_of(config))
    assert np.isfinite(mixed).all()
    assert np.abs(mixed).max() <= np.abs(projected[2]).max() * (1 + CLOSE)
