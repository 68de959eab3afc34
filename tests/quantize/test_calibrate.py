"""A layer's two streams against transformers' layer, and what calibration makes of its matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from qwen2x.quantize.calibrate import SchemeOf, Streams, calibrate_layer
from qwen2x.quantize.errors import CheckpointError, SchemeError
from qwen2x.quantize.groups import QuantizedMatrix, dequantize, quantize
from qwen2x.quantize.scheme import Scheme
from tests.quantize.test_decoder import (
    YARN,
    Floats,
    drawn,
    make_config,
    positions_of,
    shape_of,
)

Tensors = dict[str, Floats]
# A layer in float32: residuals of size 5, sums over up to 160 columns in another order.
CLOSE = 2e-5
INT4, INT8 = Scheme(bits=4, group_size=32), Scheme(bits=8, group_size=32)
PREFIX = "model.layers.7."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MATRICES = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
# Squared distance of the rounded stream's layer output from the exact one's, over that with plain
# rounding, on other inputs than those of calibration. Measured 0.13 to 0.15.
GAIN = 0.2
# The same where a linear map was lost before the layer, over a layer that does not look at it: a
# share of that is made up for. Measured 0.55.
MADE_UP = 0.75


def layer_tensors(config: Qwen2Config, seed: int = 0) -> Tensors:
    """By checkpoint name, bfloat16 numbers; biases and norms that matter."""
    layer = Qwen2DecoderLayer(config, 0)
    random = np.random.default_rng(seed)
    tensors = {}
    for name, value in layer.state_dict().items():
        shape = tuple(value.shape)
        values = random.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif len(shape) == 2:
            values /= np.sqrt(shape[1])
        tensors[PREFIX + name] = values.astype(bfloat16).astype(np.float32)
    return tensors


def judged(config: Qwen2Config, tensors: Tensors, x: Floats) -> Floats:
    """What transformers' layer with these weights gives."""
    layer = Qwen2DecoderLayer(config, 0).eval()
    state = {name.removeprefix(PREFIX): torch.from_numpy(v) for name, v in tensors.items()}
    layer.load_state_dict(state)
    hidden = torch.from_numpy(x)
    with torch.inference_mode():
        given = layer(hidden, None, position_embeddings=positions_of(config, hidden))
    return np.asarray(given.numpy(), np.float32)


def correlated(seed: int, windows: int = 8, length: int = 64) -> Floats:
    """Hidden states in which few directions hold nearly all."""
    directions = np.random.default_rng(99).standard_normal((16, 64), np.float32) / 4
    return drawn(seed, windows, length, 16) @ directions + 0.1 * drawn(
        seed + 1, windows, length, 64
    )


def schemes(scheme: Scheme | None, **others: Scheme | None) -> SchemeOf:
    return lambda module: others.get(module.split(".")[-1], scheme)


def with_rounded(tensors: Tensors, matrices: dict[str, QuantizedMatrix]) -> Tensors:
    return tensors | {name: dequantize(matrix) for name, matrix in matrices.items()}


def run(
    config: Qwen2Config, tensors: Tensors, scheme_of: SchemeOf, streams: Streams
) -> dict[str, QuantizedMatrix]:
    return calibrate_layer(PREFIX, tensors.__getitem__, scheme_of, shape_of(config), streams)


@pytest.fixture
def config() -> Qwen2Config:
    return make_config(intermediate_size=160)


# Streams


@pytest.mark.parametrize("length", [1, 64, 129])
@pytest.mark.parametrize("more", [{}, {"heads": 8, "kv_heads": 2, "rope": YARN}], ids=str)
def test_without_schemes_both_streams_go_as_through_transformers_layer(
    more: dict[str, Any], length: int
) -> None:
    config = make_config(**more, intermediate_size=160)
    tensors = layer_tensors(config)
    exact, rounded = (drawn(seed, 2, length, config.hidden_size) for seed in (1, 2))
    streams = Streams(exact=exact.copy(), rounded=rounded.copy())
    assert run(config, tensors, schemes(None), streams) == {}
    assert np.abs(streams.exact - judged(config, tensors, exact)).max() < CLOSE
    assert np.abs(streams.rounded - judged(config, tensors, rounded)).max() < CLOSE


def test_the_rounded_stream_goes_through_what_was_rounded(config: Qwen2Config) -> None:
    tensors = layer_tensors(config)
    exact = correlated(1)
    rounded = exact + 0.05 * drawn(3, *exact.shape)
    streams = Streams(exact=exact.copy(), rounded=rounded.copy())
    scheme_of = schemes(INT4, q_proj=INT8, k_proj=INT8, v_proj=INT8)
    matrices = run(config, tensors, scheme_of, streams)
    kept = with_rounded(tensors, matrices)
    assert np.abs(streams.exact - judged(config, tensors, exact)).max() < CLOSE
    assert np.abs(streams.rounded - judged(config, kept, rounded)).max() < CLOSE


