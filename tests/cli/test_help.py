from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from qwen2x.cli.main import COMMANDS, cli
from tests.cli.conftest import Call

HEAVY = ("onnx", "onnxruntime", "torch", "transformers", "numpy", "rich")


def imported_by(*args: str) -> list[str]:
    """Which of the heavy libraries a process has loaded when it has answered."""
    script = (
        "import io, json, sys\n"
        "from contextlib import redirect_stdout, suppress\n"
        "from qwen2x.cli.main import main\n"
        "heavy, sys.argv = json.loads(sys.argv[1])\n"
        "with redirect_stdout(io.StringIO()) as out, suppress(SystemExit): main()\n"
        "assert 'Usage' in out.getvalue() or 'version' in out.getvalue()\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))\n"
    )
    given = json.dumps([HEAVY, ["qwen2x", *args]])
    done = subprocess.run([sys.executable, "-c", script, given], capture_output=True, check=True)
    names: list[str] = json.loads(done.stdout)
    return names


def command_of(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([name, "-h"] for name in COMMANDS)])
def test_help_imports_no_heavy_library(args: list[str]) -> None:
    assert imported_by(*args) == []


def test_the_first_help_lists_every_command_with_one_line(call: Call) -> None:
    done = call("--help")
    assert done.code == 0
    for name, line in COMMANDS.items():
        assert f"{name} " in done.out
        assert line in done.out


def test_without_arguments_the_help_comes_on_standard_error(call: Call) -> None:
    done = call()
    assert (done.code, done.out) == (2, "")
    assert "Commands:" in done.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_can_be_copied(name: str, call: Call) -> None:
    lines = call(name, "--help").out.splitlines()
    example = [line for line in lines if line.strip().startswith("Example: qwen2x ")]
    assert len(example) == 1
    words = example[0].split()[2:]
    assert words[0] == name
    # Not wrapped in the middle: the longest examples end in the folder that is written.
    assert not example[0].endswith("-")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does_and_its_default(name: str, call: Call) -> None:
    text = " ".join(call(name, "--help").out.split())
    for option in command_of(name).params:
        if not isinstance(option, click.Option):
            continue
        assert option.help, option.name
        assert " ".join(option.help.split()) in text
        if option.is_flag or option.required:
            continue
        if option.show_default:
            assert f"[default: {option.default}" in text, option.name
        else:
            assert "Default: " in option.help or "Needed" in option.help, option.name


def test_the_version_is_that_of_the_package(call: Call) -> None:
    from importlib.metadata import version

    assert call("--version").out == f"qwen2x, version {version('qwen2x')}\n"
