"""``quantization_config`` as GPTQ and AWQ programs write it, and what of it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2x.exporters.stored_quantization import StoredQuantization, read_stored_quantization
from qwen2x.quantize.errors import ConfigError
from tests.packed_checkpoint import quantization_config

GPTQ = quantization_config("gptq", 4, 128, True)
AWQ = quantization_config("awq", 4, 128, False)
LAYERS = 2


def read(settings: dict[str, Any], **changes: Any) -> StoredQuantization:
    return read_stored_quantization(settings | changes, LAYERS)


def refusal(settings: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(settings, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_official_releases_are_read() -> None:
    found = read(GPTQ)
    assert found.name == "gptq int4-g128"
    assert (found.zero_offset, found.is_ordered, found.is_symmetric) == (1, False, True)
    assert read(GPTQ, bits=8).name == "gptq int8-g128"
    found = read(AWQ)
    assert found.name == "awq int4-g128-zp"
    assert found.zero_offset == 0


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_only_the_first_gptq_format_stores_zero_points_minus_one(key: str) -> None:
    assert read(GPTQ, **{key: "gptq"}).zero_offset == 1
    assert read(GPTQ, **{key: "gptq_v2"}).zero_offset == 0
    assert read(GPTQ, **{key: "GPTQ_V2"}).zero_offset == 0


def test_all_matrices_within_layers_are_quantized_and_no_other() -> None:
    found = read(GPTQ)
    assert found.packs("model.layers.1.mlp.down_proj")
    assert found.packs("model.layers.11.self_attn.q_proj")
    for other in ("model.embed_tokens", "lm_head", "model.norm", "model.layers.0.input_layernorm"):
        assert not found.packs(other)


def test_modules_may_be_left_float_by_both_formats() -> None:
    found = read(AWQ, modules_to_not_convert=["down_proj", "model.layers.0."])
    assert not found.packs("model.layers.1.mlp.down_proj")
    assert not found.packs("model.layers.0.self_attn.o_proj")
    assert found.packs("model.layers.1.self_attn.o_proj")
    chosen = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    found = read(GPTQ, modules_in_block_to_quantize=chosen)
    assert found.packs("model.layers.1.mlp.down_proj")
    assert not found.packs("model.layers.1.self_attn.o_proj")


@pytest.mark.parametrize(
    ("stored", "columns", "ours"),
    [(32, 896, 32), (64, 896, 64), (128, 896, 128), (256, 1024, 128), (-1, 896, 128),
     (-1, 192, 64), (96, 192, 32)],
)  # fmt: skip
def test_a_larger_group_is_several_of_ours(stored: int, columns: int, ours: int) -> None:
    scheme = read(GPTQ, group_size=stored).scheme(columns, "float16", is_symmetric=True)
    assert scheme.group_size == ours
    assert scheme.scale_type == "float16"


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        (GPTQ, {"quant_method": "fp8"}, ["already quantized (fp8)", "gptq or awq"]),
        (GPTQ, {"quant_method": ["gptq"]}, ["already quantized", "gptq or awq"]),
        ({"group_size": 64, "bits": 4}, {}, ["already quantized (by MLX)", "float checkpoint"]),
        (GPTQ, {"bits": 3}, ["bits to be 4 or 8 for gptq, got 3"]),
        (GPTQ, {"bits": 2}, ["bits to be 4 or 8 for gptq, got 2"]),
        (GPTQ, {"bits": None}, ["bits", "got None"]),
        (AWQ, {"bits": 8}, ["bits to be 4 for awq, got 8"]),
        (GPTQ, {"group_size": 16}, ["group_size", "multiple of 32", "got 16"]),
        (GPTQ, {"group_size": 0}, ["group_size", "got 0"]),
        (GPTQ, {"group_size": None}, ["group_size", "got None"]),
        (GPTQ, {"checkpoint_format": "marlin"}, ["checkpoint_format", "gptq_v2", "'marlin'"]),
        (GPTQ, {"format": "bitblas"}, ["format", "'bitblas'"]),
        (GPTQ, {"is_marlin_format": True}, ["is_marlin_format", "True"]),
        (GPTQ, {"dynamic": {"-:.*down.*": {}}}, ["dynamic", "left out"]),
        (GPTQ, {"lm_head": True}, ["lm_head", "True"]),
        (GPTQ, {"pack_dtype": "int8"}, ["pack_dtype", "'int8'"]),
        (GPTQ, {"rotation": "hadamard"}, ["rotation", "'hadamard'"]),
        (GPTQ, {"sym": "yes"}, ["sym", "true or false", "'yes'"]),
        (GPTQ, {"modules_in_block_to_quantize": "mlp"}, ["modules_in_block_to_quantize"]),
        (GPTQ, {"modules_in_block_to_quantize": [[5]]}, ["modules_in_block_to_quantize", "[5]"]),
        (GPTQ, {"modules_in_block_to_quantize": []}, ["every matrix float"]),
        (
            GPTQ,
            {"modules_in_block_to_quantize": [["self_attn.q_proj"]]},
            ["model.layers.0.self_attn.q_proj", "all quantized or all float", "k_proj"],
        ),
        (AWQ, {"version": "gemv"}, ["version", "gemm", "'gemv'"]),
        (AWQ, {"version": "exllama"}, ["version", "'exllama'"]),
        (AWQ, {"format": "llm-awq"}, ["format", "'llm-awq'"]),
        (AWQ, {"zero_point": False}, ["zero_point", "true", "False"]),
        (AWQ, {"modules_to_not_convert": [["a"]]}, ["modules_to_not_convert"]),
        (AWQ, {"modules_to_not_convert": ["up_proj"]}, ["gate_proj", "up_proj as float"]),
    ],
)
def test_what_is_not_carried_over_is_named(
    settings: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    message = refusal(settings, **changes)
    for word in words:
        assert word in message
    assert "float checkpoint" in message or "remove it" in message
