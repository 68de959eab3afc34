"""4-bit MLX folder of a checkpoint: our wall time and peak memory against ``mlx_lm.convert``.

    python -m benchmarks.mlx_export CHECKPOINT [--repeat 3]

Both are whole commands in fresh processes, in turn, and the fastest of each counts. Then a 7B shape
with 2 and with 8 layers, whose peak memory must not differ.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.export_memory import write_checkpoint
from benchmarks.measure import QWEN2X, Run, run_measured, write_result

LAYERS = (2, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    ours: list[Run] = []
    theirs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):
            ours.append(export(args.checkpoint, Path(folder) / "ours"))
            theirs.append(convert(args.checkpoint, Path(folder) / "mlx-lm"))
            shutil.rmtree(Path(folder) / "mlx-lm")
    seconds, their_seconds = (min(run.seconds for run in runs) for runs in (ours, theirs))
    memory, their_memory = (max(run.peak_memory_bytes for run in runs) for runs in (ours, theirs))
    depths = {layers: measure_depth(layers) for layers in LAYERS}
    write_result(
        "mlx_export",
        {
            "qwen2x": {"seconds": [run.seconds for run in ours], "peak_memory_bytes": memory},
            "mlx-lm": {
                "seconds": [run.seconds for run in theirs],
                "peak_memory_bytes": their_memory,
            },
            "time_ratio": seconds / their_seconds,
            "memory_ratio": memory / their_memory,
            "by_layers": depths,
            "depth_ratio": max(depths.values()) / min(depths.values()),
        },
    )


def export(checkpoint: Path, out: Path) -> Run:
    flags: tuple[Any, ...] = ("--to", "mlx", "--bits", "4", "--method", "rtn", "-o", out, "--force")
    return run_measured([*QWEN2X, "export", checkpoint, *flags])


def convert(checkpoint: Path, out: Path) -> Run:
    """mlx-lm's own 4-bit conversion, groups of 32 as ours."""
    flags = ("--hf-path", checkpoint, "--mlx-path", out, "-q", "--q-group-size", "32")
    return run_measured([sys.executable, "-m", "mlx_lm", "convert", *flags])


def measure_depth(layers: int) -> int:
    """Peak bytes of exporting a 7B-shaped checkpoint of so many layers."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(checkpoint, layers)
        return export(checkpoint, Path(folder) / "bundle").peak_memory_bytes


if __name__ == "__main__":
    main()
