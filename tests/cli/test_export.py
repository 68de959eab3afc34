from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen2x.exporters.bundle import open_bundle
from tests.cli.command import environment, run_program
from tests.cli.conftest import Call
from tests.small_hub import SmallHub
from tests.tiny_checkpoint import write_tiny_checkpoint

# Every reading of the checkpoint takes a while, so that there is a middle to interrupt.
SLOWLY = """
import sys, time
from qwen2x.exporters.checkpoint import Checkpoint
read = Checkpoint.rows
def rows(*args):
    time.sleep(0.25)
    return read(*args)
Checkpoint.rows = rows
from qwen2x.cli.main import main
main()
"""
RTN = ["--bits", "4", "--method", "rtn"]
KEYS = {"bundle", "files", "bytes", "bits_per_weight", "seconds", "peak_memory_bytes"}


def test_export_prints_the_contracts_object(call: Call, example: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = call(
        "export", example, "--to", "onnx", "--bits", "4", "--method", "rtn", "-o", out, "--json"
    )
    result = done.json
    assert result.keys() >= KEYS
    assert result["bundle"] == str(out)
    for file in result["files"]:
        content = (out / file["name"]).read_bytes()
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
    names = {file["name"] for file in result["files"]}
    assert names == {path.name for path in out.iterdir()} - {"qwen2x.json", "README.md"}
    assert result["bytes"] == sum(file["bytes"] for file in result["files"])
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 10e6
    assert result["scheme"] == "int4-g32"
    assert 4 < result["bits_per_weight"] < 8
    assert done.err == ""


def test_export_tells_people_what_to_do_next(call: Call, example: Path, tmp_path: Path) -> None:
    done = call("export", example, "-o", tmp_path / "bundle")
    assert done.code == 0
    assert "32.00 bits per weight" in done.out
    assert f"qwen2x validate {tmp_path / 'bundle'} --against {example}" in done.out
    assert f"qwen2x run {tmp_path / 'bundle'}" in done.out


@pytest.mark.parametrize("options", [[], RTN, ["--bits", "8", "--group-size", "64"]])
def test_a_dry_run_foretells_what_is_written(
    options: list[str], call: Call, example: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    plan = call("export", example, *options, "-o", out, "--dry-run", "--json").json
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []
    written = call("export", example, *options, "-o", out, "--json").json
    assert plan["bits_per_weight"] == written["bits_per_weight"]
    assert plan["scheme"] == written["scheme"]
    sizes = {file["name"]: file["bytes"] for file in written["files"]}
    planned = {file["name"]: file["bytes"] for file in plan["files"]}
    assert planned.keys() >= {"model.onnx", "model.onnx_data"}
    assert planned == {name: sizes[name] for name in planned}
    assert plan["bytes"] == sum(planned.values())


def test_a_dry_run_needs_no_folder_and_shows_a_table(call: Call, example: Path) -> None:
    done = call("export", example, *RTN, "--dry-run")
    assert done.code == 0
    for word in ("model.onnx_data", "bits per weight", "peak memory", "2048 positions"):
        assert word in done.out


def test_the_peak_that_a_dry_run_foretells_is_kept(example: Path, tmp_path: Path) -> None:
    plan = run_program("export", example, *RTN, "--dry-run", "--json").json
    written = run_program("export", example, *RTN, "-o", tmp_path / "b", "--json").json
    assert written["peak_memory_bytes"] <= plan["peak_memory_bytes"]


def test_without_a_folder_export_says_which_option_is_missing(call: Call, example: Path) -> None:
    assert "-o FOLDER" in call("export", example).complaint


def test_a_folder_that_exists_is_kept_unless_forced(
    call: Call, example: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    assert call("export", example, "-o", out).code == 0
    before = (out / "qwen2x.json").read_bytes()
    assert "--force" in call("export", example, "--bits", "8", "-o", out).complaint
    assert (out / "qwen2x.json").read_bytes() == before
    assert call("export", example, "--bits", "8", "-o", out, "--force").code == 0
    assert open_bundle(out, verify=True).scheme == "int8-g32"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "3"], "'4', '8'"),
        (["--to", "gguf"], "onnx"),
        (["--max-context", "0"], "--max-context"),
        (["--max-context", "99999"], "2048"),
        (["--method", "magic"], "auto"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    options: list[str], said: str, call: Call, example: Path, tmp_path: Path
) -> None:
    assert said in call("export", example, *options, "-o", tmp_path / "bundle").complaint
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_none_is_one_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in call("export", tmp_path / "empty", "-o", tmp_path / "b").complaint
    assert "./nowhere" in call("export", "./nowhere", "-o", tmp_path / "b").complaint
    assert not (tmp_path / "b").exists()


def test_a_hub_id_is_fetched_and_named_in_the_bundle(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    with SmallHub() as hub:
        commit = hub.add("org/tiny", source)
        done = run_program(
            "export", "org/tiny", "--bits", "8", "-o", tmp_path / "bundle", "--json",
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
        assert done.json["scheme"] == "int8-g32"
        assert "model.safetensors" in hub.file_names()
        missing = run_program(
            "export", "org/tiny", "--revision", "v9", "-o", tmp_path / "other",
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
        assert "'v9'" in missing.complaint
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    assert bundle.manifest["source"]["id"] == "org/tiny"
    assert commit
    # The bytes that were fetched are on standard error, and on standard output one object.
    assert "org/tiny" in done.err


def test_ctrl_c_leaves_no_folder_and_the_next_export_goes_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-c", SLOWLY, "export", str(checkpoint), "-o", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        wait_for(lambda: any(tmp_path.glob(".bundle.partial/model.onnx_data")))
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == b""
    assert stderr.split() == [b"interrupted"]
    assert not out.exists()
    done = run_program("export", checkpoint, "-o", out, "--json")
    assert done.json["bundle"] == str(out)
    open_bundle(out, verify=True)
    assert not list(tmp_path.glob(".bundle*"))


def test_progress_is_on_standard_error_and_only_in_a_terminal(
    example: Path, tmp_path: Path
) -> None:
    pexpect = pytest.importorskip("pexpect")
    plain = run_program("export", example, "-o", tmp_path / "plain")
    assert plain.err == ""
    shell = shutil.which("sh")
    line = f"exec {Path(sys.executable).with_name('qwen2x')} export {example} -o {tmp_path}/shown"
    child = pexpect.spawn(shell, ["-c", f"{line} --bits 8 >{tmp_path}/out"], env=environment())
    shown = child.read().decode()
    child.close()
    assert child.exitstatus == 0
    assert "exporting" in shown
    assert "exporting" not in (tmp_path / "out").read_text()


def test_the_manifest_names_the_source_without_its_path(
    call: Call, example: Path, tmp_path: Path
) -> None:
    call("export", example, "-o", tmp_path / "bundle")
    text = (tmp_path / "bundle" / "qwen2x.json").read_text()
    assert json.loads(text)["source"]["id"] == example.name
    assert str(example.parent) not in text


def wait_for(holds: object, seconds: float = 30) -> None:
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
