"""Codes, scales and zero points of GPTQ and AWQ files, integer by integer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from qwen2x.exporters.checkpoint import open_checkpoint
from qwen2x.exporters.packed_matrices import PackedMatrices
from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import dequantize
from qwen2x.quantize.plan import unit_of
from tests.exporters.refusal import refused_export
from tests.packed_checkpoint import Packed, Tensors, write_packed_checkpoint

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
V2 = {"checkpoint_format": "gptq_v2"}
VARIANTS: list[dict[str, Any]] = [
    {"group_size": 32},
    {"group_size": 64, "settings": V2},
    {"group_size": 128, "sym": False},
    {"group_size": 128, "sym": False, "settings": V2},
    {"group_size": -1},
    {"group_size": -1, "sym": False},
    {"bits": 8, "group_size": 128},
    {"bits": 8, "group_size": 32, "sym": False},
    {"bits": 8, "group_size": 64, "sym": False, "settings": V2},
    {"order": "shared"},
    {"order": "own", "sym": False, "bits": 8},
    {"scale_dtype": bfloat16},
    {"scale_dtype": np.float32},
    {"method": "awq", "sym": False, "group_size": 32},
    {"method": "awq", "sym": False, "group_size": 64},
    {"method": "awq", "sym": False, "group_size": 128},
    {"method": "awq", "sym": False, "group_size": -1},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_the_formats_integers(variant: dict[str, Any], tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path, **variant)
    assert len(packed.layers) == 2 * 7
    with open_checkpoint(packed.folder) as checkpoint:
        assert checkpoint.config.quantization is not None
        matrices = PackedMatrices(checkpoint, checkpoint.config.quantization)
        schemes = matrices.schemes()
        for module, layer in packed.layers.items():
            scheme = schemes[unit_of(module)]
            assert scheme.is_symmetric == variant.get("sym", True)
            assert scheme.bits == variant.get("bits", 4)
            order = np.argsort(layer.group_of, kind="stable")
            assert (module in matrices.orders) == (variant.get("order", "plain") != "plain")
            found = matrices.rows(f"{module}.weight", 0, len(layer.codes), scheme)
            assert np.array_equal(found.codes, layer.codes[:, order])
            group_of = layer.group_of[order][:: scheme.group_size]
            scales = layer.scales[group_of].T
            assert np.array_equal(found.scales, scales.astype(np.float32))
            assert np.array_equal(found.scales.astype(layer.scales.dtype), scales)
            if found.zero_points is not None:
                assert np.array_equal(found.zero_points, layer.zeros[group_of].T)
            assert np.array_equal(dequantize(found), layer.weight[:, order])


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 21), (7, 8), (8, 16), (100, 128)])
def test_rows_may_begin_and_end_within_a_word(
    method: str, start: int, stop: int, tmp_path: Path
) -> None:
    packed = write_packed_checkpoint(tmp_path, method=method, sym=False)
    layer = packed.layers[Q_PROJ]
    with open_checkpoint(packed.folder) as checkpoint:
        assert checkpoint.config.quantization is not None
        matrices = PackedMatrices(checkpoint, checkpoint.config.quantization)
        scheme = matrices.schemes()[unit_of(Q_PROJ)]
        found = matrices.rows(f"{Q_PROJ}.weight", start, stop, scheme)
    assert np.array_equal(found.codes, layer.codes[start:stop])
    assert np.array_equal(found.zero_points, layer.zeros[:, start:stop].T)
    assert np.array_equal(found.scales, layer.scales[:, start:stop].T.astype(np.float32))


def test_a_unit_is_symmetric_only_if_all_its_zero_points_are_in_the_middle(tmp_path: Path) -> None:
    """What config.json says of it is a claim: AutoGPTQ writes sym: true beside any zero points."""
    packed = write_packed_checkpoint(tmp_path)
    k_proj = Q_PROJ.replace("q_proj", "k_proj")

    def move_one(tensors: Tensors) -> None:
        tensors[f"{k_proj}.qzeros"][0, 0] -= 1 << 4

    packed.change(move_one)
    with open_checkpoint(packed.folder) as checkpoint:
        assert checkpoint.config.quantization is not None
        matrices = PackedMatrices(checkpoint, checkpoint.config.quantization)
        schemes = matrices.schemes()
        rows = matrices.rows(f"{k_proj}.weight", 0, 4, schemes[unit_of(k_proj)])
    asymmetric = [unit for unit, scheme in schemes.items() if not scheme.is_symmetric]
    assert asymmetric == ["model.layers.0.self_attn.qkv_proj"]
    assert rows.zero_points is not None
    assert rows.zero_points[:, 0].tolist() == [8, 7, 8, 8]


def test_a_checkpoint_may_leave_out_the_order_and_zero_biases(tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path)

    def leave_out(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.endswith((".g_idx", "o_proj.bias", "mlp.down_proj.bias")):
                del tensors[name]

    packed.change(leave_out)
    with open_checkpoint(packed.folder) as checkpoint:
        assert not any(name.endswith(".g_idx") for name in checkpoint.tensors)
        assert any(name.endswith("up_proj.bias") for name in checkpoint.tensors)


def scatter_unevenly(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.g_idx"][0] = 1


def name_a_group_that_is_not_there(tensors: Tensors) -> None:
    tensors[f"{Q_PROJ}.g_idx"][-32:] = 99


def add_a_bias(tensors: Tensors) -> None:
    tensors[f"{DOWN_PROJ}.bias"][3] = 0.5


def store_zero_point_16(tensors: Tensors) -> None:
    tensors[f"{DOWN_PROJ}.qzeros"][0, 0] |= 15


def spoil_a_scale(tensors: Tensors) -> None:
    tensors[f"{DOWN_PROJ}.scales"][1, 5] = np.inf


def mix_scale_types(tensors: Tensors) -> None:
    tensors[f"{DOWN_PROJ}.scales"] = tensors[f"{DOWN_PROJ}.scales"].astype(np.float32)


def drop_scales(tensors: Tensors) -> None:
    del tensors[f"{DOWN_PROJ}.scales"]


def leave_one_float(tensors: Tensors) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        del tensors[f"{DOWN_PROJ}.{part}"]
    tensors[f"{DOWN_PROJ}.weight"] = np.zeros((128, 256), np.float16)


def halve_a_matrix(tensors: Tensors) -> None:
    tensors[f"{DOWN_PROJ}.qweight"] = tensors[f"{DOWN_PROJ}.qweight"][:16].copy()


def store_words_as_floats(tensors: Tensors) -> None:
    tensors[f"{DOWN_PROJ}.qweight"] = tensors[f"{DOWN_PROJ}.qweight"].astype(np.float32)


def quantize_the_head(tensors: Tensors) -> None:
    tensors["lm_head.qweight"] = np.zeros((16, 2048), np.int32)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (scatter_unevenly, [f"{Q_PROJ}.g_idx", "each of 4 groups 32 inputs"]),
        (name_a_group_that_is_not_there, [f"{Q_PROJ}.g_idx"]),
        (add_a_bias, ["Qwen2 has no down_proj bias", f"{DOWN_PROJ}.bias"]),
        (store_zero_point_16, [f"{DOWN_PROJ}.qzeros", "zero point 16", "0..15"]),
        (spoil_a_scale, [f"{DOWN_PROJ}.scales", "NaN or infinity"]),
        (mix_scale_types, ["scales of one type", "float16 and float32"]),
        (drop_scales, ["quantized: gptq int4-g32", "1 missing", f"{DOWN_PROJ}.scales"]),
        (leave_one_float, ["missing", f"{DOWN_PROJ}.qweight", "surplus", f"{DOWN_PROJ}.weight"]),
        (halve_a_matrix, [f"{DOWN_PROJ}.qweight is [16, 128], expected [32, 128]"]),
        (store_words_as_floats, [f"{DOWN_PROJ}.qweight", "dtype F32; expected I32"]),
        (quantize_the_head, ["1 surplus", "lm_head.qweight"]),
    ],
)
@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_a_file_that_does_not_fit_its_config_is_refused(
    target: str, damage: Callable[[Tensors], None], words: list[str], tmp_path: Path
) -> None:
    packed = write_packed_checkpoint(tmp_path / "source")
    packed.change(damage)
    message = refused_export(packed.folder, tmp_path / "parent" / "bundle", target=target)
    for word in words:
        assert word in message


def test_an_order_that_the_config_promises_must_be_there(tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path / "source", settings={"desc_act": True})
    packed.change(lambda tensors: tensors.pop(f"{Q_PROJ}.g_idx"))
    message = refused_export(packed.folder, tmp_path / "parent" / "bundle")
    assert "1 missing" in message
    assert f"{Q_PROJ}.g_idx" in message


def test_quantized_tensors_without_a_config_are_refused(tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path / "source")
    path = packed.folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    del config["quantization_config"]
    path.write_text(json.dumps(config), "utf-8")
    message = refused_export(packed.folder, tmp_path / "parent" / "bundle")
    assert "14 missing" in message
    assert "qweight" in message


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path / "source")
    packed.configure(group_size=96)
    message = refused_export(packed.folder, tmp_path / "parent" / "bundle")
    assert "group_size 96 does not divide the 128 inputs of" in message


def test_a_file_that_is_cut_meanwhile_is_told(tmp_path: Path) -> None:
    packed: Packed = write_packed_checkpoint(tmp_path)
    with open_checkpoint(packed.folder) as checkpoint:
        with (packed.folder / "model.safetensors").open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(CheckpointError, match=r"changed while it was read"):
            checkpoint.columns(f"{DOWN_PROJ}.qweight", 0, 8)
