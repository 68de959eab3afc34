"""MLX folders, ours or mlx-lm's, as float32 checkpoints: on a CPU mlx takes minutes for a window.

So the figures are those of the weights alone, with float32 activations. mlx itself would add what
its 16-bit activations lose.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from benchmarks.measure import QWEN2X, run_measured

_QUANTIZED = (".scales", ".biases")


def convert_with_mlx_lm(checkpoint: Path, out: Path, flags: tuple[str, ...]) -> None:
    """``mlx_lm convert -q``."""
    words = ("--hf-path", checkpoint, "--mlx-path", out, "-q", *flags)
    run_measured([QWEN2X[0], "-m", "mlx_lm", "convert", *words])


def is_mlx(folder: Path) -> bool:
    """A folder for MLX, which holds safetensors rather than a graph."""
    return not (folder / "model.onnx").is_file()


def write_dequantized(folder: Path, checkpoint: Path, out: Path) -> None:
    """Writes a Hugging Face folder in float32 whose weights are those of a quantized MLX folder."""
    out.mkdir()
    shutil.copy(checkpoint / "config.json", out)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with mx.stream(mx.cpu):
        tensors: dict[str, mx.array] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            tensors |= cast(dict[str, mx.array], mx.load(str(shard)))
        floats = {
            name: _to_float32(name, tensors, config.get("quantization", {}))
            for name in tensors
            if not name.endswith(_QUANTIZED)
        }
        mx.save_safetensors(str(out / "model.safetensors"), floats, metadata={"format": "pt"})


def _to_float32(name: str, tensors: dict[str, mx.array], schemes: dict[str, Any]) -> mx.array:
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in tensors:
        return tensors[name].astype(mx.float32)
    scheme = schemes.get(module, schemes)
    return mx.dequantize(
        tensors[name],
        tensors[f"{module}.scales"].astype(mx.float32),
        tensors[f"{module}.biases"].astype(mx.float32),
        group_size=scheme["group_size"],
        bits=scheme["bits"],
    )
