"""``qwen2x doctor``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from importlib import metadata
from typing import Any

import click
from qwen2x.cli.options import json_option
from qwen2x.cli.output import print_json

# Extra: (modules it must bring, what it is for)
_EXTRAS = {
    "cpu": (("onnxruntime",), "runs ONNX bundles on the CPU"),
    "cuda": (("onnxruntime",), "runs ONNX bundles on NVIDIA GPUs (instead of cpu)"),
    "torch": (("torch", "transformers"), "the judge of validate, and --backend torch"),
}


@click.command("doctor", epilog="Example: qwen2x doctor")
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


def examine() -> dict[str, Any]:
    """The object that ``doctor --json`` prints."""
    devices = _onnx_devices()
    return {
        "qwen2x": metadata.version("qwen2x"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "devices": devices,
        "backends": _backends(devices),
        "extras": {name: _extra(name, devices) for name in _EXTRAS},
    }


def _onnx_devices() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    runtime = importlib.import_module("qwen2x.runtimes.onnx_runtime")
    devices: list[str] = runtime.available_devices()
    return devices


def _backends(devices: list[str]) -> list[str]:
    backends = ["onnx"] if devices else []
    if all(importlib.util.find_spec(module) for module in _EXTRAS["torch"][0]):
        backends.append("torch")
    return backends


def _extra(name: str, devices: list[str]) -> dict[str, Any]:
    modules, purpose = _EXTRAS[name]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    is_usable = not missing and (name != "cuda" or "cuda" in devices)
    advice = f'pip install "qwen2x[{name}]"'
    if name == "cuda" and not missing and not is_usable:
        advice = f"pip uninstall onnxruntime, then {advice} (the two cannot stand side by side)"
    if missing:
        detail = f"{', '.join(missing)} not installed"
    else:
        detail = ", ".join(f"{module} {_version(module)}" for module in modules)
    return {"is_usable": is_usable, "purpose": purpose, "detail": detail, "advice": advice}


def _version(module: str) -> str:
    """The version of the distribution that brings a module; onnxruntime has several."""
    for distribution in metadata.packages_distributions().get(module, []):
        return metadata.version(distribution)
    return "of unknown version"
