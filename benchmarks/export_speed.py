"""4-bit export of a checkpoint: our wall time and peak memory against onnxruntime-genai's builder.

    python -m benchmarks.export_speed CHECKPOINT [--repeat 3]

Both are whole commands in fresh processes, in turn, and the fastest of each counts.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.measure import (
    QWEN2X,
    Run,
    build_with_genai,
    genai_environment,
    run_measured,
    write_result,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    environment = genai_environment()
    ours: list[Run] = []
    theirs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):
            out = Path(folder) / "ours"
            command = [
                *QWEN2X,
                "export",
                args.checkpoint,
                "--bits",
                "4",
                "--method",
                "rtn",
                "-o",
                out,
                "--force",
            ]
            ours.append(run_measured(command))
            theirs.append(build_with_genai(environment, args.checkpoint, Path(folder) / "genai"))
            shutil.rmtree(Path(folder) / "genai")
    seconds, genai_seconds = (min(run.seconds for run in runs) for runs in (ours, theirs))
    memory, genai_memory = (max(run.peak_memory_bytes for run in runs) for runs in (ours, theirs))
    write_result(
        "export_speed",
        {
            "qwen2x": {"seconds": [run.seconds for run in ours], "peak_memory_bytes": memory},
            "onnxruntime-genai": {
                "seconds": [run.seconds for run in theirs],
                "peak_memory_bytes": genai_memory,
            },
            "time_ratio": seconds / genai_seconds,
            "memory_ratio": memory / genai_memory,
        },
    )


if __name__ == "__main__":
    main()
