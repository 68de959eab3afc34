"""``config.json`` of an MLX folder; how mlx-lm reads it is tested in ``tests/foreign``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import Qwen2Config as TheirConfig

from qwen2x.exporters.config import parse_config
from qwen2x.exporters.exporter import export
from qwen2x.exporters.mlx_config import mlx_config, unread_by_mlx_lm
from tests.tiny_checkpoint import write_tiny_checkpoint

RAW: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def written(**changes: Any) -> dict[str, Any]:
    """What a config becomes; None takes a key away."""
    raw = {key: value for key, value in (RAW | changes).items() if value is not None}
    return mlx_config(parse_config(raw, {}), "bfloat16", None, {})


def exported(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    export(source, "mlx", out=out, **options)
    config: dict[str, Any] = json.loads((out / "config.json").read_text("utf-8"))
    return config


def stored_schemes(folder: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group size and bits of every quantized module, by shapes alone, as mlx-lm infers them."""
    columns = {
        "o_proj": config["num_attention_heads"] * config["head_dim"],
        "down_proj": config["intermediate_size"],
    }
    found = {}
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no dictionary)
            module, _, part = name.rpartition(".")
            if part != "scales":
                continue
            width = columns.get(module.rpartition(".")[2], config["hidden_size"])
            words = file.get_slice(f"{module}.weight").get_shape()[1]
            groups = file.get_slice(name).get_shape()[1]
            settings = {"group_size": width // groups, "bits": words * 32 // width}
            found[module] = settings | {"mode": "affine"}
    return found


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    ("options", "has_overrides"),
    [
        ({"bits": 4, "method": "rtn"}, True),
        ({"bits": 4, "method": "rtn", "group_size": 128}, True),
        ({"bits": 8}, True),
        ({"bits": 8, "group_size": 32}, False),
        ({"bits": 8, "group_size": 128}, False),
    ],
)
def test_overrides_name_exactly_the_modules_whose_scheme_is_another(
    options: dict[str, Any], has_overrides: bool, is_tied: bool, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", is_tied=is_tied)
    config = exported(source, tmp_path / "folder", **options)
    assert config["quantization"] == config["quantization_config"]
    settings = dict(config["quantization"])
    common = {key: settings.pop(key) for key in ("group_size", "bits", "mode")}
    given = {key: value for key, value in options.items() if key != "method"}
    assert common == {"group_size": 32, "mode": "affine"} | given
    stored = stored_schemes(tmp_path / "folder", config)
    assert len(stored) == (7 * 2 + 1 if is_tied else 7 * 2 + 2)
    assert settings == {module: found for module, found in stored.items() if found != common}
    assert bool(settings) is has_overrides


def test_floats_have_no_quantization_even_if_the_source_names_one(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(
        tmp_path / "source", quantization={"bits": 4, "group_size": 64}, quantization_config={}
    )
    config = exported(source, tmp_path / "folder")
    assert not {"quantization", "quantization_config"} & config.keys()


@pytest.mark.parametrize("bits", [None, 4])
def test_the_file_is_sorted_and_keeps_what_others_read(bits: int | None, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", note="Größe", _name_or_path="/somewhere")
    config = exported(source, tmp_path / "folder", bits=bits, method="rtn")
    raw = json.loads((source / "config.json").read_text("utf-8"))
    assert list(config) == sorted(config)
    assert "_name_or_path" not in config
    del raw["_name_or_path"]
    assert {key: config[key] for key in raw} == raw
    text = (tmp_path / "folder" / "config.json").read_text("utf-8")
    assert text.startswith('{\n    "architectures": [\n')
    assert text.endswith("}\n")


# Rope


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 500000.0}, "rope_theta": None},
        {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_theta_stands_where_mlx_lm_reads_it(spelling: dict[str, Any]) -> None:
    config = written(**spelling)
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] is None
    assert "rope_parameters" not in config


def test_a_theta_that_nobody_names_is_written_out() -> None:
    # mlx-lm would take 1,000,000, transformers takes 10,000.
    assert written(rope_theta=None)["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "yarn"} | {k: v for k, v in YARN.items() if k != "rope_type"}},
        {"rope_parameters": YARN},
        {"rope_theta": None, "rope_parameters": YARN | {"rope_theta": 500000.0}},
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            "original_max_position_embeddings": 1024,
        },
    ],
)
def test_yarn_is_written_out_in_full_whatever_its_spelling(spelling: dict[str, Any]) -> None:
    config = written(**spelling)
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 0.1 * math.log(4) + 1,
    }


def test_yarn_that_leaves_its_original_length_to_the_config_gets_it_written() -> None:
    # mlx-lm would take 4096 for it.
    config = written(max_position_embeddings=512, rope_scaling={"rope_type": "yarn", "factor": 2.0})
    assert config["rope_scaling"]["original_max_position_embeddings"] == 512


