"""``validate`` passes what is right and fails what is wrong, by the check that is there for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qwen2x.exporters.onnx_decode import ATTEND_BY_PRODUCTS
from qwen2x.runtimes import onnx_runtime
from qwen2x.runtimes.generate import read_text_files
from qwen2x.runtimes.runtime import Logits, Runtime, TokenIds, open_runtime
from qwen2x.runtimes.tolerance import tolerance_for
from qwen2x.runtimes.validate import Check, Report, validate
from tests.runtimes.conftest import MakeBundle
from tests.runtimes.test_onnx_runtime import copy_bundle, rewrite_manifest
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

TEXT = (EXAMPLE.parent / "sample.txt").read_text(encoding="utf-8")
TOKEN_IDS = read_text_files(EXAMPLE).tokenizer.encode(TEXT)
FLOAT32 = tolerance_for("float", "float32")
NAMES = [
    "all_finite", "kl_mean", "top1_agreement", "max_abs_diff", "cache_equals_prefill",
    "products_equal_prefill", "chunked_equals_whole", "guesses_equal_prefill",
    "batch_equals_single", "long_positions", "greedy_text_equal",
]  # fmt: skip


def run(candidate: Runtime, reference: Runtime, tolerance: Any = FLOAT32) -> Report:
    return validate(candidate, reference, TOKEN_IDS, tolerance=tolerance, tokens=256, window=128)


def failed(report: Report) -> set[str]:
    assert report.verdict == ("fail" if any(c.verdict == "fail" for c in report.checks) else "pass")
    return {check.name for check in report.checks if check.verdict == "fail"}


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_bundles_of_the_small_checkpoint_pass(
    make_bundle: MakeBundle, example_torch: Runtime, bits: int | None
) -> None:
    scheme = f"int{bits}-g32" if bits else "float"
    with open_runtime(make_bundle(bits=bits, method="rtn"), threads=1) as candidate:
        report = run(candidate, example_torch, tolerance_for(scheme, candidate.dtype))
    assert failed(report) == set()
    assert [check.name for check in report.checks] == [
        name for name in NAMES if bits is None or name != "max_abs_diff"
    ]
    assert report.difference.positions == 256


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bundles_for_cuda_pass_on_the_cpu(
    make_bundle: MakeBundle, example_torch: Runtime, dtype: str
) -> None:
    bundle = make_bundle(device="cuda", dtype=dtype)
    with open_runtime(bundle, device="cpu", threads=1) as candidate:
        assert failed(run(candidate, example_torch, tolerance_for("float", dtype))) == set()


def test_a_short_context_and_a_short_text_pass(
    make_bundle: MakeBundle, example_torch: Runtime
) -> None:
    with open_runtime(make_bundle(max_context=20), threads=1) as candidate:
        assert failed(run(candidate, example_torch)) == set()
    with open_runtime(make_bundle(), threads=1) as candidate:
        report = validate(candidate, example_torch, TOKEN_IDS[:2], tolerance=FLOAT32)
        assert failed(report) == set()
        assert report.difference.positions == 2


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_bundle_of_another_checkpoint_fails(
    tmp_path: Path, make_bundle: MakeBundle, random_torch: Runtime, bits: int | None
) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", dtype="float32", seed=1)
    tolerance = tolerance_for(f"int{bits}-g32" if bits else "float", "float32")
    with open_runtime(make_bundle(other, bits=bits, method="rtn"), threads=1) as candidate:
        names = failed(run(candidate, random_torch, tolerance))
    assert {"kl_mean", "top1_agreement", "long_positions"} <= names
    assert not names & {"cache_equals_prefill", "chunked_equals_whole", "batch_equals_single"}


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_flipped_bytes_of_the_weights_fail(
    tmp_path: Path,
    make_bundle: MakeBundle,
    random_checkpoint: Path,
    random_torch: Runtime,
    bits: int | None,
) -> None:
    folder = copy_bundle(make_bundle(random_checkpoint, bits=bits, method="rtn"), tmp_path)
    data = bytearray((folder / "model.onnx_data").read_bytes())
    # The highest bit of a stretch in the middle: signs of floats, or codes by half their range.
    start = len(data) // 2
    for place in range(start + 3, start + (1 << 15), 4):
        data[place] ^= 0x80
    (folder / "model.onnx_data").write_bytes(data)
    rewrite_manifest(folder)
    tolerance = tolerance_for(f"int{bits}-g32" if bits else "float", "float32")
    with open_runtime(folder, threads=1) as candidate:
        names = failed(run(candidate, random_torch, tolerance))
    assert "kl_mean" in names
    assert not names & {"all_finite", "cache_equals_prefill", "chunked_equals_whole"}


def test_a_wrong_rope_theta_fails(
    tmp_path: Path, make_bundle: MakeBundle, random_torch: Runtime
) -> None:
    other = write_tiny_checkpoint(tmp_path / "theta", dtype="float32", rope_theta=11000.0)
    with open_runtime(make_bundle(other), threads=1) as candidate:
        names = failed(run(candidate, random_torch))
    assert {"kl_mean", "max_abs_diff", "long_positions"} <= names
    assert not names & {"cache_equals_prefill", "chunked_equals_whole", "batch_equals_single"}


@pytest.fixture
def candidate(make_bundle: MakeBundle, random_checkpoint: Path) -> Any:
    with open_runtime(make_bundle(random_checkpoint), threads=1) as runtime:
        yield runtime


def test_the_random_checkpoint_itself_passes(candidate: Runtime, random_torch: Runtime) -> None:
    assert failed(run(candidate, random_torch)) == set()


def shift_positions(monkeypatch: pytest.MonkeyPatch, shift: Any) -> None:
    """Changes the positions that the graph is given."""
    inputs = onnx_runtime.graph_inputs

    def shifted(token_ids: TokenIds, mask: Any, positions: TokenIds, keep: int) -> Any:
        return inputs(token_ids, mask, shift(np.array(positions)), keep)

    monkeypatch.setattr(onnx_runtime, "graph_inputs", shifted)


def test_a_cache_that_is_off_by_one_position_fails_its_check(
    candidate: Runtime, random_torch: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_positions(monkeypatch, lambda p: p + 1 if p.shape[1] == 1 and p[0, 0] > 0 else p)
    names = failed(run(candidate, random_torch))
    # On Linux guesses are single tokens too.
    names -= {"greedy_text_equal", "guesses_equal_prefill"}
    assert names == {"cache_equals_prefill", "products_equal_prefill"}


def test_products_that_see_too_little_fail_their_check(
    candidate: Runtime, random_torch: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mask that is one short does: the last key is missing."""
    run_rows = candidate._run_bound  # type: ignore[attr-defined]

    def short(binding: Any, inputs: dict[str, Any], *rest: Any) -> None:
        chosen = inputs.get(ATTEND_BY_PRODUCTS)
        if chosen is not None and chosen.numpy():
            mask = inputs["attention_mask"].numpy().copy()
            mask[:, -1] = 0
            inputs = {**inputs, "attention_mask": ort.OrtValue.ortvalue_from_numpy(mask)}
        run_rows(binding, inputs, *rest)

    monkeypatch.setattr(candidate, "_run_bound", short)
    assert failed(run(candidate, random_torch)) == {"products_equal_prefill"}


