"""Commands with their wall time and peak memory, peers' environments, and result files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

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


def run_measured(command: Sequence[object]) -> Run:
    """Runs a command to its end; peak memory is the kernel's count for it (and its children)."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds=seconds, peak_memory_bytes=usage.ru_maxrss * unit, output=output)


def run_json(command: Sequence[object]) -> dict[str, Any]:
    """The JSON object that a command prints (its last line, or all of it)."""
    output = run_measured(command).output.strip()
    try:
        value: dict[str, Any] = json.loads(output)
    except ValueError:
        value = json.loads(output.splitlines()[-1])
    return value


def genai_environment() -> Environment:
    """onnxruntime-genai with what its builder needs, built once under ``.cache``."""
    return open_environment("genai-builder")


def build_with_genai(environment: Environment, checkpoint: Path, out: Path) -> Run:
    """onnxruntime-genai's own 4-bit export for the CPU, with its own defaults."""
    return run_measured(
        [environment.python, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint,
         "-o", out, "-p", "int4", "-e", "cpu", "-c", out.with_name("genai-cache")]
    )  # fmt: skip


def write_result(name: str, result: Mapping[str, Any]) -> None:
    """Prints a result and keeps it in ``benchmarks/results/NAME.json``."""
    whole = {"machine": machine(), "date": datetime.now(UTC).date().isoformat(), **result}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(whole, indent=2)
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
