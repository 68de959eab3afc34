"""The numbers in an MLX folder: judged by mlx itself and by the same weights' ONNX bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_model
from safetensors.numpy import load_file

from qwen2x.exporters.exporter import export
from qwen2x.exporters.weights import FLOAT_TYPES
from qwen2x.quantize.groups import dequantize, quantize
from qwen2x.quantize.scheme import Scheme
from tests.tiny_checkpoint import random_tensors, write_tiny_checkpoint, write_weights

Tensors = dict[str, NDArray[Any]]
# mlx 0.32 computes scale * code + bias in the scales' type: the product and the sum are rounded to
# it, each by half an ulp of a number of up to 2**bits scales.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
DTYPES = list(ROUNDING)
SCHEMES: list[dict[str, Any]] = [
    {"bits": bits, "group_size": size, "method": "rtn"} for bits in (4, 8) for size in (32, 64, 128)
]
# These have 8 bits in every scheme.
WIDE = ("q_proj", "k_proj", "v_proj", "embed_tokens", "lm_head")
# Matrices that are one in the ONNX graph.
PARTS = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
}


@pytest.fixture(scope="module")
def mx() -> Any:
    return pytest.importorskip("mlx.core", reason="mlx is not installed")


def stored(folder: Path) -> Tensors:
    """Every tensor, as the safetensors library reads it."""
    return load_file(folder / "model.safetensors")


def modules_of(tensors: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]


def scheme_of(folder: Path, module: str) -> Scheme:
    settings = json.loads((folder / "config.json").read_text("utf-8"))["quantization"]
    found = settings.get(module, settings)
    return Scheme(bits=found["bits"], group_size=found["group_size"])


def codes_of_words(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """As mx.quantize says it: codes one after another, low bits first."""
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(words), -1, bits).astype(np.uint32)
    return (codes << np.arange(bits, dtype=np.uint32)).sum(axis=2, dtype=np.uint32)


def codes_of_bytes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """As MatMulNBits says it: [rows, groups, bytes], of two codes in a byte the low one first."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1)
    return packed.reshape(len(packed), -1)


