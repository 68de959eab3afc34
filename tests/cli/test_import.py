"""GPTQ and AWQ checkpoints through the commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Call
from tests.packed_checkpoint import Packed, write_packed_checkpoint

FEW = ("--tokens", "96", "--window", "48")


@pytest.fixture(params=["gptq", "awq"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Packed:
    is_gptq = request.param == "gptq"
    # Groups of 128, as the official releases have.
    return write_packed_checkpoint(
        tmp_path / "source", method=request.param, sym=is_gptq, group_size=128
    )


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_a_packed_checkpoint_is_exported_run_validated_and_inspected(
    target: str, call: Call, packed: Packed, tmp_path: Path
) -> None:
    if target == "mlx":
        pytest.importorskip("mlx.core", reason="mlx is not installed")
    out = tmp_path / "bundle"
    done = call("export", packed.folder, "--to", target, "-o", out, "--json")
    assert done.json["scheme"] in ("int4-g128", "int4-g128-zp")
    assert done.json["dtype"] == ("float32" if target == "onnx" else "float16")
    found = call("validate", out, "--against", packed.folder, *FEW, "--json").json
    assert found["verdict"] == "pass", found["checks"]
    assert found["tolerance"]["kl_mean"] <= 0.03
    ran = call("run", out, "Hello", "--max-tokens", "4", "--temperature", "0", "--json").json
    assert ran["new_tokens"] == 4
    inspected = call("inspect", out, "--json").json
    assert inspected["scheme"] == done.json["scheme"]
    assert inspected["method"] in ("gptq", "awq")


def test_what_a_source_is_shows_its_quantization(call: Call, packed: Packed) -> None:
    facts = call("inspect", packed.folder, "--json").json
    assert facts["scheme"] in ("gptq int4-g128", "awq int4-g128-zp")
    config = json.loads((packed.folder / "config.json").read_text("utf-8"))
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    layer = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * inner
    assert facts["by_kind"]["mlp"]["parameters"] == 2 * 3 * hidden * inner
    assert 4 < facts["by_kind"]["mlp"]["bits_per_weight"] < 4.6
    stored = facts["by_kind"]["embedding"]["bytes"] + sum(
        facts["by_kind"][kind]["bytes"] for kind in ("attention", "mlp")
    )
    assert facts["by_kind"]["embedding"]["bytes"] == 2 * rows * hidden
    assert facts["bits_per_weight"] == pytest.approx(8 * stored / (rows * hidden + 2 * layer))
    assert facts["scheme"] in call("inspect", packed.folder).out


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_packed_source_runs_as_it_is(call: Call, packed: Packed, backend: str) -> None:
    arguments = ("--backend", backend, "--max-tokens", "3", "--temperature", "0", "--json")
    assert call("run", packed.folder, "Hello", *arguments).json["new_tokens"] == 3


def test_a_dry_run_reads_the_config_alone(call: Call, packed: Packed, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    planned = call("export", packed.folder, "--dry-run", "--json").json
    done = call("export", packed.folder, "-o", out, "--json").json
    sizes = {file["name"]: file["bytes"] for file in done["files"]}
    for file in planned["files"]:
        assert sizes[file["name"]] == file["bytes"]
    assert planned["bits_per_weight"] == done["bits_per_weight"]
    assert planned["peak_memory_bytes"] > 10e6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "4"], ["already quantized", "--bits 4"]),
        (["--bits", "8", "--method", "gptq"], ["already quantized", "--method gptq"]),
        (["--group-size", "64"], ["--group-size"]),
        (["--method", "gptq"], ["--method"]),
        (["--dtype", "bfloat16", "--to", "mlx"], ["scales", "float16"]),
    ],
)
def test_what_would_quantize_again_is_one_line(
    call: Call, packed: Packed, options: list[str], words: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "parent" / "bundle"
    said = call("export", packed.folder, "-o", out, *options).complaint
    for word in words:
        assert word in said
    assert not out.parent.exists()


def test_the_commands_of_the_page_run_in_their_order(
    call: Call, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text("utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        named = line.replace("Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4", str(packed.folder))
        assert str(packed.folder) in named
        program, *arguments = shlex.split(named)
        assert program == "qwen2x"
        done = call(*arguments)
        assert done.code == 0, f"{line}\n{done.err}"


def test_an_unknown_format_is_one_line_for_every_command(
    call: Call, packed: Packed, tmp_path: Path
) -> None:
    packed.configure(bits=3)
    for command in (
        ["export", packed.folder, "-o", tmp_path / "parent" / "bundle"],
        ["run", packed.folder, "Hello"],
        ["inspect", packed.folder],
    ):
        said = call(*command).complaint
        assert "expected bits to be" in said
        assert "got 3" in said
    assert not (tmp_path / "parent").exists()