def test_chunks_that_restart_their_positions_fail_their_check(
    candidate: Runtime, random_torch: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows whose first position is far away are no chunks: long_positions must still pass.
    shift_positions(
        monkeypatch, lambda p: p - p[0, 0] if p.shape[1] > 1 and 0 < p[0, 0] < 48 else p
    )
    assert failed(run(candidate, random_torch)) == {"chunked_equals_whole"}


class Wrapped:
    """A runtime of which a test changes one method."""

    def __init__(self, inner: Runtime) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class WrongRows(Wrapped):
    """Gives every row of a batch the length of another."""

    def logits(
        self,
        token_ids: TokenIds,
        *,
        lengths: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> Logits:
        turned = None if lengths is None else list(lengths)[::-1]
        return self._inner.logits(token_ids, lengths=turned, positions=positions)


class NoFarPositions(Wrapped):
    """Counts from zero whatever it is told."""

    def logits(
        self,
        token_ids: TokenIds,
        *,
        lengths: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> Logits:
        return self._inner.logits(token_ids, lengths=lengths)


class NoTruncation(Wrapped):
    """Forgets that it was truncated."""

    def truncate(self, length: int) -> None:
        if length == 0:
            self._inner.truncate(0)


class OtherGuesses(Wrapped):
    """Gives the rows of guessed tokens in another order."""

    def decode_guessed(self, token_ids: Sequence[int]) -> Logits:
        return self._inner.decode_guessed(token_ids)[::-1]


class RoundedGuesses(Wrapped):
    """Sums the rows of guessed tokens in another order."""

    def decode_guessed(self, token_ids: Sequence[int]) -> Logits:
        return self._inner.decode_guessed(token_ids) * np.float32(1 + 1e-6)


class NotFinite(Wrapped):
    """One logit of one row is no number."""

    def logits(self, token_ids: TokenIds, **options: Any) -> Logits:
        rows = self._inner.logits(token_ids, **options)
        if token_ids.shape[1] == 128:
            rows[0, 5, 7] = np.nan
        return rows


class OtherAnswer(Wrapped):
    """Decodes well but answers with the second likeliest token."""

    def prefill(self, token_ids: Sequence[int]) -> Logits:
        row = self._inner.prefill(token_ids)
        row[row.argmax()] = -1e9
        return row


@pytest.mark.parametrize(
    ("wrapper", "expected"),
    [
        (WrongRows, {"batch_equals_single"}),
        (NoFarPositions, {"long_positions"}),
        (NoTruncation, {"cache_equals_prefill", "products_equal_prefill"}),
        (NotFinite, {"all_finite", "kl_mean", "max_abs_diff", "top1_agreement"}),
        (OtherGuesses, {"guesses_equal_prefill"}),
        (OtherAnswer, {"greedy_text_equal"}),
    ],
)
def test_each_fault_fails_exactly_its_check(
    candidate: Runtime, random_torch: Runtime, wrapper: Any, expected: set[str]
) -> None:
    report = run(wrapper(candidate), random_torch)
    assert failed(report) == expected
    # Strict JSON has no NaN.
    printed = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert printed["verdict"] == "fail"
    assert {c["name"] for c in printed["checks"] if c["verdict"] == "fail"} == expected


def test_the_report_is_what_the_contract_says(candidate: Runtime, random_torch: Runtime) -> None:
    steps: list[str] = []
    report = validate(
        candidate, random_torch, TOKEN_IDS, tolerance=FLOAT32, tokens=64, on_step=steps.append
    )
    printed = report.to_json()
    assert printed.keys() >= {
        "verdict", "positions", "max_abs_diff", "mean_abs_diff", "cosine", "kl_mean", "kl_p99",
        "kl_max", "top1_agreement", "top10_overlap", "perplexity", "perplexity_reference",
        "all_finite", "checks", "backend", "device", "dtype", "bits_per_weight", "tolerance",
    }  # fmt: skip
    assert "kl" not in printed
    assert steps == ["logits", *NAMES[4:]]
    assert candidate.cache_length == 0
    assert printed["tolerance"]["kl_mean"] == FLOAT32.kl_mean


@pytest.mark.parametrize(
    ("value", "limit", "is_floor", "verdict"),
    [
        (1.0, 1.0, False, "pass"),
        (1.1, 1.0, False, "fail"),
        (1.0, 1.0, True, "pass"),
        (0.9, 1.0, True, "fail"),
        (float("nan"), 1.0, False, "fail"),
        (float("nan"), 1.0, True, "fail"),
        (float("inf"), 1.0, False, "fail"),
    ],
)
def test_a_figure_is_held_against_its_limit(
    value: float, limit: float, is_floor: bool, verdict: str
) -> None:
    assert Check(name="x", value=value, limit=limit, is_floor=is_floor).verdict == verdict


def test_tolerances_loosen_with_the_scheme() -> None:
    int8, int4 = tolerance_for("int8-g64", "float32"), tolerance_for("int4-g32", "bfloat16")
    half = tolerance_for("float", "bfloat16")
    assert FLOAT32.kl_mean < int8.kl_mean < int4.kl_mean
    assert FLOAT32.kl_mean < half.kl_mean
    assert FLOAT32.self_kl < int8.self_kl < int4.self_kl
    assert replace(FLOAT32) == FLOAT32


@pytest.mark.real
def test_the_real_checkpoint_in_four_bits_passes(
    make_bundle: MakeBundle, real_checkpoint: Path
) -> None:
    token_ids = read_text_files(real_checkpoint).tokenizer.encode(TEXT)
    with (
        open_runtime(make_bundle(real_checkpoint, bits=4, method="rtn")) as candidate,
        open_runtime(real_checkpoint, backend="torch") as reference,
    ):
        report = validate(
            candidate,
            reference,
            token_ids,
            tolerance=tolerance_for("int4-g32", "float32"),
            tokens=96,
        )
    assert failed(report) == set()


def test_whether_guesses_leave_every_bit_is_said(candidate: Runtime, random_torch: Runtime) -> None:
    report = run(RoundedGuesses(candidate), random_torch)
    assert failed(report) == set()
    assert report.to_json()["guesses_are_exact"] is False
    stepwise = Wrapped(candidate)
    stepwise.decode_guessed = lambda ids: np.stack([candidate.decode(t).copy() for t in ids])
    assert run(stepwise, random_torch).to_json()["guesses_are_exact"] is True
