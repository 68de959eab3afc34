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

# Bit for bit where PyTorch raises to powers on vector units, whole blocks of 16 or 32 of them, as
# for head sizes 64 and 128.
ULPS = 1
# What a block leaves over is correctly rounded, 1 ulp off; a quotient of it may be 2 ulps off, and
# YaRN's frequency is the sum of two such quotients.
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


def spelled(spelling: str, parameters: dict[str, Any], theta: float) -> dict[str, Any]:
    """One rope in a config of the year 2024, of transformers 4.45, or of transformers 5."""
    if spelling == "rope_parameters":
        return {spelling: {"rope_type": "yarn", "rope_theta": theta, **parameters}}
    return {"rope_theta": theta, "rope_scaling": {spelling: "yarn", **parameters}}


@settings(max_examples=300, deadline=None)
@given(
    head_dim=st.sampled_from([64, 128]),
    theta=st.sampled_from([1e4, 1e6]) | st.floats(min_value=100, max_value=1e8),
    factor=st.sampled_from([1.0, 2.0, 4.0]),
    original=st.sampled_from([32768, 4096, 131072]),
    betas=st.none() | st.tuples(positive, positive).map(sorted),
    truncate=st.none() | st.booleans(),
    attention_factor=st.none() | positive,
    spelling=st.sampled_from(["type", "rope_type", "rope_parameters"]),
)
def test_frequencies_are_within_one_ulp_in_every_spelling(
    head_dim: int,
    theta: float,
    factor: float,
    original: int,
    betas: list[float] | None,
    truncate: bool | None,
    attention_factor: float | None,
    spelling: str,
) -> None:
    parameters: dict[str, Any] = {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention_factor,
    }
    if truncate is not None:
        parameters["truncate"] = truncate
    if betas is not None:
        parameters |= {"beta_slow": betas[0], "beta_fast": betas[1]}
    raw = spelled(spelling, parameters, theta)
    rope = assert_as_transformers(raw, head_dim)
    ours, theirs = np.float32(rope.attention_factor), np.float32(judge(raw, head_dim)[1])
    np.testing.assert_array_max_ulp(ours, theirs, maxulp=1)


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_factor_of_a_plain_config_is_what_its_card_writes(head_dim: int, factor: float) -> None:
    plain = {"rope_theta": 1e6, "max_position_embeddings": 32768}
    card = {"type": "yarn", "factor": factor, "original_max_position_embeddings": 32768}
    given = read_rope(plain, head_dim).with_factor(factor)
    frequencies, attention_factor = judge(plain | {"rope_scaling": card}, head_dim)
    np.testing.assert_array_max_ulp(given.inverse_frequencies(), frequencies, maxulp=ULPS)
    assert given.attention_factor == attention_factor
    assert given.max_positions == factor * 32768


def test_a_config_with_yarn_gains_the_plain_rope() -> None:
    own = read_rope(
        {"rope_theta": 1e6, "rope_scaling": YARN, "max_position_embeddings": 131072}, 64
    )
    assert own.with_factor(4) is own
    plain = own.with_factor(1)
    assert (plain.is_yarn, plain.max_positions, plain.attention_factor) == (False, 32768, 1)
    np.testing.assert_array_equal(
        plain.inverse_frequencies(), read_rope({"rope_theta": 1e6}, 64).inverse_frequencies()
    )


def test_an_attention_factor_of_its_own_says_nothing_of_other_factors() -> None:
    own = read_rope({"rope_scaling": YARN | {"attention_factor": 1.3}}, 64)
    assert own.with_factor(1).attention_factor == 1
    with pytest.raises(ConfigError, match=r"factor 4 .*1\.3.* of factor 2.*--yarn 1,4"):
        own.with_factor(2)


def test_a_length_that_the_config_lacks_may_be_told() -> None:
    raw = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 131072}
    told = read_rope(raw, 64, original_context=32768)
    said = read_rope(raw | {"original_max_position_embeddings": 32768}, 64)
    np.testing.assert_array_equal(told.inverse_frequencies(), said.inverse_frequencies())
    plain = read_rope({"max_position_embeddings": 131072}, 64, original_context=32768)
    assert plain.with_factor(1).max_positions == 32768
    assert plain.with_factor(4).max_positions == 131072


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (4096, ["--original-context is 4096", "32768", "leave the option out"]),
        (0, ["--original-context is 0", "32768"]),
    ],
)
def test_a_length_that_contradicts_the_config_is_refused(told: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rope({"rope_scaling": YARN}, 64, original_context=told)
    for word in words:
        assert word in str(caught.value)


def test_a_long_plain_config_is_not_stretched_before_its_length_is_told() -> None:
    plain = read_rope({"max_position_embeddings": 131072}, 64)
    assert plain.with_factor(1) == plain
    with pytest.raises(ConfigError, match=r"max_position_embeddings is 131072.*--original-context"):
        plain.with_factor(2)
    with pytest.raises(ConfigError, match=r"must be in 1\.\.131072 .* got 131073"):
        read_rope({"max_position_embeddings": 131072}, 64, original_context=131073)


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
            [
                "max_position_embeddings is 131072, expected at most 32768",
                'add "original_max_position_embeddings": 32768',
                "--original-context 32768",
            ],
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
