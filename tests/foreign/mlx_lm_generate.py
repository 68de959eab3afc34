"""Folders in mlx-lm: logits of a prompt, how it goes on greedily, and what was made of the config.

A process of its own, because importing mlx-lm lowers the number of files that may be open. Reads
``{"folders": {name: path}, "prompt": [ids], "new_tokens": n, "text": text, "out": folder}`` from
stdin, writes logits as ``out/name.npy`` and prints one JSON object by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step


def main(request: dict[str, Any]) -> dict[str, Any]:
    mx.set_default_device(mx.cpu)
    return {
        name: _describe(Path(folder), Path(request["out"]) / name, request)
        for name, folder in request["folders"].items()
    }


def _describe(folder: Path, out: Path, request: dict[str, Any]) -> dict[str, Any]:
    model, tokenizer = load(str(folder))
    prompt = mx.array(request["prompt"])
    np.save(out, np.array(model(prompt[None])[0].astype(mx.float32)))
    steps = generate_step(prompt, model, max_tokens=request["new_tokens"])
    rope = model.layers[0].self_attn.rope
    return {
        "token_ids": [int(token) for token, _ in steps],
        "dtypes": sorted({str(array.dtype) for _, array in _parameters(model)}),
        "modules": {path: _kind(module) for path, module in model.named_modules()},
        "rope": {
            "kind": type(rope).__name__,
            "base": getattr(rope, "base", None),
            "mscale": float(getattr(rope, "mscale", 1.0)),
            "periods": rope._freqs.tolist() if hasattr(rope, "_freqs") else None,
        },
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
        "text_ids": tokenizer.encode(request["text"]),
    }


def _parameters(model: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    flat: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return flat


def _kind(module: Any) -> list[Any]:
    """Bits and group size of a quantized module, nothing of another."""
    return [module.bits, module.group_size] if hasattr(module, "bits") else []


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
