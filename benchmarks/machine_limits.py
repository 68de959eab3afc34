"""The most that this machine does: bytes read from memory, and products of 512 rows.

    python -m benchmarks.machine_limits [--threads 2]

Products are one operator alone, in the shapes of a 0.5B model's gate and up projection: float32
MatMul, MatMulNBits with 4 and 8 bits and int8 activations, and DynamicQuantizeMatMul with int8
weights, which is the fastest integer product that ONNX Runtime has on a CPU. A decode step cannot
be faster than reading the weights, a prefill not faster than its products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.measure import write_result
from qwen2x.runtimes.profile import measure_read_bandwidth

ROWS, COLUMNS, OUT, GROUP = 512, 896, 9728, 32
MICROSOFT = "com.microsoft"
Graph = tuple[Any, list[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    products: dict[str, Callable[[], Graph]] = {
        "float32 MatMul": float_product,
        "MatMulNBits, 4 bits": lambda: packed_product(4),
        "MatMulNBits, 8 bits": lambda: packed_product(8),
        "DynamicQuantizeMatMul, int8": dynamic_product,
    }
    write_result(
        "machine_limits",
        {
            "threads": args.threads,
            "read_bytes_per_s": {
                str(count): measure_read_bandwidth(count) for count in range(1, args.threads + 1)
            },
            "rows": ROWS,
            "operations_per_s": {
                name: speed(make(), args.threads, args.repeat) for name, make in products.items()
            },
        },
    )


def speed(graph: Graph, threads: int, repeat: int) -> float:
    """Multiplications and additions per second; the best of the repeats."""
    node, weights = graph
    model = helper.make_model(
        helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, COLUMNS])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, OUT])],
            weights,
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = {"x": np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)}
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        session.run(None, x)
        best = min(best, time.perf_counter() - started)
    return 2 * ROWS * COLUMNS * OUT / best


def float_product() -> Graph:
    """Float32 weights."""
    weights = np.random.default_rng(1).standard_normal((COLUMNS, OUT), np.float32)
    return helper.make_node("MatMul", ["x", "w"], ["y"]), [numpy_helper.from_array(weights, "w")]


def packed_product(bits: int) -> Graph:
    """Codes in groups of 32, activations in int8 (accuracy_level 4)."""
    random = np.random.default_rng(bits)
    groups = COLUMNS // GROUP
    codes = random.integers(0, 256, (OUT, groups, GROUP * bits // 8), np.uint8)
    scales = random.random((OUT, groups), np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, K=COLUMNS, N=OUT, bits=bits,
        block_size=GROUP, accuracy_level=4,
    )  # fmt: skip
    return node, [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")]


def dynamic_product() -> Graph:
    """Int8 weights with one scale, activations rounded as they come."""
    random = np.random.default_rng(3)
    weights = random.integers(-127, 128, (COLUMNS, OUT), np.int8)
    constants = {"w": weights, "s": np.float32(0.01), "z": np.int8(0)}
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["y"], domain=MICROSOFT)
    return node, [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]


if __name__ == "__main__":
    main()
