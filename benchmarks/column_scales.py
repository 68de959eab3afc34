"""Whether column scales in the manner of AWQ help compensated rounding: they do not.

AWQ (https://arxiv.org/abs/2306.00978) multiplies a matrix's columns by their inputs' size to some
power before it is rounded, and folds the inverse into the norm before it. Here gate_proj and
down_proj of some layers are rounded so, plainly and with compensation, for several powers. What is
shown is the squared error of the output on text that nothing was fitted to, over that of plain
rounding without scales.

    python -m benchmarks.column_scales CHECKPOINT
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2ForCausalLM

from benchmarks.measure import write_result
from qwen2x.exporters.calibration import read_calibration
from qwen2x.exporters.config import read_config
from qwen2x.quantize.gptq import damping_for, gather_moments, round_compensated
from qwen2x.quantize.groups import dequantize, quantize
from qwen2x.quantize.scheme import Scheme

Floats = NDArray[np.float32]
POWERS = (0.0, 0.1, 0.25, 0.5)
MODULES = ("mlp.gate_proj", "mlp.down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 21])
    parser.add_argument("--group-size", type=int, default=32)
    args = parser.parse_args()
    scheme = Scheme(bits=4, group_size=args.group_size)
    text = read_calibration(args.checkpoint, None, read_config(args.checkpoint))
    model = Qwen2ForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    names = [f"model.layers.{layer}.{module}" for layer in args.layers for module in MODULES]
    fitted = products(model, names, text.windows)
    other = products(model, names, text.held_out)
    result: dict[str, Any] = {"scheme": scheme.name, "tokens": int(text.windows.size)}
    for name in names:
        weights = model.get_submodule(name).weight.numpy(force=True)
        rows = errors(weights, fitted[name], other[name], scheme, text.windows.size)
        result[name] = rows
        print(name, rows, flush=True)
    write_result("column_scales", result)


def products(
    model: Qwen2ForCausalLM, names: list[str], windows: NDArray[np.int64]
) -> dict[str, Floats]:
    """The sum of x x^T over the inputs of each module."""
    sums: dict[str, Floats] = {}

    def add(name: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).numpy()
        sums[name] = sums.get(name, np.float32(0)) + flat.T @ flat

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: add(name, inputs[0])
        )
        for name in names
    ]
    with torch.inference_mode():
        for window in windows:
            model.model(torch.from_numpy(window[None]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


def errors(
    weights: Floats, fitted: Floats, other: Floats, scheme: Scheme, tokens: int
) -> dict[str, dict[str, float]]:
    """By method and power, over plain rounding without scales."""
    size = np.sqrt(fitted.diagonal())
    found: dict[str, dict[str, float]] = {"plain": {}, "compensated": {}}
    for power in POWERS:
        scales = np.maximum(size, 1e-6) ** power
        scales = (scales / np.exp(np.log(scales).mean())).astype(np.float32)
        scaled = weights * scales
        plain = dequantize(quantize(scaled, scheme)) / scales
        moments = gather_moments(fitted / np.outer(scales, scales), damping_for(len(size), tokens))
        compensated = dequantize(round_compensated(scaled, moments, scheme)) / scales
        for method, restored in (("plain", plain), ("compensated", compensated)):
            change = weights - restored
            found[method][str(power)] = float(np.einsum("ij,ij->", change @ other, change))
    base = found["plain"]["0.0"]
    return {
        method: {power: round(value / base, 3) for power, value in of_method.items()}
        for method, of_method in found.items()
    }


if __name__ == "__main__":
    main()