# Matrices


def test_every_matrix_with_a_scheme_comes_back_by_its_tensors_name(config: Qwen2Config) -> None:
    tensors = layer_tensors(config)
    asked: list[str] = []

    def scheme_of(module: str) -> Scheme | None:
        asked.append(module)
        return {"v_proj": INT8, "up_proj": None}.get(module.split(".")[-1], INT4)

    streams = Streams(exact=correlated(1), rounded=correlated(1))
    matrices = run(config, tensors, scheme_of, streams)
    assert asked == [PREFIX + name for name in MATRICES]
    expected = {f"{PREFIX}{name}.weight" for name in MATRICES if name != "mlp.up_proj"}
    assert matrices.keys() == expected
    for name, matrix in matrices.items():
        assert matrix.codes.shape == tensors[name].shape
        assert matrix.scheme == (INT8 if "v_proj" in name else INT4)


def test_the_checkpoints_tensors_stay_as_they_are(config: Qwen2Config) -> None:
    tensors = layer_tensors(config)
    before = {name: values.copy() for name, values in tensors.items()}
    run(config, tensors, schemes(INT4), Streams(exact=correlated(1), rounded=correlated(1)))
    for name, values in before.items():
        np.testing.assert_array_equal(tensors[name], values)


def test_twice_the_same_gives_the_same_bytes(config: Qwen2Config) -> None:
    tensors = layer_tensors(config)
    one, two = (
        run(config, tensors, schemes(INT4), Streams(exact=correlated(1), rounded=correlated(1)))
        for _ in range(2)
    )
    for name, matrix in one.items():
        assert matrix.codes.tobytes() == two[name].codes.tobytes()
        assert matrix.scales.tobytes() == two[name].scales.tobytes()


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_on_other_inputs_the_layer_is_closer_than_plainly_rounded(
    seed: int, config: Qwen2Config
) -> None:
    tensors = layer_tensors(config, seed)
    streams = Streams(exact=correlated(seed, 16), rounded=correlated(seed, 16))
    ours = with_rounded(tensors, run(config, tensors, schemes(INT4), streams))
    matrices = [f"{PREFIX}{name}.weight" for name in MATRICES]
    plain = tensors | {name: dequantize(quantize(tensors[name], INT4)) for name in matrices}
    x = correlated(seed + 5)
    exact = judged(config, tensors, x)
    errors = [np.square(judged(config, kept, x) - exact).mean() for kept in (ours, plain)]
    assert errors[0] < GAIN * errors[1]


def test_what_was_lost_before_the_layer_is_partly_made_up_for(config: Qwen2Config) -> None:
    tensors = layer_tensors(config)
    exact = correlated(1, 16)
    lost = np.eye(64, dtype=np.float32) + 0.05 * drawn(4, 64, 64) / 8
    rounded = exact @ lost
    streams = Streams(exact=exact.copy(), rounded=rounded.copy())
    run(config, tensors, schemes(INT8), streams)
    alone = Streams(exact=rounded.copy(), rounded=rounded.copy())
    run(config, tensors, schemes(INT8), alone)
    goal = streams.exact
    fitted, unfitted = (
        np.square(each.rounded - goal).mean(dtype=np.float64) for each in (streams, alone)
    )
    assert fitted < MADE_UP * unfitted


# Refusals


def test_activations_that_are_not_finite_are_refused(config: Qwen2Config) -> None:
    tensors = layer_tensors(config)
    name = f"{PREFIX}post_attention_layernorm.weight"
    tensors[name] = tensors[name] * np.float32(1e30)
    streams = Streams(exact=correlated(1), rounded=correlated(1))
    with pytest.raises(CheckpointError, match="not finite; use --method rtn"):
        run(config, tensors, schemes(INT4), streams)


def test_weights_that_are_too_large_are_refused_in_the_last_matrix_too(
    config: Qwen2Config,
) -> None:
    """Nothing behind it would meet what they make of the streams."""
    tensors = layer_tensors(config)
    name = f"{PREFIX}mlp.down_proj.weight"
    tensors[name] = tensors[name] * np.float32(1e20)
    streams = Streams(exact=correlated(1), rounded=correlated(1))
    with pytest.raises(SchemeError, match=r"within 2\*\*48"):
        run(config, tensors, schemes(INT4), streams)
