"""Configs are read as transformers' Qwen2Config reads them, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config as TransformersConfig
from transformers import Qwen2ForCausalLM

from qwen2x.exporters.config import parse_config, read_config
from qwen2x.quantize.errors import ConfigError, SourceError
from tests.exporters.refusal import refused_export
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

SMALL: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
}
# Released configs (huggingface.co/Qwen): hidden, inner, layers, heads, kv heads, vocabulary, tied.
RELEASED = {
    "Qwen2-0.5B": (896, 4864, 24, 14, 2, 151936, True, 494_032_768),
    "Qwen2-1.5B": (1536, 8960, 28, 12, 2, 151936, True, 1_543_714_304),
    "Qwen2-7B": (3584, 18944, 28, 28, 4, 152064, False, 7_615_616_512),
    "Qwen2-72B": (8192, 29568, 80, 64, 8, 152064, False, 72_706_203_648),
}


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (SMALL | changes).items() if value is not ...}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(**changes), {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("head_dim", [..., 64])
@pytest.mark.parametrize("is_tied", [True, False, ...])
def test_expected_tensors_are_those_of_transformers_model(head_dim: Any, is_tied: Any) -> None:
    raw = changed(head_dim=head_dim, tie_word_embeddings=is_tied)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(TransformersConfig(**raw))
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if is_tied is True:
        del theirs["lm_head.weight"]
    ours = parse_config(raw, {}).expected_tensors()
    assert ours == theirs
    assert parse_config(raw, {}).parameters == sum(math.prod(shape) for shape in theirs.values())


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_have_the_published_number_of_parameters(name: str) -> None:
    hidden, inner, layers, heads, kv_heads, vocabulary, is_tied, parameters = RELEASED[name]
    config = parse_config(
        changed(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=is_tied,
            max_window_layers=layers,
            use_sliding_window=False,
            sliding_window=32768,
        ),
        {},
    )
    assert config.parameters == parameters
    assert config.cache_elements_per_token == 2 * layers * kv_heads * (hidden // heads)


def test_missing_keys_get_transformers_defaults() -> None:
    raw = changed(num_key_value_heads=None, rms_norm_eps=...)
    theirs, ours = TransformersConfig(**raw), parse_config(raw, {})
    assert ours.num_key_value_heads == theirs.num_key_value_heads == 4
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.is_tied == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.max_position_embeddings == theirs.max_position_embeddings


def test_the_example_is_read_with_all_its_end_tokens() -> None:
    config = read_config(EXAMPLE)
    assert config.eos_token_ids == (2015, 2013)
    assert config.bos_token_id == 2013
    assert config.pad_token_id == 2013
    assert config.head_dim == 32


def test_the_config_names_the_end_token_where_the_generation_config_does_not() -> None:
    assert parse_config(changed(eos_token_id=7), {}).eos_token_ids == (7,)
    assert parse_config(changed(eos_token_id=7), {"eos_token_id": [9, 7, 9]}).eos_token_ids == (
        9,
        7,
    )
    assert parse_config(changed(), {}).eos_token_ids == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 64},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0},
        {"layer_types": ["full_attention"] * 3, "use_sliding_window": True, "max_window_layers": 0},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ],
)
def test_a_sliding_window_is_refused_exactly_where_transformers_uses_one(
    changes: dict[str, Any],
) -> None:
    slides = "sliding_attention" in TransformersConfig(**changed(**changes)).layer_types
    if slides:
        message = refusal(**changes)
        assert "sliding" in message
        assert "as in every released Qwen2" in message
    else:
        parse_config(changed(**changes), {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["expected a Qwen2 model", "'llama'"]),
        ({"model_type": ...}, ["expected a Qwen2 model", "None"]),
        ({"model_type": "qwen2_moe"}, ["expected a Qwen2 model", "mixture of experts"]),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, ["Qwen2ForCausalLM", "Sequence"]),
        ({"architectures": 5}, ["Qwen2ForCausalLM", "got 5"]),
        ({"hidden_act": "gelu"}, ["'silu'", "'gelu'"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["already quantized (fp8)", "float"]),
        ({"quantization_config": "gptq"}, ["already quantized (gptq)", "float"]),
        ({"dual_chunk_attention_config": {"chunk_size": 1}}, ["dual_chunk_attention", "remove"]),
        ({"num_hidden_layers": "3"}, ["num_hidden_layers", "1..4096", "'3'"]),
        ({"num_hidden_layers": 1 << 40}, ["num_hidden_layers", "1..4096", str(1 << 40)]),
        ({"hidden_size": 1 << 62}, ["hidden_size", "1..1048576", str(1 << 62)]),
        ({"hidden_size": -128}, ["hidden_size", "-128"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"hidden_size": 128.0}, ["hidden_size", "128.0"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"intermediate_size": ...}, ["intermediate_size", "None"]),
        ({"hidden_size": 130}, ["num_attention_heads 4 does not divide hidden_size 130"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "num_attention_heads 4"]),
        ({"head_dim": 36}, ["head_dim", "multiple of 8", "36"]),
        ({"rms_norm_eps": math.inf}, ["rms_norm_eps", "between 0 and 1", "inf"]),
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps", "nan"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "'1e-6'"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings", "true or false", "'false'"]),
        ({"eos_token_id": [1, "2"]}, ["eos_token_id", "whole number"]),
        ({"eos_token_id": -1}, ["eos_token_id", "-1"]),
        ({"bos_token_id": "1"}, ["bos_token_id", "'1'"]),
        ({"layer_types": 5}, ["layer_types", "full_attention", "5"]),
        (
            {"use_sliding_window": True, "max_window_layers": None},
            ["sliding window", "from layer None"],
        ),
        ({"max_position_embeddings": 1 << 50}, ["max_position_embeddings", str(1 << 50)]),
        ({"max_position_embeddings": "4096"}, ["max_position_embeddings", "'4096'"]),
    ],
)
def test_what_is_no_plain_qwen2_is_refused_by_name(
    changes: dict[str, Any], words: list[str]
) -> None:
    message = refusal(**changes)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "qwen2"', "cannot be read as JSON"),
        ("[1, 2]", "must hold a JSON object, got list"),
        ("\xff\xfe", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(text: str, words: str, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    (source / "config.json").write_bytes(text.encode("latin-1"))
    message = refused_export(source, tmp_path / "new" / "bundle")
    assert words in message
    assert str(source / "config.json") in message


def test_a_damaged_generation_config_is_refused(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    (source / "generation_config.json").write_text("{", encoding="utf-8")
    message = refused_export(source, tmp_path / "new" / "bundle")
    assert "generation_config.json cannot be read as JSON" in message


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config\.json; expected a Hugging Face model"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"model_type": "qwen2_moe"},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mystery": 1}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_a_refused_config_leaves_nothing_behind(changes: dict[str, Any], tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", **changes)
    refused_export(source, tmp_path / "new" / "bundle")


def test_unknown_keys_outside_rope_are_carried_into_the_bundles_config(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", a_key_of_tomorrow=[1])
    assert read_config(source).raw == json.loads((source / "config.json").read_text("utf-8"))


def test_an_end_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [2048]}', "utf-8")
    with pytest.raises(ConfigError, match="eos_token_id 2048 lies beyond the vocabulary of 2048"):
        read_config(source)


def test_a_number_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", rope_theta=10**400)
    with pytest.raises(ConfigError, match="rope_theta must be a positive number"):
        read_config(source)
