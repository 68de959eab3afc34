from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qwen2x.cli.main import COMMANDS, cli
from qwen2x.cli.output import finite, print_json, size_text
from tests.cli.command import PROGRAM, environment, run_program
from tests.cli.conftest import Call


def test_an_unknown_command_is_one_line_and_2() -> None:
    done = run_program("expört")
    assert "expört" in done.complaint
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line_and_2(name: str, call: Call) -> None:
    done = call(name, "--bogus")
    assert "--bogus" in done.complaint
    assert f"qwen2x {name} --help" in done.complaint
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("args", [["export"], ["run"], ["validate", "somewhere"], ["inspect"]])
def test_a_missing_argument_is_one_line_and_2(args: list[str], call: Call) -> None:
    assert "Missing" in call(*args).complaint


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("ours")

    command = cli.get_command(click.Context(cli), "doctor")
    assert command is not None
    monkeypatch.setattr(command, "callback", fail)
    result = CliRunner().invoke(cli, ["doctor"])
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("args", ["inspect {example}", "--help", "export --help"])
def test_a_reader_that_goes_away_gives_no_traceback(args: str, example: Path) -> None:
    """A closed pipe was exit 1 for click, which here means that a check failed."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [PROGRAM, *args.format(example=example).split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    "args",
    ["--help", "run --help", "inspect {bundle}", "inspect {bundle} --json",
     "run {bundle} Hello --max-tokens 4", "run {bundle} Hello --max-tokens 4 --json",
     "chat {bundle} --max-tokens 4"],
)  # fmt: skip
def test_a_full_disk_behind_standard_output_is_one_line_and_2(
    args: str, float_bundle: Path
) -> None:
    """It was a traceback, and the 1 of a check that failed."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [PROGRAM, *args.format(bundle=float_bundle).split()], input=b"Hello\n", stdout=full,
            stderr=subprocess.PIPE, env=environment(), check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(b"qwen2x: error: standard output cannot be written: No space")
    assert done.stderr.count(b"\n") == 1


def test_a_closed_standard_output_is_one_line_and_2(float_bundle: Path) -> None:
    """The result went nowhere, with exit 0."""
    done = subprocess.run(
        ["sh", "-c", f'"{PROGRAM}" inspect "{float_bundle}" >&-'],
        stderr=subprocess.PIPE, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        "qwen2x: error: expected an open standard output, got a closed one; try >/dev/null"
    ]


def test_ctrl_c_is_130_and_one_word(example: Path) -> None:
    with subprocess.Popen(
        [PROGRAM, "run", example], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(),
    ) as process:  # fmt: skip
        time.sleep(0.7)  # it waits for a prompt on standard input
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    assert err.split() == [b"interrupted"]


def test_text_is_utf8_whatever_the_locale(float_bundle: Path) -> None:
    done = run_program(
        "run", float_bundle, "-", "--raw", "--json", "--max-tokens", "1",
        stdin="schön: 你好".encode(), PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert done.json["new_tokens"] == 1


def test_a_name_that_is_not_utf8_can_be_printed(example: Path, tmp_path: Path) -> None:
    folder = tmp_path / "na\udcffme"
    assert r"na\udcffme" in run_program("inspect", f"./{folder.name}").complaint
    shutil.copytree(example, folder)
    done = run_program("export", folder, "-o", tmp_path / "b\udcff", "--json")
    assert done.json["bundle"] == str(tmp_path / "b\udcff")


def test_json_is_json_even_where_a_figure_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"kl": float("nan"), "checks": [{"value": float("inf")}], "text": "ü"})
    text = capsys.readouterr().out
    assert json.loads(text) == {"kl": None, "checks": [{"value": None}], "text": "ü"}
    assert finite((1, 2.5, "a", True, None)) == [1, 2.5, "a", True, None]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"),
     (7.2e9, "7.20 GB")],
)  # fmt: skip
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert size_text(count) == text


def test_the_module_runs_as_a_program_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwen2x.cli.main", "--version"], capture_output=True, check=True
    )
    assert done.stdout.startswith(b"qwen2x, version")
