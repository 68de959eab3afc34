"""The house's rules: which folders there are, and who may import what."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from qwen2x.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cli", "exporters", "quantize", "runtimes", "serving")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
MOST_LINES = 420
# Library: the files that may import it.
OWNERS = {
    "onnx": ["exporters/onnx_*.py"],
    "onnx_ir": ["exporters/onnx_*.py"],
    "onnxruntime": ["runtimes/onnx_*.py"],
    "mlx": ["exporters/mlx_*.py", "runtimes/mlx_*.py"],
    "torch": ["runtimes/torch_*.py"],
    "transformers": ["runtimes/torch_*.py"],
    "starlette": ["serving/*.py"],
    "uvicorn": ["serving/*.py"],
    "llguidance": ["serving/*.py"],
    "click": ["cli/*.py"],
    "rich": ["cli/*.py"],
}


def setuptools_settings() -> dict[str, Any]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings: dict[str, Any] = project["tool"]["setuptools"]
    return settings


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or within."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name]


def test_the_packages_are_the_folders() -> None:
    settings = setuptools_settings()
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders >= set(ROOMS)
    assert set(settings["packages"]) == {f"qwen2x.{folder}" for folder in folders}
    assert settings["package-dir"] == {f"qwen2x.{folder}": folder for folder in folders}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_no_rooms_within(room: str) -> None:
    """An unlisted sub-package imports when editable and is missing from the wheel."""
    assert not [path for path in (ROOT / room).glob("*/**/*.py") if "__pycache__" not in path.parts]


def test_data_files_are_packaged() -> None:
    packaged = setuptools_settings()["package-data"]
    for package in setuptools_settings()["packages"]:
        folder = ROOT / package.removeprefix("qwen2x.")
        patterns = packaged.get(package, [])
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            assert any(fnmatchcase(name, pattern) for pattern in patterns), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_library_is_imported_where_it_is_owned(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for module in imports_of(path):
        owners = OWNERS.get(module.split(".")[0])
        if owners is not None:
            assert any(fnmatchcase(name, owner) for owner in owners), f"{name} imports {module}"


def test_what_every_package_loads_is_light() -> None:
    for path in ROOT.glob("*/__init__.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] in OWNERS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_type_checkers_find_every_package() -> None:
    for package in setuptools_settings()["packages"]:
        link = ROOT / ".typing" / package.replace(".", "/")
        assert link.is_symlink()
        assert link.readlink() == Path("..", "..", link.name)
        assert link.resolve() == ROOT / link.name


def test_every_command_has_its_module() -> None:
    for name in COMMANDS:
        assert importlib.util.find_spec(f"qwen2x.cli.{name}") is not None
    commands = {path.stem for path in FILES if path.parent.name == "cli" and has_command(path)}
    assert commands == set(COMMANDS)


def has_command(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "command" for node in tree.body)


def test_no_tracked_file_names_a_machine() -> None:
    """Folders of one machine, and the hosts and mirrors that it installs from."""
    folders = "|".join(("work", "root", "opt/pypi", "opt/wheels", "home/[a-z]+"))
    named = re.compile(rf"(?<![\w.$}}])/({folders})/|index" + r"-url|python" + r"hosted\.org")
    found = {}
    for path in tracked_files():
        if path.is_file() and not path.is_symlink():
            text = path.read_bytes().decode("utf-8", errors="ignore")
            match = named.search(text)
            if match and path.suffix not in (".safetensors", ".png"):
                found[path.relative_to(ROOT).as_posix()] = match[0]
    assert found == {}
