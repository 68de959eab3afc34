"""The graph: valid for onnx, and in plain ONNX Runtime equal to transformers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from ml_dtypes import bfloat16
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo

from qwen2x.exporters.exporter import export
from qwen2x.quantize.groups import QuantizedMatrix, dequantize
from qwen2x.quantize.packing import unpack_bytes
from qwen2x.quantize.scheme import Scheme
from tests.exporters.judge import Float, Session, judge_logits, load_judge, random_ids
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

# Logits are about 1 in size. Float32 sums in another order: 4e-6 seen, 1e-4 allowed.
FLOAT32 = 1e-4
# Matrices, activations and cache in float16 (11 bits); 2e-3 seen with two layers.
FLOAT16 = 1e-2
# MatMulNBits with accuracy_level 4 rounds activations to int8 per group of 32..128 columns; the
# largest of 65,536 differences grows with the group (0.092 seen), their mean hardly (0.014 seen).
INT8_ACTIVATIONS, INT8_ACTIVATIONS_MEAN = 0.15, 0.025
# The same graph told to compute in float32: what remains is the order of sums; 4e-6 seen.
FLOAT32_ACTIVATIONS = 2e-5

KV8 = {"kv_bits": 8, "calibration": str(EXAMPLE.parent / "sample.txt")}
# Every row of the table of targets, float and quantized, and with an 8-bit cache.
TARGETS = {
    "cpu-float32": {"device": "cpu"},
    "cpu-int4": {"device": "cpu", "bits": 4, "method": "rtn"},
    "cpu-int8": {"device": "cpu", "bits": 8},
    "cuda-float32": {"device": "cuda", "dtype": "float32"},
    "cuda-float16": {"device": "cuda", "dtype": "float16"},
    "cuda-bfloat16": {"device": "cuda", "dtype": "bfloat16"},
    "cuda-float16-int4": {"device": "cuda", "dtype": "float16", "bits": 4, "method": "rtn"},
    "cuda-bfloat16-int8": {"device": "cuda", "dtype": "bfloat16", "bits": 8},
    "cpu-int8-cache": {"device": "cpu", **KV8},
    "cuda-float16-int8-cache": {"device": "cuda", "dtype": "float16", **KV8},
    "cuda-bfloat16-int4-int8-cache": {"device": "cuda", "dtype": "bfloat16", "bits": 4, **KV8},
}
# What a checkpoint may look like.
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"is_tied": False},
    "head-dim": {"head_dim": 64},
    "one-kv-head": {"num_key_value_heads": 1},
    "every-head-its-own": {"num_key_value_heads": 4},
    "sharded": {"max_shard_bytes": 200_000},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "one-layer": {"num_hidden_layers": 1},
    "rope-parameters": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "epsilon": {"rms_norm_eps": 1e-2},
    "yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    },
    "yarn-untruncated": {
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "truncate": False,
            "original_max_position_embeddings": 128, "attention_factor": 1.3,
        },
    },
}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives the bundle of a variant and options, made once; the source lies beside it."""
    root = tmp_path_factory.mktemp("graphs")
    known: dict[str, Path] = {}

    def make(variant: str = "tied", **options: Any) -> Path:
        key = f"{variant}-{'-'.join(Path(str(value)).name for value in options.values())}"
        if key not in known:
            source = root / variant / "source"
            if not source.exists():
                write_tiny_checkpoint(source, **VARIANTS[variant])
            # The config's own factor alone, which is then in the graph without a choice.
            factors = {"yarn": (4.0,)} if variant.startswith("yarn") else {}
            export(source, out=source.parent / key, **factors, **options)
            known[key] = source.parent / key
        return known[key]

    return make


def source_of(bundle: Path) -> Path:
    return bundle.parent / "source"


def load_graph(bundle: Path) -> onnx.ModelProto:
    """The graph without its weights."""
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def external(model: onnx.ModelProto) -> dict[str, ExternalDataInfo]:
    return {
        item.name: ExternalDataInfo(item)
        for item in model.graph.initializer
        if item.data_location == TensorProto.EXTERNAL
    }


# Valid for onnx


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", ["tied", "untied", "yarn"])
def test_the_checker_passes_for_every_target(variant: str, target: str, made: Make) -> None:
    bundle = made(variant, **TARGETS[target])
    onnx.checker.check_model(bundle / "model.onnx", full_check=True)


@pytest.mark.parametrize("target", ["cpu-float32", "cuda-float32", "cuda-float16", "cuda-bfloat16"])
def test_strict_shape_inference_agrees_with_the_shapes_on_record(target: str, made: Make) -> None:
    model = load_graph(made(**TARGETS[target]))
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_shape_inference_alone_finds_the_outputs_of_the_standard_graph(made: Make) -> None:
    model = load_graph(made(**TARGETS["cuda-float32"]))
    recorded = {item.name: item.type for item in model.graph.value_info}
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    )
    found = {item.name: item.type for item in inferred.graph.value_info}
    assert set(found) == set(recorded)
    for name, kind in found.items():
        ours, theirs = recorded[name].tensor_type, kind.tensor_type
        assert ours.elem_type == theirs.elem_type, name
        assert len(ours.shape.dim) == len(theirs.shape.dim), name
        for mine, other in zip(ours.shape.dim, theirs.shape.dim, strict=True):
            if mine.dim_value and other.dim_value:
                assert mine.dim_value == other.dim_value, name


