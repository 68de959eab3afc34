"""Logits of our float32, 8-bit and 4-bit bundles, and of onnxruntime-genai's 4-bit export, against
transformers in float32 on the same texts.

    python -m benchmarks.fidelity CHECKPOINT [--tokens 1024] [--window 512]

The peer's graph is run by onnxruntime directly, so that only the weights and kernels differ.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.measure import TEXTS, build_with_genai, genai_environment, write_result
from qwen2x.exporters.config import read_config
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.compare import compare, windows_of
from qwen2x.runtimes.runtime import open_runtime
from qwen2x.runtimes.tokenizer import Tokenizer

OURS: dict[str, dict[str, int]] = {
    "float32": {},
    "int8-g32": {"bits": 8, "group_size": 32},
    "int4-g32": {"bits": 4, "group_size": 32, "method": "rtn"},
    "int4-g64": {"bits": 4, "group_size": 64, "method": "rtn"},
    "int4-g128": {"bits": 4, "group_size": 128, "method": "rtn"},
}
PEER = "onnxruntime-genai int4"


class GenaiGraph:
    """The peer's model.onnx."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        config = read_config(checkpoint)
        self._empty = (1, config.num_key_value_heads, 0, config.head_dim)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(folder / "model.onnx", options)

    def logits(self, token_ids: np.ndarray) -> np.ndarray:
        feed = {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}
        for item in self._session.get_inputs():
            if item.name.startswith("past_key_values"):
                feed[item.name] = np.zeros(self._empty, np.float32)
        rows: np.ndarray = self._session.run(["logits"], feed)[0]
        return rows


class Remembered:
    """The reference's logits on disk, since every variant is compared with them."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._runtime = open_runtime(checkpoint, backend="torch")
        self._folder = folder

    def logits(self, token_ids: np.ndarray) -> np.ndarray:
        path = self._folder / f"{hash(token_ids.tobytes()):x}.npy"
        if not path.exists():
            np.save(path, self._runtime.logits(token_ids))
        rows: np.ndarray = np.load(path)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    tokenizer = Tokenizer(args.checkpoint)
    windows = {
        name: windows_of(
            tokenizer.encode((TEXTS / f"{name}.txt").read_text(encoding="utf-8")),
            args.tokens,
            args.window,
        )
        for name in ("prose", "code")
    }
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = Remembered(args.checkpoint, Path(folder))
        for name in (*OURS, PEER):
            with variant(name, args.checkpoint, Path(folder)) as (candidate, size):
                table[name] = {"bytes": size}
                for text, parts in windows.items():
                    figures = asdict(compare(reference, candidate, parts))
                    del figures["kl"]
                    table[name][text] = figures
    ratio = {
        text: table["int4-g32"][text]["kl_mean"] / table[PEER][text]["kl_mean"] for text in windows
    }
    write_result(
        "fidelity",
        {"tokens": args.tokens, "window": args.window, "variants": table, "int4_kl_ratio": ratio},
    )


@contextmanager
def variant(name: str, checkpoint: Path, folder: Path) -> Iterator[tuple[Any, int]]:
    """A runtime of one variant, and its bytes on disk."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / "bundle"
        if name == PEER:
            build_with_genai(genai_environment(), checkpoint, out)
            yield GenaiGraph(out, checkpoint), size_of(out)
        else:
            export(checkpoint, out=out, **OURS[name])
            with open_runtime(out) as runtime:
                yield runtime, size_of(out)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


if __name__ == "__main__":
    main()
