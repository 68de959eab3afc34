"""Exports in processes of their own: killed, slowed down, or on a disk of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A child that hangs says where, and ends.
_GUARD_SECONDS = 30
_PRELUDE = """
import faulthandler, json, os, signal, sys
faulthandler.dump_traceback_later(GUARD_SECONDS, exit=True)
from pathlib import Path
import qwen2x.exporters.bundle_writer as bundle_writer
import qwen2x.exporters.weight_writer as weight_writer
from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import InputError

source, out, options = json.loads(sys.argv[1])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(**more):
    return export(source, out=out, **options, **more)
"""
# Exports onto a disk whose free room it is not told, and says what is left.
FILLS_THE_DISK = """
import shutil
real = shutil.disk_usage
shutil.disk_usage = lambda path: real("/")
try:
    run()
except InputError as error:
    print(json.dumps([str(error), os.listdir(Path(out).parent)]))
"""


def child(program: str, source: Path, out: Path, **options: Any) -> list[str]:
    """The command line of a Python program that calls ``run()``, once or not at all."""
    prelude = _PRELUDE.replace("GUARD_SECONDS", str(_GUARD_SECONDS))
    arguments = json.dumps([str(source), str(out), options])
    return [sys.executable, "-c", prelude + program, arguments]


def run_child(
    program: str, source: Path, out: Path, *, on_disk: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs such a program to its end.

    ``on_disk`` are the options of a tmpfs that is mounted over ``out.parent`` for this process
    alone; that needs root, see ``can_mount``.
    """
    command = child(program, source, out, **options)
    if on_disk:
        mount = 'mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, on_disk, str(out.parent), *command]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment(), check=False
    )


def environment() -> dict[str, str]:
    """One thread per library: the machines of tests have few cores."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a disk of its own."""
    folder.mkdir(exist_ok=True)
    try:
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