@given(
    factor=st.floats(1.001, 64),
    attention_factor=st.floats(0.01, 10),
    truncate=st.booleans(),
)
def test_any_attention_factor_is_what_both_mlx_lm_and_transformers_multiply_by(
    factor: float, attention_factor: float, truncate: bool
) -> None:
    named = {"factor": factor, "attention_factor": attention_factor, "truncate": truncate}
    config = written(rope_scaling=YARN | named)
    scaling = config["rope_scaling"]
    # mlx-lm 0.32.2, models/rope_utils.py, YarnRoPE and its defaults.
    above, below = (
        0.1 * scaling.get(key, default) * math.log(factor) + 1
        for key, default in (("mscale", 1), ("mscale_all_dim", 0))
    )
    assert above / below == pytest.approx(attention_factor, rel=1e-9, abs=2e-9)
    theirs = TheirConfig.from_dict(config).rope_parameters
    assert theirs["attention_factor"] == attention_factor
    # And our own reader finds the same frequencies.
    source = parse_config(RAW | {"rope_scaling": YARN | named}, {})
    assert parse_config(config, {}).rope == source.rope


def test_the_usual_attention_factor_needs_no_mscale() -> None:
    assert "mscale" not in written(rope_scaling=YARN)["rope_scaling"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ""),
        ({"rope_scaling": YARN}, ""),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, ""),
        ({"rope_scaling": YARN | {"factor": 1.0}}, ""),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate: false"),
        ({"rope_scaling": YARN | {"factor": 1.0, "attention_factor": 2.0}}, "attention_factor"),
        ({"head_dim": 64}, "head_dim"),
    ],
)
def test_what_mlx_lm_ignores_is_named(changes: dict[str, Any], word: str) -> None:
    notes = unread_by_mlx_lm(parse_config(RAW | changes, {}))
    assert len(notes) == bool(word)
    assert word in "".join(notes)


# Defaults that differ


@pytest.mark.parametrize("is_tied", [True, False, None])
def test_whether_the_head_is_tied_is_always_written(is_tied: bool | None) -> None:
    # A missing key means tied to mlx-lm and untied to transformers.
    assert written(tie_word_embeddings=is_tied)["tie_word_embeddings"] is bool(is_tied)


def test_an_epsilon_and_heads_that_nobody_names_are_written() -> None:
    config = written(num_key_value_heads=None)
    assert config["rms_norm_eps"] == 1e-6
    assert config["num_key_value_heads"] == 4
    assert config["head_dim"] == 32


@pytest.mark.parametrize("key", ["model_file", "rope_traditional", "quantization"])
def test_keys_that_only_mlx_lm_would_follow_are_dropped(key: str) -> None:
    assert key not in written(**{key: "x"})


@pytest.mark.parametrize(
    ("named", "option", "dtype"),
    [
        ({"torch_dtype": "float16"}, None, "float16"),
        ({"dtype": "float32"}, None, "float32"),
        ({}, None, "bfloat16"),
        ({"torch_dtype": "float64"}, None, "bfloat16"),
        ({"torch_dtype": {"": "float32"}}, None, "bfloat16"),
        ({"torch_dtype": "float16"}, "bfloat16", "bfloat16"),
        ({"dtype": "float16"}, "float32", "float32"),
    ],
)
def test_the_float_type_is_the_option_or_what_the_source_says(
    named: dict[str, Any], option: str | None, dtype: str, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", torch_dtype=None)
    raw = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(raw | named), encoding="utf-8")
    config = exported(source, tmp_path / "folder", dtype=option)
    assert config["torch_dtype"] == dtype
    assert "dtype" not in config
    with safe_open(tmp_path / "folder" / "model.safetensors", framework="numpy") as file:
        stored = file.get_slice("model.norm.weight").get_dtype()
    assert stored == {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}[dtype]


# End of text


def test_the_sources_generation_config_is_copied_as_it_is(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", eos_token_id=7)
    content = '{"eos_token_id": [2015, 2013],\n "temperature": 0.7}'
    (source / "generation_config.json").write_text(content, encoding="utf-8")
    config = exported(source, tmp_path / "folder")
    assert (tmp_path / "folder" / "generation_config.json").read_text("utf-8") == content
    assert config["eos_token_id"] == 7


@pytest.mark.parametrize(("eos", "expected"), [(2015, [2015]), ([2015, 2013], [2015, 2013])])
def test_a_missing_generation_config_is_made_of_the_configs_eos(
    eos: int | list[int], expected: list[int], tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", eos_token_id=eos)
    (source / "generation_config.json").unlink()
    config = exported(source, tmp_path / "folder")
    made = json.loads((tmp_path / "folder" / "generation_config.json").read_text("utf-8"))
    assert made == {"eos_token_id": expected}
    assert config["eos_token_id"] == eos


def test_without_any_eos_no_generation_config_is_made(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", eos_token_id=None)
    (source / "generation_config.json").unlink()
    exported(source, tmp_path / "folder")
    assert not (tmp_path / "folder" / "generation_config.json").exists()
