"""Several YaRN factors in one graph: each equal to transformers, the first equal to none at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen2x.exporters.exporter import export
from tests.exporters.judge import Float, Session, load_judge, random_ids
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

# Sums in another order; 4e-6 seen over logits of size 4.
FLOAT32 = 2e-5
# Keys and values in 8 bits, and queries against them; 0.21 seen. Over 25 random places and texts
# the largest is 0.28 with factor 1, 0.36 with 2, 0.20 with 4, their medians 0.06, 0.09 and 0.08.
INT8_CACHE = 0.3
TARGETS: dict[str, dict[str, Any]] = {
    "fused": {},
    "standard": {"device": "cuda", "dtype": "float32"},
    "int8 cache": {"kv_bits": 8, "calibration": str(EXAMPLE.parent / "sample.txt")},
}
LIMITS = {"fused": FLOAT32, "standard": FLOAT32, "int8 cache": INT8_CACHE}
FACTORS = (1.0, 2.0, 4.0)
NATIVE = 32768
ENDS = (0, NATIVE - 1, NATIVE, 2 * NATIVE - 1, 4 * NATIVE - 1)
HALF = 12
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("yarn") / "source",
        dtype="float32", max_position_embeddings=NATIVE, rope_theta=1e6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("graphs")

    def make(target: str, **options: Any) -> Path:
        out = root / f"{target} {options}".replace("/", "")
        if not out.exists():
            export(source, out=out, **TARGETS[target], **options)
        return out

    return make


@pytest.fixture(scope="module")
def judge(source: Path) -> Qwen2ForCausalLM:
    return load_judge(source)


@cache
def opened(bundle: Path) -> Session:
    return Session(bundle / "model.onnx")


def judged(
    model: Qwen2ForCausalLM, ids: NDArray[np.int64], places: NDArray[np.int64], factor: float
) -> Float:
    """Transformers' logits with the snippet of the model's card in its config."""
    config = type(model.config)(**model.config.to_dict())
    if factor != 1:
        config.rope_parameters = {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": factor,
            "original_max_position_embeddings": NATIVE,
        }  # fmt: skip
    model.model.rotary_emb = Qwen2RotaryEmbedding(config)
    # With a mask, or transformers takes the jump for the start of another text.
    mask = torch.ones(ids.shape, dtype=torch.long)
    with torch.inference_mode():
        return model(
            input_ids=torch.from_numpy(ids), position_ids=torch.from_numpy(places),
            attention_mask=mask, use_cache=False,
        ).logits.numpy()  # fmt: skip


def around(end: int, factor: float) -> NDArray[np.int64]:
    """Positions of half the tokens at the beginning, of the others around a far one."""
    start = max(HALF, min(end - HALF // 2, int(factor) * NATIVE - HALF))
    return np.array([[*range(HALF), *range(start, start + HALF)]], np.int64)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("target", TARGETS)
def test_logits_at_the_ends_of_contexts_are_those_of_transformers(
    target: str, factor: float, end: int, made: Make, judge: Qwen2ForCausalLM
) -> None:
    if end >= factor * NATIVE:
        pytest.skip("beyond this factor")
    session, ids = opened(made(target)), random_ids(1, 2 * HALF)
    places = around(end, factor)
    index = np.array([FACTORS.index(factor)])
    # A jump begins a call: a first one's positions are taken as consecutive.
    near = session.run(ids[:, :HALF], rope_index=index)
    far = session.run(
        ids[:, HALF:], cache=near.cache, position_ids=places[:, HALF:], rope_index=index
    )
    ours = np.concatenate([near.logits, far.logits], axis=1)
    theirs = judged(judge, ids, places, factor)
    assert np.abs(ours - theirs).max() <= LIMITS[target]


@pytest.mark.parametrize("target", TARGETS)
def test_without_a_choice_everything_is_bit_for_bit_as_without_yarn(
    target: str, made: Make
) -> None:
    several = opened(made(target))
    plain = opened(made(target, yarn=(1.0,)))
    ids = random_ids(1, 40)
    ours, theirs = several.run(ids), plain.run(ids)
    for _ in range(3):  # the prompt, and two tokens behind it
        np.testing.assert_array_equal(ours.logits, theirs.logits)
        assert all((ours.cache[name] == theirs.cache[name]).all() for name in ours.cache)
        ours = several.run(ids[:, :1], cache=ours.cache)
        theirs = plain.run(ids[:, :1], cache=theirs.cache)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_a_batch_decode_with_factors_of_their_own(target: str, made: Make) -> None:
    """Prompts are read one by one: of a first call, the CPU kernel reads one row's positions."""
    session, ids, index = opened(made(target)), random_ids(3, 20), np.arange(3)
    alone = [session.run(ids[[row]], rope_index=index[[row]]) for row in range(3)]
    together = {name: np.concatenate([one.cache[name] for one in alone]) for name in alone[0].cache}
    batch = session.run(ids[:, :1], cache=together, rope_index=index)
    for row, one in enumerate(alone):
        single = session.run(ids[[row], :1], cache=one.cache, rope_index=index[[row]])
        np.testing.assert_allclose(batch.logits[[row]], single.logits, atol=FLOAT32)


