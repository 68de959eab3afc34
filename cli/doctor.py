"""``qwen2x doctor``."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import click

from qwen2x.cli.machine import physical_cores
from qwen2x.cli.options import json_option
from qwen2x.cli.output import print_json


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What ``pip install "qwen2x[name]"`` brings.

    Attributes:
        backend: the module that needs it; that it can be imported is the proof.
        libraries: what that module imports.
        purpose: what it is for.
    """

    backend: str
    libraries: tuple[str, ...]
    purpose: str


_ONNX, _MLX, _TORCH = (f"qwen2x.runtimes.{name}_runtime" for name in ("onnx", "mlx", "torch"))
# Which module knows a backend's devices.
_DEVICES = {_ONNX: "qwen2x.runtimes.onnx_provider", _MLX: _MLX}
# Whether the second graph of export --prefill-int8 is used.
_PROMPTS = {
    True: "read in int8 by bundles of export --prefill-int8",
    False: "never read in int8, whose sums overflow on this processor (it has no VNNI)",
}
_EXTRAS = {
    "cpu": Extra(backend=_ONNX, libraries=("onnxruntime",), purpose="runs ONNX bundles on the CPU"),
    "cuda": Extra(
        backend=_ONNX,
        libraries=("onnxruntime",),
        purpose="runs ONNX bundles on NVIDIA GPUs (instead of cpu)",
    ),
    "mlx": Extra(
        backend=_MLX,
        libraries=("mlx",),
        purpose="runs MLX folders on Apple GPUs, and on Linux for checking",
    ),
    "mlx-cuda": Extra(
        backend=_MLX,
        libraries=("mlx",),
        purpose="runs MLX folders on NVIDIA GPUs",
    ),
    "torch": Extra(
        backend=_TORCH,
        libraries=("torch", "transformers"),
        purpose="the judge of validate, and --backend torch",
    ),
}


@click.command("doctor", epilog="\b\nExample: qwen2x doctor")
@json_option
def command(as_json: bool) -> None:
    """Show which backends, devices and extras are usable here, and what to install for the rest."""
    facts = examine()
    if as_json:
        print_json(facts)
        return
    click.echo(
        f"qwen2x {facts['qwen2x']}, Python {facts['python']}, {facts['platform']}, "
        f"{facts['cores']} cores"
    )
    for name, extra in facts["extras"].items():
        state = "ready" if extra["is_usable"] else "missing"
        click.echo(f"  {state:<8} [{name}] {extra['purpose']}: {extra['detail']}")
        if not extra["is_usable"]:
            click.echo(f"           {extra['advice']}")
    click.echo(f"  devices  {', '.join(facts['devices']) or 'none'}")
    if facts["int8_prompts"] is not None:
        click.echo(f"  prompts  {_PROMPTS[facts['int8_prompts']]}")


def examine() -> dict[str, Any]:
    """The object that ``doctor --json`` prints."""
    failures = {module: _failure_of(module) for module in (_ONNX, _MLX, _TORCH)}
    devices = {
        module: importlib.import_module(place).available_devices()
        for module, place in _DEVICES.items()
        if failures[module] is None
    }
    backends = {"onnx": _ONNX, "mlx": _MLX, "torch": _TORCH}
    return {
        "qwen2x": metadata.version("qwen2x"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "devices": list(dict.fromkeys(name for names in devices.values() for name in names)),
        "int8_prompts": None if failures[_ONNX] else _reads_prompts_in_int8(),
        "backends": [name for name, module in backends.items() if failures[module] is None],
        "extras": {
            name: _state_of(name, extra, failures[extra.backend], devices.get(extra.backend, []))
            for name, extra in _EXTRAS.items()
        },
    }


def _reads_prompts_in_int8() -> bool:
    from qwen2x.runtimes.onnx_provider import sums_are_exact

    return sums_are_exact()


def _failure_of(module: str) -> str | None:
    """Why a backend cannot be imported; None if it can. A broken library may raise anything."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        return f"cannot be imported: {' '.join(str(error).split())}"
    return None


def _state_of(name: str, extra: Extra, failure: str | None, devices: list[str]) -> dict[str, Any]:
    is_usable = failure is None and (not name.endswith("cuda") or "cuda" in devices)
    versions = ", ".join(f"{library} {_version(library)}" for library in extra.libraries)
    advice = f'pip install "qwen2x[{name}]"'
    if failure is None and not is_usable:
        failure = f"{versions} has no CUDA here"
        if name == "cuda":
            advice = f"pip uninstall onnxruntime, then {advice} (the two cannot stand side by side)"
    return {
        "is_usable": is_usable,
        "purpose": extra.purpose,
        "detail": failure or versions,
        "advice": advice,
    }


def _version(module: str) -> str:
    """The version of the distribution that brings a module; onnxruntime has several."""
    for distribution in metadata.packages_distributions().get(module, []):
        return metadata.version(distribution)
    return "of unknown version"
