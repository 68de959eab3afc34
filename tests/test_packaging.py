"""The built wheel works from an environment of its own, away from the source tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHERE = """
import json
from importlib import resources
import qwen2x.cli.main, qwen2x.exporters, qwen2x.quantize, qwen2x.runtimes
from qwen2x.cli.judging import read_text
example = resources.files("qwen2x.examples") / "tiny-qwen2"
print(json.dumps({"code": qwen2x.cli.main.__file__, "example": str(example),
                  "text": read_text(None)}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    options = ["--no-build-isolation"] if _builds_here() else []
    _pip("wheel", "--no-deps", *options, "-w", out, source)
    return next(out.glob("qwen2x-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that has the wheel and sees this one's libraries."""
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(folder, with_pip=False)
    bin_folder = folder / "bin"
    _pip("--python", bin_folder / "python", "install", "--no-deps", wheel)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    # A plain entry of a .pth file: the editable install's own .pth over there is not run.
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin_folder


def test_the_wheel_holds_all_code_and_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for room in ("cli", "exporters", "quantize", "runtimes", "serving"):
        for path in (ROOT / room).iterdir():
            if path.is_file():
                assert f"qwen2x/{room}/{path.name}" in names
    for path in (ROOT / "examples" / "tiny-qwen2").iterdir():
        assert f"qwen2x/examples/tiny-qwen2/{path.name}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "cli/"))]


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    assert _run(installed / "qwen2x", "--version", cwd=tmp_path).split()[-1] == (
        metadata.version("qwen2x")
    )
    assert "export" in _run(installed / "qwen2x", "--help", cwd=tmp_path)
    doctor = json.loads(_run(installed / "qwen2x", "doctor", "--json", cwd=tmp_path))
    assert doctor["qwen2x"] == metadata.version("qwen2x")


def test_code_and_data_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = json.loads(_run(installed / "python", "-c", WHERE, cwd=tmp_path))
    environment = installed.parent.resolve()
    assert environment in Path(where["code"]).resolve().parents
    assert environment in Path(where["example"]).resolve().parents
    assert len(where["text"]) > 1000
    facts = json.loads(_run(installed / "qwen2x", "inspect", where["example"], "--json",
                            cwd=tmp_path))  # fmt: skip
    assert facts["kind"] == "checkpoint"


def test_the_installed_command_exports_and_runs(installed: Path, tmp_path: Path) -> None:
    example = json.loads(_run(installed / "python", "-c", WHERE, cwd=tmp_path))["example"]
    program = installed / "qwen2x"
    _run(program, "export", example, "--bits", "4", "-o", "bundle", cwd=tmp_path)
    answer = _run(program, "run", "bundle", "And it came to pass", "--raw", "--max-tokens", "8",
                  "--json", cwd=tmp_path)  # fmt: skip
    assert json.loads(answer)["new_tokens"] == 8


def _builds_here() -> bool:
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


def _pip(*args: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _run(*command: object, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