def test_the_standard_graph_uses_standard_operators_only(made: Make) -> None:
    model = load_graph(made(**TARGETS["cuda-float32"]))
    assert {node.domain for node in model.graph.node} == {""}


def test_every_node_has_a_name_of_its_own(made: Make) -> None:
    for target in TARGETS.values():
        names = [node.name for node in load_graph(made(**target)).graph.node]
        assert len(set(names)) == len(names)
        assert all(names)


# Names and shapes that others rely on (contract.md, section 3)


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_and_outputs_are_those_of_the_contract(target: str, made: Make) -> None:
    bundle = made("head-dim", **TARGETS[target])
    model = load_graph(bundle)
    dtype = TARGETS[target].get("dtype", "float32")
    element = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[str(dtype)]
    element = "INT8" if "kv_bits" in TARGETS[target] else element
    past = ("batch", 2, "past", 64)
    inputs = {
        "input_ids": ("INT64", ("batch", "sequence")),
        "attention_mask": ("INT64", ("batch", "total")),
        "position_ids": ("INT64", ("batch", "sequence")),
        "num_logits_to_keep": ("INT64", ()),
    }
    outputs = {"logits": ("FLOAT", ("batch", "sequence", 2048))}
    for layer in range(2):
        for part in ("key", "value"):
            inputs[f"past_key_values.{layer}.{part}"] = (element, past)
            outputs[f"present.{layer}.{part}"] = (element, ("batch", 2, "total", 64))
    assert described(model.graph.input) == inputs
    assert described(model.graph.output) == outputs


def described(values: Any) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    found = {}
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
        found[value.name] = (TensorProto.DataType.Name(kind.elem_type), shape)
    return found


@pytest.mark.parametrize("target", ["cpu-float32", "cpu-int4", "cuda-float32"])
def test_other_runtimes_do_not_see_the_optional_inputs(target: str, made: Make) -> None:
    bundle = made(**TARGETS[target])
    session = Session(bundle / "model.onnx").session
    assert {item.name for item in session.get_overridable_initializers()} == {"num_logits_to_keep"}
    assert "num_logits_to_keep" not in {item.name for item in session.get_inputs()}


@pytest.mark.parametrize("target", ["cpu-float32", "cpu-int4", "cuda-float32"])
def test_only_the_rows_that_are_asked_for_get_logits(target: str, made: Make) -> None:
    session = Session(made(**TARGETS[target]) / "model.onnx")
    ids = random_ids(2, 9)
    whole = session.run(ids).logits
    assert whole.shape == (2, 9, 2048)
    for kept in (1, 3, 9):
        some = session.run(ids, num_logits_to_keep=np.array(kept, np.int64))
        assert some.logits.shape == (2, kept, 2048)
        np.testing.assert_allclose(some.logits, whole[:, -kept:], atol=FLOAT32)
    zero = session.run(ids, num_logits_to_keep=np.array(0, np.int64))
    np.testing.assert_array_equal(zero.logits, whole)


# The data file


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_weights_lie_aligned_inside_the_file_and_apart(
    variant: str, target: str, made: Make
) -> None:
    bundle = made(variant, **TARGETS[target])
    ranges = defaultdict(list)
    for name, info in external(load_graph(bundle)).items():
        assert info.location == "model.onnx_data"
        assert info.offset % 4096 == 0
        ranges[(info.offset, info.length)].append(name)
    end = 0
    for offset, length in sorted(ranges):
        assert offset >= end
        end = offset + length
    assert end == (bundle / "model.onnx_data").stat().st_size
    shared = [sorted(names) for names in ranges.values() if len(names) > 1]
    table = "model.embed_tokens.weight"
    is_tied_table_quantized = variant == "tied" and "bits" in TARGETS[target]
    assert shared == ([[f"{table}_codes", f"{table}_table"]] if is_tied_table_quantized else [])


def test_a_tied_float_table_is_one_initializer_for_embedding_and_head(made: Make) -> None:
    model = load_graph(made(**TARGETS["cpu-float32"]))
    users = [node.op_type for node in model.graph.node if "model.embed_tokens.weight" in node.input]
    assert users == ["Gather", "FusedMatMul"]
    assert "lm_head.weight" not in external(model)


def test_the_graph_file_holds_no_weights(made: Make) -> None:
    for target in TARGETS.values():
        bundle = made(**target)
        assert (bundle / "model.onnx").stat().st_size < 40_000


# Equal to transformers


