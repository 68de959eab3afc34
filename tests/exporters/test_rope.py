"""Frequencies and attention factors are transformers' own, in every spelling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config
from transformers import logging as transformers_logging
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen2x.exporters.rope import Rope, read_rope
from qwen2x.quantize.errors import ConfigError

transformers_logging.set_verbosity_error()

# PyTorch's vectorised float32 power is not correctly rounded (theta 1e6, head size 128: one element
# is 1 ulp off), and a quotient of it may be 2 ulps off.
ULPS = 2
# YaRN's frequency is the sum of two such quotients; 3 and 4 ulps are rare (71 of 3000 configs).
RANDOM_ULPS = 4
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}


def judge(raw: dict[str, Any], head_dim: int) -> tuple[np.ndarray, float]:
    """Transformers' frequencies and attention factor of a config."""
    config = Qwen2Config(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, **_copied(raw)
    )
    if config.rope_parameters["rope_type"] == "yarn":
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    else:
        frequencies, factor = Qwen2RotaryEmbedding.compute_default_rope_parameters(config)
    return frequencies.numpy(), factor


def _copied(raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers writes into the dictionaries that it is given."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}


def assert_as_transformers(raw: dict[str, Any], head_dim: int, ulps: int = ULPS) -> Rope:
    rope = read_rope(raw, head_dim)
    frequencies, factor = judge(raw, head_dim)
    ours = rope.inverse_frequencies()
    assert ours.dtype == np.float32
    np.testing.assert_array_max_ulp(ours, frequencies, maxulp=ulps)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-15)
    return rope


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_plain_frequencies_match_transformers(head_dim: int, theta: float) -> None:
    assert_as_transformers({"rope_theta": theta}, head_dim)


@pytest.mark.parametrize("extras", [{}, {"beta_fast": 16, "beta_slow": 2}, {"beta_fast": 0}])
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_yarn_frequencies_match_transformers(
    head_dim: int, factor: float, truncate: bool, extras: dict[str, float]
) -> None:
    scaling = YARN | {"factor": factor, "truncate": truncate} | extras
    rope = assert_as_transformers({"rope_theta": 1e6, "rope_scaling": scaling}, head_dim)
    assert rope.max_positions == max(32768, factor * 32768)


def test_yarn_with_factor_one_is_the_plain_rope() -> None:
    scaling = YARN | {"factor": 1.0}
    yarn = read_rope({"rope_theta": 1e6, "rope_scaling": scaling}, 128)
    plain = read_rope({"rope_theta": 1e6}, 128)
    np.testing.assert_array_max_ulp(
        yarn.inverse_frequencies(), plain.inverse_frequencies(), maxulp=1
    )
    assert yarn.attention_factor == 1


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 1e6, "rope_scaling": YARN},
        {"rope_theta": 1e6, "rope_scaling": {**YARN, "type": "yarn"}},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_theta": 1e6},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": YARN | {"beta_fast": None, "attention_factor": None}},
        {"rope_theta": 1e6, "rope_scaling": YARN, "max_position_embeddings": 32768},
        {"rope_theta": 1_000_000, "rope_scaling": YARN | {"factor": 4}},
    ],
)
def test_every_spelling_gives_the_same_rope(raw: dict[str, Any]) -> None:
    rope = assert_as_transformers(raw, 128)
    np.testing.assert_array_equal(
        rope.inverse_frequencies(),
        read_rope({"rope_theta": 1e6, "rope_scaling": YARN}, 128).inverse_frequencies(),
    )


def test_the_old_type_key_is_read_as_rope_type() -> None:
    scaling = {key: value for key, value in YARN.items() if key != "rope_type"} | {"type": "yarn"}
    assert_as_transformers({"rope_theta": 1e6, "rope_scaling": scaling}, 128)


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {},
        {"rope_parameters": None},
    ],
)
def test_plain_spellings_match_transformers(raw: dict[str, Any]) -> None:
    rope = assert_as_transformers(raw, 64)
    assert not rope.is_yarn
    assert rope.max_positions == 32768


