"""Quantized graphs: the stored bytes, dequantized and put into transformers' model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ml_dtypes import bfloat16

from qwen2x.quantize.groups import QuantizedMatrix, dequantize
from qwen2x.quantize.packing import unpack_bytes
from qwen2x.quantize.scheme import Scheme
from tests.exporters.graphs import TARGETS, Make, external, load_graph, source_of
from tests.exporters.judge import Float, Session, judge_logits, load_judge, random_ids

# MatMulNBits with accuracy_level 4 rounds activations to int8 per group of 32..128 columns; the
# largest of 65,536 differences grows with the group (0.092 seen), their mean hardly (0.014 seen).
INT8_ACTIVATIONS, INT8_ACTIVATIONS_MEAN = 0.15, 0.025
# The same graph told to compute in float32: what remains is the order of sums; 4e-6 seen.
FLOAT32_ACTIVATIONS = 2e-5


@pytest.mark.parametrize("variant", ["tied", "untied", "head-dim"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_graphs_equal_transformers_with_the_dequantized_weights(
    bits: int, group_size: int, variant: str, made: Make
) -> None:
    bundle = made(variant, bits=bits, group_size=group_size)
    model = load_judge(source_of(bundle))
    put_dequantized(model, bundle)
    ids = random_ids(2, 16)
    theirs = judge_logits(model, ids)
    ours = Session(bundle / "model.onnx").run(ids).logits
    np.testing.assert_allclose(ours, theirs, atol=INT8_ACTIVATIONS, rtol=0)
    assert np.abs(ours - theirs).mean() < INT8_ACTIVATIONS_MEAN
    exact = Session(with_float_activations(bundle)).run(ids).logits
    np.testing.assert_allclose(exact, theirs, atol=FLOAT32_ACTIVATIONS, rtol=0)


@pytest.mark.parametrize("target", ["cuda-float16-int4", "cuda-bfloat16-int8"])
def test_scales_of_other_float_types_lose_nothing(target: str, made: Make) -> None:
    options = TARGETS[target]
    bundle = made(**options)
    cpu = made(bits=options["bits"], method="rtn")
    theirs, ours = stored_matrices(cpu), stored_matrices(bundle)
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_four_bits_are_worse_than_eight_and_eight_close_to_float(made: Make) -> None:
    ids = random_ids(2, 16)
    theirs = judge_logits(load_judge(source_of(made())), ids)
    errors = [
        float(np.abs(Session(made(bits=bits) / "model.onnx").run(ids).logits - theirs).mean())
        for bits in (8, 4)
    ]
    assert errors[0] < 0.02 < errors[1] < 0.3


def stored_matrices(bundle: Path) -> dict[str, Float]:
    """Every quantized matrix of a bundle by its name, as floats, from the bytes on disk."""
    model = load_graph(bundle)
    infos = external(model)
    kinds = {item.name: item.data_type for item in model.graph.initializer}
    data = (bundle / "model.onnx_data").read_bytes()

    def stored(name: str) -> bytes:
        return data[infos[name].offset : infos[name].offset + infos[name].length]

    # Scales of float32 graphs are stored as bfloat16 and cast.
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    matrices = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {item.name: item.i for item in node.attribute}
        rows, bits = attributes["N"], attributes["bits"]
        scheme = Scheme(bits=bits, group_size=attributes["block_size"])
        packed = np.frombuffer(stored(node.input[1]), np.uint8).reshape(rows, -1)
        scales = casts.get(node.input[2], node.input[2])
        kind = onnx.helper.tensor_dtype_to_np_dtype(kinds[scales])
        scales = np.frombuffer(stored(scales), kind).astype(np.float32).reshape(rows, -1)
        matrix = QuantizedMatrix(codes=unpack_bytes(packed, bits), scales=scales, scheme=scheme)
        matrices[node.input[1].removesuffix("_codes")] = dequantize(matrix)
    return matrices


def put_dequantized(model: torch.nn.Module, bundle: Path) -> None:
    """Replaces transformers' weights by those of the bundle, packed ones split into their parts."""
    parameters = dict(model.named_parameters())
    parts = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    replaced = set()
    for name, values in stored_matrices(bundle).items():
        module = name.split(".")[-2]
        row = 0
        for part in parts.get(module, (module,)):
            key = name.replace(module, part)
            rows = parameters[key].shape[0]
            parameters[key].data.copy_(torch.from_numpy(values[row : row + rows]))
            row += rows
            replaced.add(key)
        assert row == len(values)
    matrices = {name for name, value in parameters.items() if value.ndim == 2}
    # An untied embedding is read by GatherBlockQuantized and has no matrix product.
    assert matrices - replaced <= {"model.embed_tokens.weight"}
    for name in matrices - replaced:
        parameters[name].data.copy_(torch.from_numpy(stored_embedding(bundle)))


def stored_embedding(bundle: Path) -> Float:
    """The rows of an embedding of its own, which are 8-bit codes."""
    model = load_graph(bundle)
    infos = external(model)
    (node,) = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    attributes = {item.name: item.i for item in node.attribute}
    assert attributes["bits"] == 8
    data = (bundle / "model.onnx_data").read_bytes()
    (cast,) = [item for item in model.graph.node if item.output[0] == node.input[2]]
    codes, scales = infos[node.input[0]], infos[cast.input[0]]
    packed = np.frombuffer(data[codes.offset : codes.offset + codes.length], np.uint8)
    factors = np.frombuffer(data[scales.offset : scales.offset + scales.length], bfloat16)
    centred = packed.astype(np.float32).reshape(-1, attributes["block_size"]) - 128
    return (centred * factors.astype(np.float32)[:, None]).reshape(2048, -1)


def with_float_activations(bundle: Path) -> Path:
    """The same graph and data with MatMulNBits told to compute in float32."""
    model = load_graph(bundle)
    for node in model.graph.node:
        for item in node.attribute:
            if item.name == "accuracy_level":
                item.i = 1
    path = bundle / "float_activations.onnx"
    onnx.save_model(model, path)
    return path