@pytest.mark.parametrize("target", ["cpu-float32", "cuda-float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, target: str, made: Make) -> None:
    bundle = made(variant, **TARGETS[target])
    model = load_judge(source_of(bundle))
    session = Session(bundle / "model.onnx")
    ids = random_ids(2, 24)
    for first in (0, 111, 480):  # with YaRN: within, across and far beyond the original 128
        positions = np.tile(np.arange(first, first + 24, dtype=np.int64), (2, 1))
        ours = session.run(ids, position_ids=positions).logits
        theirs = judge_logits(model, ids, first)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("target", ["cpu-float32", "cuda-float32"])
@pytest.mark.parametrize("variant", ["tied", "yarn"])
def test_going_on_from_a_cache_equals_transformers_whole_run(
    variant: str, target: str, made: Make
) -> None:
    bundle = made(variant, **TARGETS[target])
    # GroupQueryAttention takes several new tokens after a past for one row only.
    ids = random_ids(1, 20)
    theirs = judge_logits(load_judge(source_of(bundle)), ids)
    session = Session(bundle / "model.onnx")
    cache = None
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 20)):
        outcome = session.run(ids[:, start:stop], cache=cache)
        cache = outcome.cache
        np.testing.assert_allclose(outcome.logits, theirs[:, start:stop], atol=FLOAT32, rtol=0)
        assert all(value.shape[2] == stop for value in cache.values())


@pytest.mark.parametrize("target", ["cpu-float32", "cuda-float32"])
def test_single_tokens_of_a_batch_equal_transformers_whole_run(target: str, made: Make) -> None:
    bundle = made(**TARGETS[target])
    ids = random_ids(3, 8)
    theirs = judge_logits(load_judge(source_of(bundle)), ids)
    session = Session(bundle / "model.onnx")
    cache = session.run(ids[:, :5]).cache
    for at in range(5, 8):
        outcome = session.run(ids[:, at : at + 1], cache=cache)
        cache = outcome.cache
        np.testing.assert_allclose(outcome.logits, theirs[:, at : at + 1], atol=FLOAT32, rtol=0)


def test_padded_rows_go_on_from_their_own_length_in_the_standard_graph(made: Make) -> None:
    bundle = made(**TARGETS["cuda-float32"])
    model = load_judge(source_of(bundle))
    ids, lengths = random_ids(2, 7), (6, 3)
    mask = np.array([[1] * n + [0] * (6 - n) for n in lengths], np.int64)
    session = Session(bundle / "model.onnx")
    cache = session.run(ids[:, :6], attention_mask=mask).cache
    outcome = session.run(
        ids[:, 6:],
        cache=cache,
        attention_mask=np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1),
        position_ids=np.array([[n] for n in lengths], np.int64),
    )
    for row, length in enumerate(lengths):
        tokens = np.concatenate([ids[row : row + 1, :length], ids[row : row + 1, 6:]], axis=1)
        theirs = judge_logits(model, tokens)[:, -1:]
        np.testing.assert_allclose(outcome.logits[row : row + 1], theirs, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("target", ["cpu-float32", "cuda-float32"])
def test_rows_padded_on_the_right_equal_transformers_single_rows(target: str, made: Make) -> None:
    bundle = made(**TARGETS[target])
    model = load_judge(source_of(bundle))
    ids, lengths = random_ids(3, 12), (12, 5, 1)
    mask = np.array([[1] * n + [0] * (12 - n) for n in lengths], np.int64)
    padded = np.where(mask == 1, ids, 2013)
    outcome = Session(bundle / "model.onnx").run(padded, attention_mask=mask)
    for row, length in enumerate(lengths):
        theirs = judge_logits(model, ids[row : row + 1, :length])
        np.testing.assert_allclose(
            outcome.logits[row : row + 1, :length], theirs, atol=FLOAT32, rtol=0
        )


def test_the_float16_graph_is_close_to_transformers(made: Make) -> None:
    bundle = made(**TARGETS["cuda-float16"])
    ids = random_ids(1, 16)
    theirs = judge_logits(load_judge(source_of(bundle)), ids)
    session = Session(bundle / "model.onnx")
    first = session.run(ids[:, :10])
    second = session.run(ids[:, 10:], cache=first.cache)
    assert all(value.dtype == np.float16 for value in second.cache.values())
    ours = np.concatenate([first.logits, second.logits], axis=1)
    np.testing.assert_allclose(ours, theirs, atol=FLOAT16, rtol=0)


def test_a_position_beyond_the_table_is_refused_by_the_standard_graph(made: Make) -> None:
    session = Session(made(**TARGETS["cuda-float32"]) / "model.onnx")
    with pytest.raises(Exception, match=r"out of (data )?bounds"):
        session.run(random_ids(1, 1), position_ids=np.array([[512]], np.int64))


def test_a_smaller_context_is_a_smaller_table_and_the_same_logits(made: Make) -> None:
    small, whole = made(max_context=64), made()
    ids = random_ids(1, 64)
    np.testing.assert_array_equal(
        Session(small / "model.onnx").run(ids).logits, Session(whole / "model.onnx").run(ids).logits
    )


# Quantized: the stored bytes, dequantized and put into transformers' model


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
