"""Every command of the README runs, against a small hub that serves the small checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_hub import SmallHub

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Its commands for a Mac owner are those that nothing but a Mac can run.
MLX_PAGE = (ROOT / "docs" / "mlx.md").read_text(encoding="utf-8")
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
MAKE = ("make demo", "make test")
CHAT = "Who are you?\n/exit\n"


def blocks(kind: str, page: str = README) -> list[str]:
    """The code blocks with this info string."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
CUDA_COMMANDS = [line for block in blocks("sh cuda") for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables of a user whose hub is the small one, in an empty folder (PWD)."""
    folder = tmp_path_factory.mktemp("readme")
    with SmallHub() as hub:
        hub.add(MODEL, ROOT / "examples" / "tiny-qwen2")
        scripts = Path(sys.executable).parent
        yield os.environ | {
            "PWD": str(folder),
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "hub"),
            "QWEN2X_CACHE": str(folder / "cache"),
        }


def run(
    command: list[str], variables: dict[str, str], said: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=variables["PWD"], env=variables, input=said, capture_output=True, text=True
    )


def test_every_command_line_of_the_readme_is_one_that_is_tested_here() -> None:
    infos = set(re.findall(r"^```(.+)$", README, re.MULTILINE))
    assert infos == {"sh", "sh cuda", "python"}
    assert {line.split()[0] for line in COMMANDS + CUDA_COMMANDS} == {"make", "qwen2x"}
    assert [line for line in COMMANDS if line.startswith("make")] == list(MAKE)


def test_the_commands_for_a_hub_model_run_in_their_order(place: dict[str, str]) -> None:
    for line in COMMANDS:
        if line in MAKE:
            continue
        done = run(shlex.split(line), place, CHAT)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), line


def test_the_commands_of_the_page_on_mlx_run_in_their_order(
    place: dict[str, str], tmp_path: Path
) -> None:
    for line in [line for block in blocks("sh", MLX_PAGE) for line in block.splitlines()]:
        done = run(shlex.split(line), place | {"PWD": str(tmp_path)})
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), line


def test_the_commands_for_cuda_export_and_say_what_is_missing(place: dict[str, str]) -> None:
    import onnxruntime

    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    for line in CUDA_COMMANDS:
        done = run(shlex.split(line), place)
        if line.split()[1] == "export" or has_cuda:
            assert done.returncode == 0, f"{line}\n{done.stderr}"
        else:
            assert done.returncode == 2, f"{line}\n{done.stderr}"
            assert "qwen2x[cuda]" in done.stderr


def test_the_python_of_the_readme_runs(place: dict[str, str]) -> None:
    (code,) = blocks("python")
    done = run([sys.executable, "-c", code], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_extras_that_the_readme_names_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra for group in re.findall(r"\.\[([a-z,]+)\]", README) for extra in group.split(",")
    }
    assert named
    assert named <= set(project["optional-dependencies"])


def test_the_files_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
def test_make_demo_runs_the_demo_in_an_environment_that_is_ready(tmp_path: Path) -> None:
    """Installing takes minutes and is what CI does; here the environment is made beforehand."""
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    venv.create(tmp_path / ".venv", with_pip=False, symlinks=os.name != "nt")
    site_packages = next((tmp_path / ".venv").glob("lib/python*/site-packages"))
    # Runs the .pth files there too, the editable install's among them.
    purelib = sysconfig.get_path("purelib")
    (site_packages / "all.pth").write_text(f"import site; site.addsitedir({purelib!r})\n")
    shutil.copy(Path(sys.executable).parent / "qwen2x", tmp_path / ".venv" / "bin")
    for stamp in (".python", ".demo"):
        (tmp_path / ".venv" / stamp).touch()
    done = subprocess.run(["make", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
def test_make_test_installs_lints_and_tests() -> None:
    done = subprocess.run(
        ["make", "-n", "-B", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for part in ("[cpu,torch,mlx,dev]", "ruff check", "mypy", "lint-imports", "-m pytest"):
        assert part in done.stdout
