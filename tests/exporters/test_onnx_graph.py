"""The graph: valid for onnx, and in plain ONNX Runtime equal to transformers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.exporters.graphs import TARGETS, VARIANTS, Make, external, load_graph, source_of
from tests.exporters.judge import Session, judge_logits, load_judge, random_ids

# Logits are about 1 in size. Float32 sums in another order: 4e-6 seen, 1e-4 allowed.
FLOAT32 = 1e-4
# Matrices, activations and cache in float16 (11 bits); 2e-3 seen with two layers.
FLOAT16 = 1e-2


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
