"""The judge of guesses that are run together is decode, token by token, in every bit.

MatMulNBits with groups of 32 gives a row the same bits whatever the number of rows; a float product
does not everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.onnx_mirror import can_mirror
from qwen2x.runtimes.onnx_runtime import OnnxRuntime
from qwen2x.runtimes.runtime import Runtime, open_runtime
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import EXAMPLE

IDS = [int(token) for token in np.random.default_rng(0).integers(0, 2000, 700)]
VARIANTS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int8, cache in 8 bits": {"bits": 8, "kv_bits": 8},
}


@pytest.fixture(scope="module", params=VARIANTS)
def runtime(request: pytest.FixtureRequest, make_bundle: MakeBundle) -> Iterator[Runtime]:
    bundle = make_bundle(EXAMPLE, **VARIANTS[request.param])
    # Two threads: rows that were attended before others are appended would differ.
    with open_runtime(bundle, threads=2) as opened:
        yield opened


@pytest.mark.parametrize("past", [1, 250, 600])
def test_rows_are_those_of_single_tokens(runtime: Runtime, past: int) -> None:
    def fresh() -> None:
        runtime.reset()
        runtime.prefill(IDS[:past])

    fresh()
    following = IDS[past : past + 40]
    expected = np.stack([runtime.decode(token).copy() for token in following])
    fresh()
    rows = []
    for count in (1, 2, 16, 3, 1, 8, 9):
        done = len(rows)
        rows.extend(runtime.decode_guessed(following[done : done + count]))
    np.testing.assert_array_equal(np.stack(rows), expected)
    assert runtime.cached_ids == IDS[: past + 40]
    assert isinstance(runtime, OnnxRuntime)
    assert type(runtime._cache).__name__ == "MirroredCache"


def test_rejected_guesses_leave_no_trace(runtime: Runtime) -> None:
    runtime.reset()
    runtime.prefill(IDS[:100])
    expected = [runtime.decode(token).copy() for token in IDS[100:104]]
    runtime.truncate(100)
    runtime.decode_guessed([IDS[100], 7, 8, 9])
    runtime.truncate(101)
    rows = runtime.decode_guessed(IDS[101:104])
    np.testing.assert_array_equal(rows, np.stack(expected[1:]))


def test_what_does_not_fit_is_refused(make_bundle: MakeBundle, random_checkpoint: Path) -> None:
    with open_runtime(make_bundle(random_checkpoint, max_context=64), threads=1) as short:
        short.prefill(IDS[:60])
        with pytest.raises(RequestError, match="65 positions are needed, the context has 64"):
            short.decode_guessed(IDS[60:65])
        assert len(short.decode_guessed(IDS[60:64])) == 4
        short.truncate(0)
        assert len(short.decode_guessed(IDS[:3])) == 3


def test_where_pages_cannot_be_shared_guesses_are_appended(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: dict[str, Any] = {
        "num_key_value_heads": 2, "head_dim": 64, "dtype": "float32", "layout": "shared"
    }  # fmt: skip
    assert can_mirror(facts, "cpu", 4096)
    assert not can_mirror(facts, "cuda", 4096)
    assert not can_mirror(facts | {"layout": "concatenated"}, "cpu", 4096)
    assert not can_mirror(facts | {"dtype": "float16"}, "cpu", 4096)
    assert not can_mirror(facts, "cpu", 41)
    monkeypatch.setenv("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
    assert not can_mirror(facts, "cpu", 4096)
    with open_runtime(make_bundle(), threads=1) as plain:
        plain.prefill(IDS[:50])
        rows = plain.decode_guessed(IDS[50:54])
        plain.truncate(50)
        np.testing.assert_array_equal(rows, plain.append(IDS[50:54], keep=4))