def test_an_original_length_beside_the_rope_settings_counts_as_in_transformers() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0}
    raw = {"rope_scaling": scaling, "original_max_position_embeddings": 4096}
    rope = assert_as_transformers(raw, 64)
    assert rope.original_max_position_embeddings == 4096


def test_yarn_without_original_length_uses_max_positions_as_transformers_does() -> None:
    raw = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 8192}
    rope = assert_as_transformers(raw, 64)
    assert rope.max_positions == 32768


@pytest.mark.parametrize(
    "extras",
    [
        {"attention_factor": 1.25},
        {"mscale": 1.0, "mscale_all_dim": 0.8},
        {"mscale": 0.5},
        {"mscale": 0, "mscale_all_dim": 1.0},
        {"factor": None},
    ],
)
def test_attention_factors_match_transformers(extras: dict[str, Any]) -> None:
    assert_as_transformers(
        {"rope_scaling": YARN | extras, "max_position_embeddings": 98304}, head_dim=64
    )


positive = st.floats(min_value=0.25, max_value=64, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    theta=st.floats(min_value=100, max_value=1e8),
    factor=st.floats(min_value=1, max_value=64),
    original=st.integers(min_value=64, max_value=1 << 20),
    betas=st.tuples(positive, positive).map(sorted),
    truncate=st.booleans(),
    mscales=st.none() | st.tuples(positive, positive),
    attention_factor=st.none() | positive,
)
def test_random_yarn_configs_match_transformers(
    head_dim: int,
    theta: float,
    factor: float,
    original: int,
    betas: list[float],
    truncate: bool,
    mscales: tuple[float, float] | None,
    attention_factor: float | None,
) -> None:
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_slow": betas[0],
        "beta_fast": betas[1],
        "truncate": truncate,
        "attention_factor": attention_factor,
    }
    if mscales:
        parameters |= {"mscale": mscales[0], "mscale_all_dim": mscales[1]}
    assert_as_transformers({"rope_parameters": parameters}, head_dim, RANDOM_ULPS)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "'default' or 'yarn'"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["'llama3'", "'default' or 'yarn'"]),
        ({"rope_scaling": {"type": ["yarn"]}}, ["yarn", "'default' or 'yarn'"]),
        ({"rope_scaling": YARN | {"mystery": 1, "also": 2}}, ["unknown key also, mystery"]),
        ({"rope_scaling": YARN | {"type": "default"}}, ["contradict", "default and yarn"]),
        ({"rope_scaling": {"factor": 4.0}}, ["factor 4.0 but no type", '"rope_type": "yarn"']),
        ({"rope_scaling": [1]}, ["rope_scaling must be an object or null", "[1]"]),
        (
            {"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}},
            ["contradict", "factor is 4.0", "2.0", "keep one"],
        ),
        (
            {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_theta": 1e4},
            ["rope_theta is 10000.0", "1000000.0", "keep one"],
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 4096},
            ["original_max_position_embeddings is 4096", "32768", "keep one"],
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 131072},
            ["original_max_position_embeddings (32768", "131072", "add it"],
        ),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": "32768"}},
            ["whole number", "'32768'"],
        ),
        ({"rope_scaling": YARN | {"factor": "4"}}, ["rope factor must be a number", "'4'"]),
        ({"rope_scaling": YARN | {"factor": -4.0}}, ["rope factor must be a positive", "-4.0"]),
        ({"rope_scaling": YARN | {"factor": float("nan")}}, ["rope factor", "nan"]),
        ({"rope_scaling": YARN | {"truncate": 1}}, ["truncate must be true or false", "1"]),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor must be 1", "0.5"]),
        ({"rope_theta": 1}, ["rope_theta must be greater than 1", "1.0"]),
        ({"rope_theta": "1e6"}, ["rope rope_theta must be a number", "'1e6'"]),
        ({"rope_theta": True}, ["rope_theta", "True"]),
    ],
)
def test_what_cannot_be_carried_over_is_refused(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rope(raw, 128)
    for word in words:
        assert word in str(caught.value)
