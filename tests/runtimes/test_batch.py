"""The judge of a batch is the same runtime with one sequence, which other tests compare."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwen2x.quantize.errors import BackendError, RequestError
from qwen2x.runtimes.batch import Batch, Slot, open_batch
from qwen2x.runtimes.runtime import Logits, Runtime, open_runtime
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import EXAMPLE

PROMPTS = [list(range(100, 140)), [5, 6, 7], list(range(300, 600)), [9]]
# float32 sums in another order; with int8 activations that moves a code now and then.
TOLERANCE = {"float": 2e-4, "int4": 0.1, "int8-cache": 5e-3, "int8-prompts": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "float": {},
    "int4": {"bits": 4, "method": "rtn"},
    "int8-cache": {"kv_bits": 8},
    "int8-prompts": {"bits": 8, "prefill_int8": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runtime(kind: str, make_bundle: MakeBundle) -> Iterator[Runtime]:
    with open_runtime(
        make_bundle(EXAMPLE, **VARIANTS[kind]), threads=1, prefill_chunk=64
    ) as opened:
        yield opened


def greedy(runtime: Runtime, prompt: list[int], count: int) -> tuple[list[int], Logits]:
    """Tokens that one sequence chooses, and their rows of logits."""
    runtime.reset()
    rows = [runtime.prefill(prompt).copy()]
    while len(rows) < count:
        rows.append(runtime.decode(int(rows[-1].argmax())).copy())
    return [int(row.argmax()) for row in rows], np.stack(rows)


def test_sequences_that_decode_together_see_what_each_sees_alone(
    runtime: Runtime, kind: str
) -> None:
    alone = [greedy(runtime, prompt, 12) for prompt in PROMPTS]
    batch = open_batch(runtime, len(PROMPTS))
    slots = [batch.open_slot() for _ in PROMPTS]
    found = [[slot.prefill(prompt)] for slot, prompt in zip(slots, PROMPTS, strict=True)]
    for step in range(11):
        # The tokens of the single runs, so that a near tie does not lead elsewhere.
        rows = batch.decode([(slot, alone[i][0][step]) for i, slot in enumerate(slots)])
        for row, rows_of_slot in zip(rows, found, strict=True):
            rows_of_slot.append(row)
    for slot, prompt, rows_of_slot, (tokens, expected) in zip(
        slots, PROMPTS, found, alone, strict=True
    ):
        assert np.abs(np.stack(rows_of_slot) - expected).max() <= TOLERANCE[kind]
        assert slot.cached_ids == [*prompt, *tokens[:-1]]
    batch.close()


def has_alike_rows(bits: int, group_size: int) -> bool:
    """Whether MatMulNBits gives every row of several the numbers that it gives it alone."""
    columns, random = 256, np.random.default_rng(0)
    groups = columns // group_size
    codes = random.integers(0, 256, (96, groups, group_size * bits // 8), np.uint8)
    weights = {"codes": codes, "scales": random.random((96, groups), np.float32)}
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft",
        K=columns, N=96, bits=bits, block_size=group_size, accuracy_level=4,
    )  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "rows", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = random.standard_normal((7, columns), np.float32)
    alone = [session.run(None, {"x": row[None]})[0][0] for row in rows]
    return np.array_equal(session.run(None, {"x": rows})[0], alone)


@pytest.mark.parametrize(
    "options", [{"bits": 4, "method": "rtn"}, {"bits": 8}, {"bits": 8, "prefill_int8": True}]
)
def test_in_groups_of_32_rows_are_bit_for_bit_those_of_each_alone(
    options: dict[str, Any], make_bundle: MakeBundle
) -> None:
    if not all(has_alike_rows(bits, size) for bits, size in ((4, 32), (8, 32), (8, 64))):
        pytest.skip("this processor's products of several rows are rounded otherwise")
    if sys.platform != "linux":
        pytest.skip("guesses are rows of their own on Linux alone")
    prompts, following = [list(range(40 + size)) for size in (3, 250, 90)], list(range(100, 110))
    with open_runtime(make_bundle(EXAMPLE, **options), threads=1) as runtime:
        alone = []
        for prompt in prompts:
            runtime.reset()
            rows = [runtime.prefill(prompt).copy()]
            alone.append([*rows, *(runtime.decode(token).copy() for token in following)])
        runtime.truncate(len(prompts[-1]))
        np.testing.assert_array_equal(runtime.decode_guessed(following), alone[-1][1:])
        batch = open_batch(runtime, len(prompts))
        slots = [batch.open_slot() for _ in prompts]
        found = [[slot.prefill(ids)] for slot, ids in zip(slots, prompts, strict=True)]
        for token in following:
            rows = batch.decode([(slot, token) for slot in slots])
            for row, of_slot in zip(rows, found, strict=True):
                of_slot.append(row)
    for expected, rows in zip(alone, found, strict=True):
        np.testing.assert_array_equal(rows, expected)


def test_a_batch_leaves_the_runtimes_own_cache_alone(runtime: Runtime) -> None:
    tokens, expected = greedy(runtime, PROMPTS[0], 4)
    batch = open_batch(runtime, 2)
    slot = batch.open_slot()
    slot.prefill(PROMPTS[2])
    batch.decode([(slot, 3)])
    row = runtime.decode(tokens[-1])
    again = greedy(runtime, PROMPTS[0], 5)[1]
    np.testing.assert_array_equal(row, again[-1])
    np.testing.assert_array_equal(expected, again[:-1])


def test_a_prompt_that_was_left_goes_on_in_its_own_cache(make_bundle: MakeBundle) -> None:
    """A slot that reads a prompt meanwhile must not be taken for the runtime's own cache."""
    bundle = make_bundle(EXAMPLE, bits=8, prefill_int8=True)
    prompt = list(range(300))

    def stop_after_the_first_piece(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with open_runtime(bundle, threads=1, prefill_chunk=64) as runtime:
        expected = runtime.prefill(prompt).copy()
        runtime.reset()
        runtime.on_prefill = stop_after_the_first_piece
        with pytest.raises(KeyboardInterrupt):
            runtime.prefill(prompt)
        runtime.on_prefill = None
        batch = open_batch(runtime, 1)
        batch.open_slot().prefill(PROMPTS[0])
        row = runtime.append(prompt[runtime.cache_length :])[-1]
        np.testing.assert_array_equal(row, expected)


def test_sequences_join_and_leave_while_others_go_on(runtime: Runtime, kind: str) -> None:
    tokens, expected = greedy(runtime, PROMPTS[2], 10)
    batch = open_batch(runtime, 3)
    first, second = batch.open_slot(), batch.open_slot()
    first.prefill(PROMPTS[0])
    second.prefill(PROMPTS[1])
    kept = batch.open_slot()
    rows = [kept.prefill(PROMPTS[2])]
    others: list[Slot] = [first, second]
    for step, token in enumerate(tokens[:-1]):
        # The first leaves, and the last row moves into its place; then a new one comes.
        if step == 3:
            others.pop(0).close()
        if step == 6:
            others.append(batch.open_slot())
            others[-1].prefill(PROMPTS[3])
        asked = [(slot, 7) for slot in others] + [(kept, token)]
        rows.append(batch.decode(asked)[-1])
    assert np.abs(np.stack(rows) - expected).max() <= TOLERANCE[kind]


def test_some_of_the_sequences_may_wait(runtime: Runtime, kind: str) -> None:
    tokens, expected = greedy(runtime, PROMPTS[0], 3)
    batch = open_batch(runtime, 3)
    slots = [batch.open_slot() for _ in range(3)]
    for slot in slots:
        slot.prefill(PROMPTS[0])
    # Rows 0 and 2 do not lie side by side.
    batch.decode([(slots[2], tokens[0]), (slots[0], tokens[0])])
    row = batch.decode([(slots[1], tokens[0])])[0]
    assert np.abs(row - expected[1]).max() <= TOLERANCE[kind]
    rows = batch.decode([(slot, tokens[1]) for slot in slots[::2]])
    assert np.abs(rows - expected[2]).max() <= TOLERANCE[kind]
    assert [slot.cache_length for slot in slots] == [42, 41, 42]


def test_a_slot_can_be_cut_back(runtime: Runtime, kind: str) -> None:
    expected = greedy(runtime, PROMPTS[0], 1)[1][0]
    batch = open_batch(runtime, 2)
    batch.open_slot().prefill(PROMPTS[1])
    slot = batch.open_slot()
    slot.prefill([*PROMPTS[0], 3, 4, 5])
    slot.truncate(39)
    row = batch.decode([(slot, PROMPTS[0][-1])])[0]
    assert np.abs(row - expected).max() <= TOLERANCE[kind]


@pytest.fixture
def batch(example_runtime: Runtime) -> Batch:
    return open_batch(example_runtime, 2)


def test_what_a_batch_cannot_do_is_refused(batch: Batch, example_runtime: Runtime) -> None:
    slots = [batch.open_slot(), batch.open_slot()]
    with pytest.raises(RequestError, match="all 2 slots are taken; close one"):
        batch.open_slot()
    slots[0].prefill([1])
    for tokens in ([], [(slots[0], 1), (slots[0], 2)]):
        with pytest.raises(RequestError, match="one token of each of several slots"):
            batch.decode(tokens)
    with pytest.raises(RequestError, match=r"must be in 0\.\.2047, got 2048"):
        batch.decode([(slots[0], 2048)])
    with pytest.raises(RequestError, match="needs 1 slot or more, got 0"):
        open_batch(example_runtime, 0)


def test_a_full_context_is_refused(make_bundle: MakeBundle, random_checkpoint: Any) -> None:
    with open_runtime(make_bundle(random_checkpoint, max_context=40), threads=1) as short:
        slot = open_batch(short, 1).open_slot()
        slot.prefill(list(range(40)))
        with pytest.raises(RequestError, match="41 positions are needed, the context has 40"):
            open_batch(short, 1).decode([(slot, 1)])


def test_other_runtimes_say_what_to_do(example_torch: Runtime) -> None:
    with pytest.raises(BackendError, match="batches run on onnx and cpu, this is torch on"):
        open_batch(example_torch, 2)
