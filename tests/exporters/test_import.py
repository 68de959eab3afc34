"""Bundles of GPTQ and AWQ checkpoints: the integers stored, and the logits of transformers.

Transformers computes with the weights that the format's definition gives (``Layer.weight``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from onnx.numpy_helper import to_array
from safetensors.numpy import load_file

from qwen2x.exporters.exporter import export, plan_export
from qwen2x.exporters.options import Options
from qwen2x.runtimes.runtime import open_runtime
from tests.exporters.judge import Session, judge_logits, load_judge, random_ids
from tests.exporters.refusal import refused_export
from tests.packed_checkpoint import Layer, Packed, write_packed_checkpoint

Float = NDArray[np.float32]
# Two orders of summing products in float32; logits of size 4.
FLOAT32 = 1e-4
# Activations and biases of MLX in float16, over two layers.
FLOAT16 = 0.03
# ONNX Runtime rounds activations to 8 bits for its fast kernels.
INT8_ACTIVATIONS = 0.1
UNITS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
PLAIN: list[dict[str, Any]] = [
    {},
    {"bits": 8, "group_size": 128, "is_tied": False},
    {"sym": False, "group_size": 64},
    {"sym": False, "settings": {"checkpoint_format": "gptq_v2"}},
    {"bits": 8, "sym": False},
    {"group_size": -1},
    {"method": "awq", "sym": False, "group_size": 128, "is_tied": False},
]
ORDERED: list[dict[str, Any]] = [
    {"order": "shared"},
    {"order": "shared", "bits": 8, "sym": False},
    {"order": "own", "sym": False},
]


def open_graph(bundle: Path) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    load_external_data_for_model(model, str(bundle))
    return model, {tensor.name: to_array(tensor) for tensor in model.graph.initializer}


def exact_logits(bundle: Path, ids: NDArray[np.int64]) -> Float:
    """The graph's, with products in float32 instead of 8-bit activations."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    path = bundle / "exact.onnx"
    path.write_bytes(model.SerializeToString())
    logits: Float = Session(path).run(ids).logits
    path.unlink()
    return logits


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Of two codes in a byte the low one first."""
    flat = packed.reshape(len(packed), -1)
    return np.stack([flat & 15, flat >> 4], axis=-1).reshape(len(flat), -1) if bits == 4 else flat


def joined(packed: Packed, layer: int, modules: tuple[str, ...]) -> list[Layer]:
    return [packed.layers[f"model.layers.{layer}.{module}"] for module in modules]


@pytest.mark.parametrize("variant", PLAIN)
def test_an_onnx_bundle_holds_the_checkpoints_integers(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    packed = write_packed_checkpoint(tmp_path, **variant)
    bits = variant.get("bits", 4)
    bundle = export(packed.folder, out=tmp_path / "bundle").bundle
    _, arrays = open_graph(bundle)
    for layer in (0, 1):
        for unit, modules in UNITS.items():
            name = f"model.layers.{layer}.{unit}.weight"
            parts = joined(packed, layer, modules)
            codes = unpack(arrays[f"{name}_codes"], bits)
            assert np.array_equal(codes, np.concatenate([part.codes for part in parts]))
            size = codes.shape[1] // arrays[f"{name}_scales"].shape[1]
            scales = [part.scales[part.group_of[::size]].T for part in parts]
            assert arrays[f"{name}_scales"].dtype == np.float16
            assert np.array_equal(arrays[f"{name}_scales"], np.concatenate(scales))
            if not variant.get("sym", True):
                zeros = np.concatenate([part.zeros[part.group_of[::size]].T for part in parts])
                stored = unpack(arrays[f"{name}_zero_points"], bits)
                assert np.array_equal(stored[:, : zeros.shape[1]], zeros)
            else:
                assert f"{name}_zero_points" not in arrays


@pytest.mark.parametrize("variant", PLAIN)
def test_an_mlx_folder_holds_the_checkpoints_integers(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    packed = write_packed_checkpoint(tmp_path, **variant)
    bits = variant.get("bits", 4)
    done = export(packed.folder, "mlx", out=tmp_path / "folder")
    is_wide = bits == 8 and not variant.get("sym", True)
    assert done.manifest["dtype"] == ("float32" if is_wide else "float16")
    arrays = load_file(done.bundle / "model.safetensors")
    for module, layer in packed.layers.items():
        codes = unpack(arrays[f"{module}.weight"].view(np.uint8), bits)
        assert np.array_equal(codes, layer.codes)
        size = codes.shape[1] // arrays[f"{module}.scales"].shape[1]
        group_of = layer.group_of[::size]
        assert np.array_equal(arrays[f"{module}.scales"], layer.scales[group_of].T)
        wide = -(layer.zeros * layer.scales.astype(np.float64))[group_of].T
        if variant.get("sym", True) or is_wide:
            assert np.array_equal(arrays[f"{module}.biases"], wide)
        else:
            # A zero point of 4 bits times a float16 has up to 15 digits, of which 11 are kept.
            error = np.abs(arrays[f"{module}.biases"] - wide) / layer.scales[group_of].T
            assert error.max() <= 15 * 2.0**-11


@pytest.mark.parametrize("variant", PLAIN + ORDERED)
def test_an_onnx_bundle_computes_what_transformers_does(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    packed = write_packed_checkpoint(tmp_path, **variant)
    ids = random_ids(2, 24)
    expected = judge_logits(load_judge(packed.floats), ids)
    bundle = export(packed.folder, out=tmp_path / "bundle").bundle
    assert np.abs(exact_logits(bundle, ids) - expected).max() < FLOAT32
    with open_runtime(bundle) as runtime:
        assert np.abs(runtime.logits(ids) - expected).max() < INT8_ACTIVATIONS


@pytest.mark.parametrize("variant", PLAIN)
def test_an_mlx_folder_computes_what_transformers_does(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    packed = write_packed_checkpoint(tmp_path, **variant)
    ids = random_ids(1, 24)
    expected = judge_logits(load_judge(packed.floats), ids)
    for dtype, limit in ((None, FLOAT16), ("float32", FLOAT32)):
        folder = export(packed.folder, "mlx", out=tmp_path / f"{dtype}", dtype=dtype).bundle
        with open_runtime(folder) as runtime:
            assert np.abs(runtime.logits(ids) - expected).max() < limit


@pytest.mark.parametrize("variant", [{}, {"bits": 8, "sym": False}, {"order": "shared"}])
def test_a_bundle_for_cuda_in_float16_computes_what_transformers_does(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    """On the CPU's kernels, as there is no other device here."""
    packed = write_packed_checkpoint(tmp_path, **variant)
    ids = random_ids(1, 24)
    expected = judge_logits(load_judge(packed.floats), ids)
    done = export(packed.folder, out=tmp_path / "bundle", device="cuda")
    assert done.manifest["dtype"] == "float16"
    found = Session(done.bundle / "model.onnx").run(ids).logits
    assert np.abs(found - expected).max() < FLOAT16