@pytest.mark.parametrize("factor", FACTORS)
def test_chunks_with_one_factor_are_the_whole(factor: float, made: Make) -> None:
    session, ids = opened(made("fused")), random_ids(1, 30)
    index = np.array([FACTORS.index(factor)])
    whole = session.run(ids, rope_index=index).logits
    past, parts = None, []
    for start in range(0, 30, 7):
        done = session.run(ids[:, start : start + 7], cache=past, rope_index=index)
        past = done.cache
        parts.append(done.logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=FLOAT32)


def test_one_factor_has_no_choice_and_no_node_for_it(made: Make) -> None:
    single, several = (
        onnx.load(made("fused", **options) / "model.onnx", load_external_data=False).graph
        for options in ({"yarn": (4.0,)}, {})
    )
    assert "rope_index" not in {item.name for item in single.input}
    names = {node.name for node in several.node} - {node.name for node in single.node}
    assert {name.split("/")[1] for name in names} == {"rope"}
    assert not [node for node in single.node if node.name.startswith("/rope/positions")]


def test_running_past_the_plain_table_is_an_error_and_not_another_factors_row(made: Make) -> None:
    session = opened(made("fused"))
    last = np.array([[NATIVE - 1]], np.int64)
    session.run(random_ids(1, 1), position_ids=last)
    with pytest.raises(Exception, match="position"):
        session.run(random_ids(1, 1), position_ids=last + 1)


def test_tables_reach_as_far_as_the_context_that_was_asked_for(made: Make) -> None:
    for options, rows in (
        ({}, 7 * NATIVE),
        ({"max_context": 40_000}, NATIVE + 40_000),
        ({"max_context": 20_000}, 20_000),
        ({"max_context": 20_000, "yarn": (1.0, 2.0)}, 40_000),
    ):
        model = onnx.load(made("fused", **options) / "model.onnx", load_external_data=False)
        [attention] = [
            node for node in model.graph.node
            if node.name == "/model/layers.0/self_attn/GroupQueryAttention"
        ]  # fmt: skip
        shapes = {
            item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim]
            for item in model.graph.value_info
        }
        assert shapes[attention.input[7]] == shapes[attention.input[8]] == [rows, 16]
        assert (made("fused", **options) / "model.onnx").stat().st_size < 40_000


def test_a_kernel_that_does_not_read_positions_does_not_rotate(
    source: Path, tmp_path: Path
) -> None:
    export(source, out=tmp_path / "cuda", device="cuda", dtype="float16", yarn=FACTORS)
    onnx.checker.check_model(tmp_path / "cuda" / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "cuda" / "model.onnx", load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    rotations = [
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if node.op_type == "GroupQueryAttention" and attribute.name == "do_rotary"
    ]
    assert rotations == [0, 0]


@pytest.mark.parametrize("target", TARGETS)
def test_the_checker_passes_with_a_choice(target: str, made: Make) -> None:
    onnx.checker.check_model(made(target) / "model.onnx", full_check=True)
