"""Virtual environments of other people's runtimes, built once and reused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

_HERE = Path(__file__).resolve().parent
_CACHE = _HERE.parents[1] / ".cache" / "foreign"
_PIP = ("-m", "pip", "install", "--disable-pip-version-check", "-q")
_BUILD_SECONDS, _RUN_SECONDS = 1800, 300


class CannotInstallError(Exception):
    """pip could not install the requirements here, in one line."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a script printed: its JSON object, and everything that it or its libraries said."""

    result: dict[str, Any]
    messages: str


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A folder with a Python of its own."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter."""
        if os.name == "nt":
            return self.folder / "Scripts" / "python.exe"
        return self.folder / "bin" / "python"

    def run(self, script: str, *arguments: object) -> Outcome:
        """Runs a script that lies beside this file; what it prints last on stdout is its result.

        Raises:
            AssertionError: it failed.
        """
        command = [str(self.python), str(_HERE / script), *map(str, arguments)]
        done = subprocess.run(
            command, env=_own_variables(), capture_output=True, text=True, timeout=_RUN_SECONDS
        )
        assert done.returncode == 0, f"{script} failed:\n{done.stdout}{done.stderr}"
        *said, result = done.stdout.strip().splitlines()
        return Outcome(result=json.loads(result), messages="\n".join([*said, done.stderr]))


def open_environment(name: str) -> Environment:
    """The environment of ``<name>.txt``, built if it is missing or made from other requirements.

    Raises:
        CannotInstallError: for want of a network, or of a package for this machine.
    """
    environment = Environment(folder=_CACHE / name)
    stamp, wanted = environment.folder / "stamp.txt", _stamp(name)
    _CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(_CACHE / f"{name}.lock"):
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(environment.folder, ignore_errors=True)
            _call(sys.executable, "-m", "venv", environment.folder)
            _call(environment.python, *_PIP, *_fresh(name), "-r", _HERE / f"{name}.txt")
            stamp.write_text(wanted, encoding="utf-8")
    return environment


def _fresh(name: str) -> tuple[str, ...]:
    """pip's cache of wheels that it built is deaf to the settings that they were built with."""
    requirements = (_HERE / f"{name}.txt").read_text(encoding="utf-8")
    return ("--no-cache-dir",) if "--config-settings" in requirements else ()


def _stamp(name: str) -> str:
    """What an environment depends on: the requirements, and the interpreter's version."""
    requirements = (_HERE / f"{name}.txt").read_bytes()
    return f"{hashlib.sha256(requirements).hexdigest()} python {sys.version.split()[0]}\n"


def _call(*command: object) -> None:
    arguments = [str(part) for part in command]
    variables = _own_variables()
    try:
        subprocess.run(
            arguments,
            env=variables,
            check=True,
            capture_output=True,
            text=True,
            timeout=_BUILD_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        errors = [line for line in error.stderr.splitlines() if "ERROR" in line]
        reason = errors[-1].strip() if errors else f"exit status {error.returncode}"
        raise CannotInstallError(f"pip cannot install it here: {reason}") from None
    except subprocess.TimeoutExpired:
        message = f"pip took more than {_BUILD_SECONDS} s to install it here"
        raise CannotInstallError(message) from None


def _own_variables() -> dict[str, str]:
    """This process's variables, but for those that would lead Python back to our environment."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUTF8": "1"}
    return {name: value for name, value in os.environ.items() if name not in ours} | offline