def test_scattered_groups_cost_one_gather_for_matrices_of_one_input(tmp_path: Path) -> None:
    shared = write_packed_checkpoint(tmp_path / "shared", order="shared")
    model, _ = open_graph(export(shared.folder, out=tmp_path / "one").bundle)
    count = [node.op_type for node in model.graph.node].count
    assert count("Gather") == 2 * 4 + 1 + 1  # of the embedding, and of a length
    assert count("MatMulNBits") == 2 * 4
    own = write_packed_checkpoint(tmp_path / "own", order="own")
    model, _ = open_graph(export(own.folder, out=tmp_path / "many").bundle)
    count = [node.op_type for node in model.graph.node].count
    assert count("Gather") == 2 * 7 + 1 + 1
    assert count("MatMulNBits") == 2 * 7


def test_scattered_groups_have_no_mlx_folder(tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path / "source", order="shared")
    message = refused_export(packed.folder, tmp_path / "parent" / "folder", target="mlx")
    assert "model.layers.0.self_attn.q_proj and 13 others" in message
    assert "use --to onnx" in message


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_eight_bits_are_for_embedding_and_head(target: str, tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path, is_tied=False)
    plain = export(packed.folder, target, out=tmp_path / "plain")
    smaller = export(packed.folder, target, out=tmp_path / "smaller", bits=8, group_size=64)
    assert plain.manifest["schemes"]["embed_tokens"] == "float"
    assert plain.manifest["schemes"]["lm_head"] == "float"
    assert smaller.manifest["schemes"] == plain.manifest["schemes"] | {
        "embed_tokens": "int8-g64", "lm_head": "int8-g64",
    }  # fmt: skip
    assert smaller.manifest["scheme"] == plain.manifest["scheme"] == "int4-g32"
    assert smaller.manifest["weight_bytes"] < 0.65 * plain.manifest["weight_bytes"]
    with open_runtime(plain.bundle) as one, open_runtime(smaller.bundle) as other:
        ids = random_ids(1, 24)
        assert np.abs(one.logits(ids) - other.logits(ids)).max() < INT8_ACTIVATIONS


@pytest.mark.parametrize(
    ("settings", "floats"),
    [
        ({"modules_in_block_to_quantize": [["mlp.gate_proj", "mlp.up_proj"]]}, "down_proj"),
        ({"modules_to_not_convert": ["self_attn", "down_proj"]}, "qkv_proj"),
    ],
)
@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_modules_that_were_left_float_stay_so(
    target: str, settings: dict[str, Any], floats: str, tmp_path: Path
) -> None:
    method = "awq" if "modules_to_not_convert" in settings else "gptq"
    packed = write_packed_checkpoint(tmp_path, method=method, sym=method == "gptq")
    reference = load_file(packed.floats / "model.safetensors")

    def unquantize(tensors: dict[str, NDArray[Any]]) -> None:
        for module in packed.layers:
            if not module.endswith(("gate_proj", "up_proj")):
                for part in ("qweight", "qzeros", "scales", "g_idx"):
                    tensors.pop(f"{module}.{part}", None)
                if not module.endswith(("q_proj", "k_proj", "v_proj")):
                    tensors.pop(f"{module}.bias", None)
                tensors[f"{module}.weight"] = reference[f"{module}.weight"]

    packed.change(unquantize)
    packed.configure(**settings)
    done = export(packed.folder, target, out=tmp_path / "bundle", dtype="float32")
    assert done.manifest["schemes"][floats] == "float"
    assert done.manifest["schemes"]["gate_up_proj"].startswith("int4-g32")
    assert done.manifest["scheme"].endswith("-mixed")
    if target == "mlx":
        pytest.importorskip("mlx.core", reason="mlx is not installed")
    ids = random_ids(1, 24)
    expected = judge_logits(load_judge(packed.floats), ids)
    with open_runtime(done.bundle) as runtime:
        limit = FLOAT32 if target == "mlx" else INT8_ACTIVATIONS
        assert np.abs(runtime.logits(ids) - expected).max() < limit


