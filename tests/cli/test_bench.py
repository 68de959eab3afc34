from __future__ import annotations

import re
from pathlib import Path

from qwen2x.cli.machine import peak_memory_bytes, physical_cores
from tests.cli.conftest import Call

SHORT = ("--prompt-tokens", "64", "--new-tokens", "8", "--repeat", "2")
RUNS = ("run 1 of 2", "run 2 of 2")


def test_bench_prints_the_contracts_object(call: Call, int4_bundle: Path) -> None:
    done = call("bench", int4_bundle, *SHORT, "--threads", "1", "--json")
    result = done.json
    asked = {"prompt_tokens": 64, "new_tokens": 8, "repeats": 2, "threads": 1}
    assert {key: result[key] for key in asked} == asked
    for name in (
        "prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "weight_bytes",
        "bits_per_weight", "peak_memory_bytes", "load_s",
    ):  # fmt: skip
        assert result[name] > 0, name
    # One figure is the other, seen from its other side.
    assert 64 / result["time_to_first_token_s"] > 0.5 * result["prefill_tokens_per_s"]
    assert (result["backend"], result["device"]) == ("onnx", "cpu")
    assert done.err == ""


def test_without_threads_bench_tells_the_default(call: Call, int4_bundle: Path) -> None:
    result = call("bench", int4_bundle, *SHORT, "--json").json
    assert result["threads"] == physical_cores() >= 1


def test_bench_shows_people_a_table(call: Call, int4_bundle: Path) -> None:
    done = call("bench", int4_bundle, *SHORT)
    for word in ("prefill", "decode", "first token", "peak memory", "onnx on cpu"):
        assert word in done.out


def test_bench_shows_where_the_time_goes(call: Call, int4_bundle: Path) -> None:
    found = call("bench", int4_bundle, *SHORT, "--threads", "1", "--profile", "--json").json
    stage = found["profile"]["decode"]
    assert 0 < stage["graph_s"] < stage["seconds"]
    assert 0 < found["profile"]["weights_share"] < 1
    names = [operator["name"] for operator in stage["operators"]]
    assert "MatMulNBits down_proj" in names
    shown = call("bench", int4_bundle, *SHORT, "--profile").out
    for word in ("GB/s", "prefill, 64 tokens", "decode, one step", "Python around the graph"):
        assert word in shown


def test_bench_tells_of_every_run_as_it_ends(call: Call, int4_bundle: Path) -> None:
    lines = call("bench", int4_bundle, *SHORT).err.splitlines()
    speeds = r"prefill [\d.]+ tokens/s, decode [\d.]+ tokens/s"
    wanted = ["warming up", *(f"{run}: {speeds}" for run in ("warm-up", *RUNS))]
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line)


def test_what_does_not_fit_is_one_line(call: Call, int4_bundle: Path, tmp_path: Path) -> None:
    said = call("bench", int4_bundle, "--prompt-tokens", "2000").complaint
    assert "2048" in said
    assert "--new-tokens" in call("bench", int4_bundle, "--new-tokens", "1").complaint
    assert "--repeat" in call("bench", int4_bundle, "--repeat", "0").complaint
    assert "no bundle" in call("bench", tmp_path / "nowhere").complaint


def test_the_peak_never_falls() -> None:
    before = peak_memory_bytes()
    assert before > 1e6
    held = bytearray(8 << 20)
    assert peak_memory_bytes() >= before
    assert held
