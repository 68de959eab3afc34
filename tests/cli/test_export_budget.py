"""``export`` with a budget: what it says, what it writes, and what it refuses in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2x.exporters.bundle import open_bundle
from tests.cli.conftest import Call
from tests.exporters.refusal import listing
from tests.tiny_checkpoint import EXAMPLE

SAMPLE = EXAMPLE.parent / "sample.txt"
TEXT = ("--calibration", SAMPLE)
# KL divergence over plain rounding's: measured 0.3 at no more bytes.
GAIN = 0.6


def kl_of(call: Call, bundle: Path) -> float:
    done = call("validate", bundle, "--against", EXAMPLE, "--threads", 1, "--json")
    return float(done.json["kl_mean"])


def test_four_bits_are_measured_planned_and_fitted(
    call: Call, int4_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    files = ("model.onnx", "model.onnx_data")
    budget = sum((int4_bundle / name).stat().st_size for name in files)
    done = call("export", EXAMPLE, "--max-bytes", budget, "-o", out)
    assert done.code == 0
    lines = done.err.splitlines()
    assert lines[0] == "6 layers to be measured"
    assert lines[6].startswith("measured layer 6 of 6, 0.0 minutes left")
    assert lines[7] == "6 layers to be rounded"
    assert lines[13].startswith("rounded layer 6 of 6, 0.0 minutes left")
    assert sum((out / name).stat().st_size for name in files) <= budget
    assert kl_of(call, out) < GAIN * kl_of(call, int4_bundle)


def test_a_second_budget_and_another_target_need_not_measure_again(
    call: Call, tmp_path: Path
) -> None:
    call("export", EXAMPLE, *TEXT, "--bits-per-weight", 6, "-o", tmp_path / "one")
    done = call("export", EXAMPLE, *TEXT, "--bits-per-weight", 7, "--to", "mlx", "--json",
                "-o", tmp_path / "two")  # fmt: skip
    assert done.json["bits_per_weight"] <= 7
    for target in ("onnx", "mlx"):
        done = call("export", EXAMPLE, *TEXT, "--bits", 4, "--to", target, "-o", tmp_path / target)
        assert done.err.splitlines()[:2] == ["6 layers to be measured, 6 are already",
                                             "6 layers to be rounded"]  # fmt: skip
    plans = [open_bundle(tmp_path / target).manifest["bit_plan"] for target in ("onnx", "mlx")]
    assert plans[0] == plans[1]


def test_a_dry_run_tells_what_to_expect(call: Call) -> None:
    done = call("export", EXAMPLE, "--bits-per-weight", 6, "--dry-run", "--json")
    assert 5.5 < done.json["bits_per_weight"] <= 6
    assert done.json["scheme"].endswith("-mixed")


def test_people_see_which_part_has_which_bits(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    call("export", EXAMPLE, "--bits-per-weight", 6.5, "--method", "rtn", "-o", out)
    text = call("inspect", out).out
    for word in ("-mixed)", "qkv_proj", "gate_up_proj", "int8-g", "not validated yet"):
        assert word in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits-per-weight", 4], ["4.0 cannot be met", "needs --bits-per-weight 4."]),
        (["--max-bytes", 1000], ["1000 cannot be met", "needs --max-bytes "]),
        (["--max-bytes", -5], ["--max-bytes must be above 0, got -5"]),
        (["--bits-per-weight", "nan"], ["must be above 0, got nan"]),
        (["--bits-per-weight", 5, "--max-bytes", 10**6], ["two budgets"]),
        (["--bits", 8, "--max-bytes", 10**6], ["leave out --bits 8"]),
        (["--bits", 8, "--asymmetric"], ["--asymmetric is for"]),
        (["--asymmetric"], ["--asymmetric needs --bits"]),
        (["--max-bytes", 10**6, "--calibration", "nowhere.txt"], ["nowhere.txt", "read as UTF-8"]),
        (["--max-bytes", 10**6, "--device", "cuda", "--dtype", "float32"], ["no kernel"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    options: list[object], words: list[str], call: Call, tmp_path: Path
) -> None:
    done = call("export", EXAMPLE, *options, "-o", tmp_path / "bundle")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1, done.err
    for word in words:
        assert word in done.err
    assert listing(tmp_path) == [] or "bundle" not in str(listing(tmp_path))
