"""Commands with their wall time and peak memory, peers' environments, and result files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen2x.exporters.exporter import export
from tests.foreign.environments import Environment, open_environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = ROOT / "benchmarks" / "texts"
QWEN2X = (sys.executable, "-m", "qwen2x.cli.main")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished command."""

    seconds: float
    peak_memory_bytes: int
    output: str


# The kernel counts a parent's memory into a child's peak, so a small process stands between.
_LAUNCHER = """
import json, os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), usage.ru_maxrss], file)
"""


def run_measured(command: Sequence[object], *, stdin: Path = Path(os.devnull)) -> Run:
    """Runs a command to its end; peak memory is the kernel's count for it (and its children)."""
    words = [str(part) for part in command]
    with tempfile.TemporaryDirectory() as folder, stdin.open("rb") as given:
        note = Path(folder) / "usage.json"
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, note, *words],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONUTF8": "1"},
        )
        seconds = time.perf_counter() - started
        code, peak = json.loads(note.read_text(encoding="utf-8"))
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {code}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds=seconds, peak_memory_bytes=peak * unit, output=done.stdout)


def run_json(command: Sequence[object], *, stdin: Path = Path(os.devnull)) -> dict[str, Any]:
    """The JSON object that a command prints (its last line, or all of it)."""
    output = run_measured(command, stdin=stdin).output.strip()
    try:
        value: dict[str, Any] = json.loads(output)
    except ValueError:
        value = json.loads(output.splitlines()[-1])
    return value


def bench_bundle(folder: Path, *, threads: int, prompt: int, new: int) -> dict[str, Any]:
    """What ``qwen2x bench`` prints of one run behind one to warm up, in a process of its own."""
    words = ["bench", folder, "--prompt-tokens", prompt, "--new-tokens", new]
    return run_json([*QWEN2X, *words, "--repeat", 1, "--threads", threads, "--json"])


@contextmanager
def opened_bundle(checkpoint: Path, bundle: Path | None) -> Iterator[Path]:
    """The bundle, or where there is none, one of 4 bits, plainly rounded, for as long as asked."""
    if bundle is not None:
        yield bundle
        return
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "int4"
        export(checkpoint, out=made, bits=4, method="rtn")
        yield made


def genai_environment() -> Environment:
    """onnxruntime-genai with what its builder needs, built once under ``.cache``."""
    return open_environment("genai-builder")


def build_with_genai(environment: Environment, checkpoint: Path, out: Path) -> Run:
    """onnxruntime-genai's own 4-bit export for the CPU, with its own defaults."""
    return run_measured(
        [environment.python, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint,
         "-o", out, "-p", "int4", "-e", "cpu", "-c", out.with_name("genai-cache")]
    )  # fmt: skip


def write_result(name: str, result: Mapping[str, Any], *, keep: bool = True) -> None:
    """Prints a result and keeps it in ``benchmarks/results/NAME.json``."""
    whole = {"machine": machine(), "date": datetime.now(UTC).date().isoformat(), **result}
    text = json.dumps(whole, indent=2)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    packages = ("onnxruntime", "onnx", "numpy", "torch", "transformers")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }
