"""Codes of 6 bits: two planes in an ONNX graph, words in an MLX folder, the same integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from qwen2x.exporters.bundle_writer import write_bundle
from qwen2x.exporters.checkpoint import open_checkpoint
from qwen2x.exporters.config import read_config
from qwen2x.exporters.exporter import plan_checkpoint
from qwen2x.exporters.options import Options
from qwen2x.quantize.groups import dequantize, quantize
from qwen2x.quantize.packing import pack_bytes, pack_planes, unpack_bytes
from qwen2x.quantize.plan import BitPlan, units_of
from qwen2x.quantize.scheme import Scheme
from tests.exporters.judge import Session, judge_logits, load_judge, random_ids
from tests.exporters.test_onnx_quantized import with_float_activations
from tests.tiny_checkpoint import write_tiny_checkpoint

EIGHT = Scheme(bits=8, group_size=32)
# Sums of two products in float32, over two layers.
FLOAT32_ACTIVATIONS = 2e-5
# Activations of 8 bits in groups of 32 move logits of size 3 by so much.
INT8_ACTIVATIONS = 0.1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("six") / "source", is_tied=False, dtype="float32"
    )


def export_six(source: Path, out: Path, target: str, scheme: Scheme) -> Path:
    """All of the layers in 6 bits, rounded plainly."""
    config = read_config(source)
    options = Options(target=target, bits=8, dtype="float32")
    schemes = {
        unit: scheme if ".layers." in unit else EIGHT
        for unit in units_of(config.num_hidden_layers, is_tied=config.is_tied)
    }
    plan = BitPlan(schemes=schemes, is_mixed=True)
    write_bundle(
        source, out, lambda checkpoint, _: plan_checkpoint(checkpoint, options, plan), options,
        source_id="six", force=False, progress=lambda done, total: None,
        on_layer=lambda stage, done, total: None,
    )  # fmt: skip
    return out


def judge_of(source: Path, scheme: Scheme) -> Any:
    """transformers' model with the values that plain rounding leaves."""
    model = load_judge(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                of = scheme if ".layers." in name else EIGHT
                values = dequantize(quantize(parameter.numpy(), of))
                parameter.copy_(torch.from_numpy(values))
    return model


@pytest.mark.parametrize("group_size", [32, 64])
def test_two_planes_give_what_transformers_gives(
    group_size: int, source: Path, tmp_path: Path
) -> None:
    scheme = Scheme(bits=6, group_size=group_size)
    bundle = export_six(source, tmp_path / "bundle", "onnx", scheme)
    ids = random_ids(2, 16)
    theirs = judge_logits(judge_of(source, scheme), ids)
    exact = Session(with_float_activations(bundle)).run(ids).logits
    np.testing.assert_allclose(exact, theirs, atol=FLOAT32_ACTIVATIONS, rtol=0)
    ours = Session(bundle / "model.onnx").run(ids).logits
    np.testing.assert_allclose(ours, theirs, atol=INT8_ACTIVATIONS, rtol=0)
    bits = {
        attribute.i
        for node in onnx.load(bundle / "model.onnx", load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    assert bits == {2, 4, 8}


@pytest.mark.parametrize("group_size", [32, 64])
def test_mlx_reads_the_same_values(group_size: int, source: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    scheme = Scheme(bits=6, group_size=group_size)
    folder = export_six(source, tmp_path / "folder", "mlx", scheme)
    stored = mx.load(str(folder / "model.safetensors"))
    with open_checkpoint(source) as checkpoint:
        for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
            parts = (stored[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
            values = np.array(mx.dequantize(*parts, group_size=group_size, bits=6))
            expected = dequantize(quantize(checkpoint.rows(f"{module}.weight"), scheme))
            np.testing.assert_allclose(values, expected, atol=1e-6, rtol=0)
    words = load_file(folder / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    assert words.shape[1] == checkpoint.config.hidden_size * 6 // 32


def test_six_bits_lie_between_four_and_eight(source: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        weights = checkpoint.rows("model.layers.0.mlp.up_proj.weight")
    lost = [
        float(
            np.square(
                weights - dequantize(quantize(weights, Scheme(bits=bits, group_size=32)))
            ).sum()
        )
        for bits in (4, 6, 8)
    ]
    # A bit less doubles the error of every weight; scales are rounded as well.
    assert 12 < lost[0] / lost[1] < 22
    assert 8 < lost[1] / lost[2] < 22


def test_codes_come_back_from_their_bytes_and_from_their_planes() -> None:
    codes = np.random.default_rng(0).integers(0, 64, (7, 96)).astype(np.uint8)
    np.testing.assert_array_equal(unpack_bytes(pack_bytes(codes, 6), 6), codes)
    high, low = pack_planes(codes)
    low_codes = np.stack([low >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(7, 96)
    np.testing.assert_array_equal(unpack_bytes(high, 4) * 4 + low_codes, codes)
    stream = int.from_bytes(pack_bytes(codes, 6)[0].tobytes(), "little")
    assert [stream >> 6 * index & 63 for index in range(96)] == codes[0].tolist()
