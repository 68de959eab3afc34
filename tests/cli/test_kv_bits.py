"""``--kv-bits``: an export that has it, what is shown of it, and commands that ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.exporter import export
from tests.cli.conftest import Call
from tests.tiny_checkpoint import EXAMPLE

SAMPLE = EXAMPLE.parent / "sample.txt"
KV8 = ("--kv-bits", "8", "--calibration", SAMPLE)
GREEDY = ("--max-tokens", "4", "--temperature", "0")
# Key and value of a token: 6 layers, 2 heads of 32.
CODES_PER_TOKEN = 2 * 6 * 2 * 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv8") / "bundle"
    return export(EXAMPLE, out=folder, kv_bits=8, calibration=str(SAMPLE)).bundle


def test_export_takes_it_without_bits_and_tells_of_its_layers(call: Call, tmp_path: Path) -> None:
    done = call("export", EXAMPLE, *KV8, "-o", tmp_path / "bundle")
    assert done.code == 0
    assert "scanned layer 6 of 6" in done.err
    found = call("inspect", tmp_path / "bundle", "--json").json
    assert found["cache"]["dtype"] == "int8"
    assert found["cache"]["calibration"]["text"] == SAMPLE.name


def test_inspect_shows_a_byte_per_number(call: Call, bundle: Path, float_bundle: Path) -> None:
    sizes = [
        call("inspect", folder, "--json").json["cache_bytes_per_token"]
        for folder in (bundle, float_bundle)
    ]
    assert sizes == [CODES_PER_TOKEN, 4 * CODES_PER_TOKEN]
    assert "768 bytes per token" in call("inspect", bundle).out


def test_a_dry_run_knows_of_it(call: Call) -> None:
    shown = call("export", EXAMPLE, "--kv-bits", "8", "--dry-run", "--json").json
    plain = call("export", EXAMPLE, "--dry-run", "--json").json
    sizes = [
        {file["name"]: file["bytes"] for file in found["files"]}["model.onnx"]
        for found in (shown, plain)
    ]
    assert sizes[0] > sizes[1]


def test_validate_holds_it_to_limits_of_its_own(call: Call, bundle: Path) -> None:
    done = call("validate", bundle, "--against", EXAMPLE, "--tokens", "256", "--json")
    report = done.json
    assert (done.code, report["verdict"]) == (0, "pass")
    assert report["tolerance"]["kl_mean"] == pytest.approx(0.00201)
    assert report["kl_mean"] > 1e-5


@pytest.mark.parametrize("options", [(), ("--kv-bits", "8")], ids=str)
def test_run_and_bench_take_the_bundle(call: Call, bundle: Path, options: tuple[str, ...]) -> None:
    said: dict[str, Any] = call("run", bundle, "Hello", *GREEDY, *options, "--json").json
    assert said["new_tokens"] == 4
    few = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1")
    assert call("bench", bundle, *few, *options, "--json").json["decode_tokens_per_s"] > 0


def test_run_makes_such_a_bundle_of_a_checkpoint_once(call: Call, tmp_path: Path) -> None:
    command = ("run", EXAMPLE, "Hello", "--backend", "onnx", *GREEDY)
    first = call(*command, "--kv-bits", "8")
    assert first.code == 0
    assert "scanned layer 6 of 6" in first.err
    again = call(*command, "--kv-bits", "8")
    assert "scanned" not in again.err
    assert again.out == first.out
    call(*command)
    assert len(list((tmp_path / "cache" / "bundles").iterdir())) == 2


@pytest.mark.parametrize("command", ["run", "bench", "validate"])
def test_a_bundle_without_it_says_what_to_do(call: Call, float_bundle: Path, command: str) -> None:
    rest: dict[str, tuple[object, ...]] = {"run": ("hi",), "validate": ("--against", EXAMPLE)}
    said = call(command, float_bundle, *rest.get(command, ()), "--kv-bits", "8").complaint
    assert "was exported with a KV cache in float32, expected int8; export it again with" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "mlx"), "leave --kv-bits out here, and give it to qwen2x run"),
        (("--device", "cuda", "--dtype", "float32"), "choose --dtype bfloat16 or float16"),
    ],
    ids=["mlx", "standard-operators"],
)
def test_an_export_that_cannot_have_it_is_refused(
    call: Call, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "new" / "bundle"
    assert said in call("export", EXAMPLE, "--kv-bits", "8", *options, "-o", out).complaint
    assert not out.parent.exists()