def test_the_manifest_says_what_was_carried_over(tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path, method="awq", sym=False, group_size=128)
    for target in ("onnx", "mlx"):
        done = export(packed.folder, target, out=tmp_path / target)
        assert done.manifest["method"] == "awq"
        assert done.manifest["imported"]["bits"] == 4
        assert done.manifest["imported"]["group_size"] == 128
        assert done.manifest["scheme"] == "int4-g128-zp"
    # Transformers' loaders would take a bundle with this key for a GPTQ or AWQ folder.
    config = json.loads((tmp_path / "onnx" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    config = json.loads((tmp_path / "mlx" / "config.json").read_text("utf-8"))
    assert config["quantization_config"] == config["quantization"]
    assert config["quantization"]["group_size"] == 128
    assert config["quantization"]["model.embed_tokens"] is False


@pytest.mark.parametrize(
    ("variant", "options", "words"),
    [
        ({}, {"bits": 4}, ["already quantized (gptq int4-g32)", "--bits 4", "--bits 8 alone"]),
        ({}, {"bits": 8, "method": "gptq"}, ["already quantized", "--method gptq"]),
        ({}, {"target": "mlx", "dtype": "bfloat16"}, ["scales", "are float16", "float32"]),
        ({}, {"device": "cuda", "dtype": "bfloat16"}, ["scales", "are float16"]),
        (
            {"scale_dtype": bfloat16},
            {"target": "mlx", "dtype": "float16"},
            ["scales", "are bfloat16"],
        ),
        (
            {"bits": 8, "sym": False},
            {"target": "mlx", "dtype": "float16"},
            ["8-bit zero points", "float32"],
        ),
    ],
)
def test_options_that_would_change_the_numbers_are_refused(
    variant: dict[str, Any], options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    packed = write_packed_checkpoint(tmp_path / "source", **variant)
    message = refused_export(packed.folder, tmp_path / "parent" / "bundle", **options)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("variant", "dtypes"),
    [
        ({}, ("float32", "float16", "float16")),
        ({"scale_dtype": bfloat16}, ("float32", "bfloat16", "bfloat16")),
    ],
)
def test_the_float_type_holds_the_scales(
    variant: dict[str, Any], dtypes: tuple[str, ...], tmp_path: Path
) -> None:
    packed = write_packed_checkpoint(tmp_path, **variant)
    places = ({"device": "cpu"}, {"device": "cuda"}, {"target": "mlx"})
    for number, (place, dtype) in enumerate(zip(places, dtypes, strict=True)):
        done = export(packed.folder, out=tmp_path / str(number), **place)
        assert done.manifest["dtype"] == dtype
    _, arrays = open_graph(tmp_path / "1")
    name = "model.layers.0.self_attn.o_proj"
    assert np.array_equal(arrays[f"{name}.weight_scales"], packed.layers[name].scales.T)


@pytest.mark.parametrize("variant", [*PLAIN, *ORDERED[:1]])
@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_a_plan_of_the_config_alone_has_the_bundles_weights(
    target: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    from qwen2x.exporters.config import read_config

    packed = write_packed_checkpoint(tmp_path, **variant)
    plan = plan_export(read_config(packed.folder), Options(target=target))
    if variant.get("order") and target == "mlx":
        return
    done = export(packed.folder, target, out=tmp_path / "bundle")
    for file in plan.data_files:
        assert (done.bundle / file.name).stat().st_size == file.size
    assert plan.bit_plan.name == done.manifest["scheme"]


def test_shards_of_a_packed_checkpoint_are_read(tmp_path: Path) -> None:
    from tests.tiny_checkpoint import write_weights

    packed = write_packed_checkpoint(tmp_path)
    whole = export(packed.folder, out=tmp_path / "whole").bundle
    tensors = load_file(packed.folder / "model.safetensors")
    (packed.folder / "model.safetensors").unlink()
    write_weights(packed.folder, tensors, max_shard_bytes=50_000)
    assert len(list(packed.folder.glob("*.safetensors"))) > 5
    sharded = export(packed.folder, out=tmp_path / "sharded").bundle
    data = "model.onnx_data"
    assert (whole / data).read_bytes() == (sharded / data).read_bytes()
