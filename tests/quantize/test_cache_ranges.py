"""Ranges of keys and values: rotation by the formula, the layer by transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from qwen2x.quantize.cache_ranges import measure_layer, rotated_range
from qwen2x.quantize.decoder import Shape
from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import Float

PREFIX = "model.layers.0."
# Angles are looked at 33 times per range; a cosine between two is at most this much farther out.
BETWEEN = 0.005
# States of size 1 in float32, summed in another order.
CLOSE = 2e-5
CONFIG = Qwen2Config(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=1,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    attn_implementation="sdpa",
)
SHAPE = Shape(
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=CONFIG.rms_norm_eps,
    inverse_frequencies=Qwen2RotaryEmbedding(CONFIG).inv_freq.numpy(),
    attention_factor=1.0,
)


@pytest.fixture
def layer() -> Qwen2DecoderLayer:
    torch.manual_seed(0)
    made = Qwen2DecoderLayer(CONFIG, 0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2)
    return made


@pytest.fixture
def states() -> Float:
    return np.random.default_rng(1).standard_normal((5, 40, 64)).astype(np.float32)


def tensors(layer: Qwen2DecoderLayer) -> dict[str, Float]:
    return {f"{PREFIX}{name}": value.numpy() for name, value in layer.state_dict().items()}


def rotate(keys: Float, position: int) -> Float:
    """Keys [N, K, D] at a position, by the formula."""
    angles = np.concatenate([SHAPE.inverse_frequencies * position] * 2)
    first, second = np.split(keys, 2, axis=-1)
    turned: Float = keys * np.cos(angles) + np.concatenate([-second, first], -1) * np.sin(angles)
    return turned


@pytest.mark.parametrize("positions", [1, 7, 4096])
def test_ranges_hold_every_key_at_every_position(positions: int) -> None:
    keys = np.random.default_rng(2).standard_normal((50, 2, 16)).astype(np.float32) + 3
    low, high = rotated_range(keys, SHAPE, positions)
    reached = np.concatenate([rotate(keys, place) for place in range(positions)])
    slack = BETWEEN * np.abs(reached).max()
    assert (reached.min(axis=0) >= low - slack).all()
    assert (reached.max(axis=0) <= high + slack).all()
    # And are not much wider; a pair that turns a few times does not come to every angle.
    assert ((high - low) <= 1.15 * np.ptp(reached, axis=0) + slack).all()


def test_the_attention_factor_is_in_the_ranges() -> None:
    keys = np.random.default_rng(2).standard_normal((50, 2, 16)).astype(np.float32)
    plain = rotated_range(keys, SHAPE, 9)
    scaled = rotated_range(keys, replace(SHAPE, attention_factor=1.5), 9)
    np.testing.assert_allclose(scaled, np.array(plain) * 1.5, rtol=1e-6)


def test_states_move_as_through_transformers_layer(layer: Qwen2DecoderLayer, states: Float) -> None:
    given = torch.from_numpy(states.copy())
    places = torch.arange(states.shape[1])[None]
    with torch.inference_mode():
        embeddings = Qwen2RotaryEmbedding(CONFIG)(given, places)
        theirs = layer(given, position_embeddings=embeddings, attention_mask=None)
    found = tensors(layer)
    measure_layer(PREFIX, found.__getitem__, SHAPE, states, 512)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    scale = float(theirs.abs().max())
    np.testing.assert_allclose(states, theirs.numpy(), atol=CLOSE * scale, rtol=0)


def test_a_bias_on_pairs_that_hardly_turn_is_in_the_centre_not_in_the_scale(
    layer: Qwen2DecoderLayer, states: Float
) -> None:
    plain = measure_layer(PREFIX, tensors(layer).__getitem__, SHAPE, states.copy(), 64)
    changed = tensors(layer)
    bias = changed[f"{PREFIX}self_attn.k_proj.bias"].copy()
    bias.reshape(2, 2, 8)[:, 0, 7] += 300
    changed[f"{PREFIX}self_attn.k_proj.bias"] = bias
    biased = measure_layer(PREFIX, changed.__getitem__, SHAPE, states.copy(), 64)
    moved = biased.key_centres - plain.key_centres
    np.testing.assert_allclose(moved.reshape(2, 2, 8)[:, 0, 7], 300, rtol=0.01)
    # Its second column is the slowest pair's sine: 300 times 0.02 at the last position.
    assert (biased.key_scales <= plain.key_scales + 300 * 0.02 * 1.25 / 127).all()


def test_channels_that_the_text_leaves_silent_have_a_scale(
    layer: Qwen2DecoderLayer, states: Float
) -> None:
    changed = tensors(layer)
    for part in ("weight", "bias"):
        values = changed[f"{PREFIX}self_attn.v_proj.{part}"].copy()
        values[3] = 0
        changed[f"{PREFIX}self_attn.v_proj.{part}"] = values
    ranges = measure_layer(PREFIX, changed.__getitem__, SHAPE, states, 64)
    assert (ranges.value_scales > 0).all()
    assert ranges.value_scales[0, 3] >= 0.005 * ranges.value_scales[0, :16].mean()


def test_activations_that_are_not_finite_are_refused(
    layer: Qwen2DecoderLayer, states: Float
) -> None:
    states[2, 5, 7] = np.inf
    with pytest.raises(CheckpointError, match=r"self_attn: activations .* not finite; "):
        measure_layer(PREFIX, tensors(layer).__getitem__, SHAPE, states, 64)
