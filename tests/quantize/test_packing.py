"""Formats byte for byte; the judges are ONNX Runtime's own kernels and quantizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.capi import _pybind_state

from qwen2x.quantize.groups import QuantizedMatrix, dequantize
from qwen2x.quantize.packing import matmul_nbits_shape, pack_bytes, pack_mlx_words, unpack_bytes
from qwen2x.quantize.scheme import Scheme

Codes = NDArray[np.uint8]
SCHEMES = [Scheme(bits=bits, group_size=size) for bits in (4, 8) for size in (32, 64, 128)]
# Two orders of adding 256 float32 products of size 1.
FLOAT32_SUM = 1e-4


def random_matrix(scheme: Scheme, rows: int = 24, columns: int = 256) -> QuantizedMatrix:
    random = np.random.default_rng(scheme.bits + scheme.group_size)
    codes = random.integers(0, scheme.max_code + 1, (rows, columns), np.uint8)
    scales = random.normal(0, 0.01, (rows, columns // scheme.group_size)).astype(np.float32)
    return QuantizedMatrix(codes=codes, scales=scales, scheme=scheme)


def run_node(operator: str, inputs: dict[str, Any], **attributes: int) -> Any:
    """The output of a graph of one com.microsoft node."""
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node(operator, list(inputs), ["y"], domain="com.microsoft", **attributes)],
        "one_node",
        [helper.make_tensor_value_info(k, types[v.dtype.name], v.shape) for k, v in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_matmul_nbits_multiplies_with_the_matrix_that_we_packed(scheme: Scheme) -> None:
    matrix = random_matrix(scheme)
    rows, columns = matrix.codes.shape
    packed = pack_bytes(matrix.codes, scheme.bits)
    x = np.random.default_rng(1).standard_normal((3, columns), np.float32)
    y = run_node(
        "MatMulNBits",
        {
            "x": x,
            "codes": packed.reshape(matmul_nbits_shape(rows, columns, scheme)),
            "scales": matrix.scales,
        },
        K=columns,
        N=rows,
        bits=scheme.bits,
        block_size=scheme.group_size,
    )
    np.testing.assert_allclose(y, x @ dequantize(matrix).T, atol=FLOAT32_SUM, rtol=FLOAT32_SUM)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_gather_block_quantized_reads_the_rows_that_we_packed(scheme: Scheme) -> None:
    matrix = random_matrix(scheme)
    rows_wanted = np.array([[0, 23, 7], [7, 1, 2]], np.int64)
    y = run_node(
        "GatherBlockQuantized",
        {
            "codes": pack_bytes(matrix.codes, scheme.bits),
            "rows": rows_wanted,
            "scales": matrix.scales,
        },
        bits=scheme.bits,
        block_size=scheme.group_size,
        gather_axis=0,
        quantize_axis=1,
    )
    np.testing.assert_array_equal(y, dequantize(matrix)[rows_wanted])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_bytes_are_those_of_onnxruntimes_own_quantizer(scheme: Scheme) -> None:
    # Its scale is the largest weight over -8 (or -128); such weights leave it no choice of codes.
    matrix = random_matrix(scheme)
    rows, columns = matrix.codes.shape
    codes = matrix.codes.copy()
    codes[:, :: scheme.group_size] = 0
    scales = np.exp2(np.random.default_rng(2).integers(-9, -3, matrix.scales.shape))
    scales = scales.astype(np.float32)
    values = dequantize(QuantizedMatrix(codes=codes, scales=scales, scheme=scheme))
    shape = matmul_nbits_shape(rows, columns, scheme)
    packed = np.zeros(shape, np.uint8)
    theirs = np.zeros(scales.size, np.float32)
    zero_points = np.zeros((rows, -(-shape[1] * scheme.bits // 8)), np.uint8)
    pack = getattr(_pybind_state, f"quantize_matmul_{scheme.bits}bits")
    turned = np.ascontiguousarray(values.T)
    pack(packed, turned, theirs, zero_points, scheme.group_size, rows, columns, True)
    np.testing.assert_array_equal(theirs.reshape(scales.shape), scales)
    np.testing.assert_array_equal(pack_bytes(codes, scheme.bits).reshape(shape), packed)


def test_mlx_words_hold_code_zero_in_their_lowest_bits() -> None:
    # mlx 0.32, mx.quantize: element i of a word is (word >> bits*i) & mask.
    codes = np.arange(16, dtype=np.uint8)[None]
    expected = np.array([[0x76543210, 0xFEDCBA98]], np.uint32)
    np.testing.assert_array_equal(pack_mlx_words(codes, 4), expected)
    codes = np.array([[0x01, 0x23, 0x45, 0x67, 0x80, 0xFF, 0x00, 0x7F]], np.uint8)
    expected = np.array([[0x67452301, 0x7F00FF80]], np.uint32)
    np.testing.assert_array_equal(pack_mlx_words(codes, 8), expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_mlx_itself_reads_our_words(scheme: Scheme) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    matrix = random_matrix(scheme)
    scales = mx.array(matrix.scales)
    restored = mx.dequantize(
        mx.array(pack_mlx_words(matrix.codes, scheme.bits)),
        scales,
        -scales * scheme.zero_point,
        group_size=scheme.group_size,
        bits=scheme.bits,
    )
    np.testing.assert_allclose(np.array(restored), dequantize(matrix), atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_words_scales_and_biases_are_those_of_mlxs_own_quantizer(scheme: Scheme) -> None:
    # It puts the longer side of a group on that side's last code: with the first and the last code
    # in every group, and scales that are powers of two of either sign, it has no choice but ours.
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    matrix = random_matrix(scheme)
    codes = matrix.codes.copy()
    codes[:, 0 :: scheme.group_size] = 0
    codes[:, 1 :: scheme.group_size] = scheme.max_code
    random = np.random.default_rng(3)
    exponents = random.integers(-9, -3, matrix.scales.shape)
    scales = (np.exp2(exponents) * random.choice([-1, 1], exponents.shape)).astype(np.float32)
    values = dequantize(QuantizedMatrix(codes=codes, scales=scales, scheme=scheme))
    words, their_scales, their_biases = mx.quantize(
        mx.array(values), group_size=scheme.group_size, bits=scheme.bits
    )
    assert pack_mlx_words(codes, scheme.bits).tobytes() == np.array(words).tobytes()
    np.testing.assert_array_equal(np.array(their_scales), scales)
    np.testing.assert_array_equal(np.array(their_biases), -scales * scheme.zero_point)


@given(
    codes=st.tuples(st.integers(1, 4), st.integers(1, 6).map(lambda n: 32 * n)).flatmap(
        lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 15))
    )
)
def test_four_bit_codes_survive_packing(codes: Codes) -> None:
    packed = pack_bytes(codes, 4)
    assert packed.nbytes * 2 == codes.size
    np.testing.assert_array_equal(unpack_bytes(packed, 4), codes)


@given(codes=arrays(np.uint8, (3, 64)))
def test_eight_bit_codes_survive_packing_without_sharing_memory(codes: Codes) -> None:
    restored = unpack_bytes(pack_bytes(codes, 8), 8)
    np.testing.assert_array_equal(restored, codes)
    assert not np.shares_memory(restored, codes)


@given(codes=arrays(np.uint8, (2, 64), elements=st.integers(0, 15)))
def test_onnx_bytes_and_mlx_words_are_the_same_stream(codes: Codes) -> None:
    for bits in (4, 8):
        assert pack_mlx_words(codes, bits).tobytes() == pack_bytes(codes, bits).tobytes()
