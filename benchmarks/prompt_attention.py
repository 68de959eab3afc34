"""Attention of a piece of a prompt, by the positions before it: in tiles, and all scores at once.

    python -m benchmarks.prompt_attention [--threads 2] [--rounds 9]

GroupQueryAttention alone, in the shape of a 0.5B model's layer, appends pieces of 256 tokens to a
shared cache. Both ways take turns in one process; medians. ``exporters/onnx_short_attention.py``
chooses between them.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from benchmarks.measure import write_result
from qwen2x.exporters.onnx_builder import MICROSOFT, GraphBuilder
from qwen2x.exporters.onnx_short_attention import LONGEST

ROWS, HEADS, KEY_HEADS, SIZE = 256, 14, 2, 64
# Before the piece.
PASTS = (0, 256, 512, 768, 1024, LONGEST - ROWS, 1792, 2816, 3840, 7936)
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32
SINK = {"tiles": (), "whole": ("", "", "sink")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    by_positions = {past + ROWS: measure(past, args.threads, args.rounds) for past in PASTS}
    write_result(
        "prompt_attention",
        {"threads": args.threads, "rows": ROWS, "longest": LONGEST, "by_positions": by_positions},
    )


def measure(past: int, threads: int, rounds: int) -> dict[str, float]:
    """Seconds of both ways, and the largest difference between what they give."""
    capacity = past + ROWS + 128
    runs = {way: Run(way, past, capacity, threads) for way in SINK}
    taken: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            taken[way].append(run.seconds())
    tiles, whole = (run.output() for run in runs.values())
    return {f"{way}_s": median(seconds) for way, seconds in taken.items()} | {
        "ratio": median(taken["tiles"]) / median(taken["whole"]),
        "max_abs_diff": float(np.abs(tiles - whole).max()),
    }


class Run:
    """One operator with its cache."""

    def __init__(self, way: str, past: int, capacity: int, threads: int) -> None:
        random = np.random.default_rng(past)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # The other way's threads must not wait for work on the same cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = ort.InferenceSession(
            _graph(way, capacity), options, providers=["CPUExecutionProvider"]
        )
        self._binding: Any = self._session.io_binding()
        inputs = {
            "packed": random.standard_normal((1, ROWS, (HEADS + 2 * KEY_HEADS) * SIZE), np.float32),
            "last": np.array([past + ROWS - 1], np.int32),
            "total": np.array(past + ROWS, np.int32),
        }
        for name, value in inputs.items():
            self._binding.bind_cpu_input(name, value)
        self._binding.bind_output("attended", "cpu")
        for part in ("key", "value"):
            rows = random.standard_normal((1, KEY_HEADS, capacity, SIZE), np.float32)
            buffer = ort.OrtValue.ortvalue_from_numpy(rows)
            self._binding.bind_ortvalue_input(f"past_{part}", buffer)
            self._binding.bind_ortvalue_output(f"present_{part}", buffer)

    def seconds(self) -> float:
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - started

    def output(self) -> Any:
        return self._binding.copy_outputs_to_cpu()[0]


def _graph(way: str, capacity: int) -> bytes:
    graph, cache = GraphBuilder(), (1, KEY_HEADS, capacity, SIZE)
    graph.input("packed", FLOAT, (1, ROWS, (HEADS + 2 * KEY_HEADS) * SIZE))
    for part in ("key", "value"):
        graph.input(f"past_{part}", FLOAT, cache)
        graph.output(f"present_{part}", FLOAT, cache)
    graph.input("last", INT32, (1,))
    graph.input("total", INT32, ())
    graph.output("attended", FLOAT, (1, ROWS, HEADS * SIZE))
    angles = np.outer(np.arange(capacity), 1e6 ** -np.linspace(0, 1, SIZE // 2)).astype(np.float32)
    tables = [graph.constant("cos", np.cos(angles)), graph.constant("sin", np.sin(angles))]
    if SINK[way]:
        graph.constant("sink", np.full(HEADS, -1e30, np.float32))
    graph.node(
        "GroupQueryAttention",
        ["packed", "", "", "past_key", "past_value", "last", "total", *tables, *SINK[way]],
        ["attended", "present_key", "present_value"],
        domain=MICROSOFT,
        num_heads=HEADS,
        kv_num_heads=KEY_HEADS,
        scale=SIZE**-0.5,
        do_rotary=1,
    )
    return bytes(graph.model(opset=21, description=way).SerializeToString())


if __name__ == "__main__":
    main()