def exact_values(folder: Path, bits: int) -> Tensors:
    """Matrices that are codes times a power of two, the first and last code in every 32 columns."""
    random = np.random.default_rng(11)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = random_tensors(config, 0, "float32")
    for name, values in tensors.items():
        if values.ndim == 2:
            is_wide = name.removesuffix(".weight").endswith(WIDE)
            zero = 128 if is_wide or bits == 8 else 8
            codes = random.integers(0, 2 * zero, values.shape)
            codes[:, 3::32], codes[:, 17::32] = 0, 2 * zero - 1
            exponents = random.integers(-12, -8, (len(codes), 1))
            signs = random.choice([-1, 1], exponents.shape)
            tensors[name] = ((codes - zero) * signs * np.exp2(exponents)).astype(np.float32)
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_holds_the_bytes_that_mlx_itself_would_write(
    scheme: dict[str, int], dtype: str, mx: Any, tmp_path: Path
) -> None:
    # mlx puts the longer side of a group on its last code; these matrices leave it no choice.
    source = write_tiny_checkpoint(tmp_path / "source", is_tied=False)
    values = exact_values(source, scheme["bits"])
    write_weights(source, values)
    folder = export(source, "mlx", out=tmp_path / "folder", dtype=dtype, **scheme).bundle
    ours = mx.load(str(folder / "model.safetensors"))
    for module in modules_of(ours):
        of_module = scheme_of(folder, module)
        theirs = mx.quantize(
            mx.array(values[f"{module}.weight"]).astype(getattr(mx, dtype)),
            group_size=of_module.group_size,
            bits=of_module.bits,
        )
        for part, array in zip(("weight", "scales", "biases"), theirs, strict=True):
            found = ours[f"{module}.{part}"]
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            assert mx.array_equal(found, array), f"{module}.{part}"
    assert len(modules_of(ours)) == 2 * 7 + 2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "source", is_tied=False, dtype="float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_mlx_reads_is_what_the_quantizer_meant(
    scheme: dict[str, int], dtype: str, mx: Any, source: Path, tmp_path: Path
) -> None:
    folder = export(source, "mlx", out=tmp_path / "folder", dtype=dtype, **scheme).bundle
    ours, theirs = mx.load(str(folder / "model.safetensors")), stored(source)
    for module in modules_of(ours):
        of_module = scheme_of(folder, module)
        words, scales, biases = (ours[f"{module}.{p}"] for p in ("weight", "scales", "biases"))
        restored = mx.dequantize(
            words, scales, biases, group_size=of_module.group_size, bits=of_module.bits
        )
        matrix = quantize(theirs[f"{module}.weight"], of_module)
        steps = np.abs(matrix.scales).repeat(of_module.group_size, axis=1)
        limit = ROUNDING[dtype] * 2**of_module.bits * steps
        difference = np.abs(np.array(restored.astype(mx.float32)) - dequantize(matrix))
        assert (difference <= limit).all(), module
        np.testing.assert_array_equal(codes_of_words(np.array(words), of_module.bits), matrix.codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_are_those_of_the_checkpoint_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", is_tied=False, dtype=dtype)
    export(source, "mlx", out=tmp_path / "folder")
    ours, theirs = stored(tmp_path / "folder"), stored(source)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype == FLOAT_TYPES[dtype]
        assert ours[name].tobytes() == values.tobytes(), name


def onnx_matrices(bundle: Path) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.float32]]]:
    """Name in the graph, packed codes [rows, groups, bytes] and scales of every matrix."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    load_external_data_for_model(model, str(bundle))
    found = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    for name, scales in found.items():
        if name.endswith(".weight_scales"):
            weight = name.removesuffix("_scales")
            # An embedding's codes are a table [rows, bytes].
            packed = found.get(f"{weight}_codes", found.get(f"{weight}_table"))
            assert packed is not None
            low = found.get(f"{weight}_low_codes")
            if low is not None:
                # Codes of 6 bits, given one to a byte.
                lows = np.stack([low >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
                high = np.stack([packed & 15, packed >> 4], axis=-1)
                packed = 4 * high.reshape(len(high), -1) + lows.reshape(len(low), -1)
            yield weight.removesuffix(".weight"), packed.reshape(*scales.shape, -1), scales


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [{"bits": 4, "method": "rtn"}, {"bits": 4, "method": "rtn", "group_size": 128}, {"bits": 8}],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_targets_hold_the_same_integers_and_scales(
    dtype: str, scheme: dict[str, int], is_tied: bool, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", is_tied=is_tied)
    bundle = export(source, "onnx", out=tmp_path / "onnx", **scheme).bundle
    folder = export(source, "mlx", out=tmp_path / "mlx", dtype=dtype, **scheme).bundle
    tensors = stored(folder)
    seen = []
    for name, packed, scales in onnx_matrices(bundle):
        layer, tail = name.split(".")[:3], ".".join(name.split(".")[3:])
        modules = [".".join([*layer, part]) for part in PARTS[tail]] if tail in PARTS else [name]
        found = [scheme_of(folder, module) for module in modules]
        assert len(set(found)) == 1
        words = [tensors[f"{module}.weight"] for module in modules]
        codes = np.concatenate([codes_of_words(part, found[0].bits) for part in words])
        np.testing.assert_array_equal(codes, codes_of_bytes(packed, found[0].bits))
        # Scales are bfloat16 numbers, so that no type rounds them.
        stored_scales = np.concatenate([tensors[f"{module}.scales"] for module in modules])
        np.testing.assert_array_equal(stored_scales.astype(np.float32), scales)
        biases = np.concatenate([tensors[f"{module}.biases"] for module in modules])
        zero_points = -biases.astype(np.float32) / scales
        assert (zero_points == found[0].zero_point).all()
        seen += modules
    assert sorted(seen) == sorted(modules_of(tensors))


def test_a_folder_of_floats_is_a_source_like_the_one_it_was_made_of(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.4}
    source = write_tiny_checkpoint(tmp_path / "source", rope_scaling=scaling)
    export(source, "mlx", out=tmp_path / "floats")
    for options in ({}, {"bits": 4, "method": "rtn"}):
        out = tmp_path / f"{len(options)}"
        export(source, "mlx", out=out / "direct", **options)
        export(tmp_path / "floats", "mlx", out=out / "again", **options)
        for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
            assert (out / "direct" / name).read_bytes() == (out / "again" / name).read_bytes(), name
