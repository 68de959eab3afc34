"""The most that this machine does: bytes read from memory, and products of 512 rows.

    python -m benchmarks.machine_limits [--threads 2]

Products are one operator alone, in the shapes of a 0.5B model's gate and up projection: float32
MatMul, MatMulNBits with 4 and 8 bits and int8 activations, and DynamicQuantizeMatMul with int8
weights, which is the fastest integer product that ONNX Runtime has on a CPU. A decode step cannot
be faster than reading the weights, a prefill not faster than its products. Products of one row go
through 0.5 GB of such matrices, which no processor's cache holds, in groups of each size, with zero
points and without.
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
from qwen2x.runtimes.huge_pages import collapse
from qwen2x.runtimes.profile import measure_read_bandwidth

ROWS, COLUMNS, OUT, GROUP = 512, 896, 9728, 32
MICROSOFT = "com.microsoft"
# Of a decode step: bytes, and bits, group size and zero points of each kind.
STEP_BYTES = 512 << 20
KINDS = (
    (4, 32, False), (4, 64, False), (4, 128, False), (4, 128, True), (8, 32, False),
    (8, 128, False),
)  # fmt: skip
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
                name: 2 * ROWS * COLUMNS * OUT / seconds([make()], ROWS, args.threads, args.repeat)
                for name, make in products.items()
            },
            "one_row": {
                f"{bits} bits, groups of {size}{', zero points' * has_zeros}": one_row(
                    bits, size, has_zeros, args.threads, args.repeat
                )
                for bits, size, has_zeros in KINDS
            },
        },
    )


def one_row(
    bits: int, group_size: int, has_zeros: bool, threads: int, repeat: int
) -> dict[str, float]:
    """Microseconds of one row through one matrix, and bytes read per second."""
    _, weights = packed_product(bits, group_size, has_zeros)
    size = sum(len(weight.raw_data) for weight in weights)
    graphs = [
        packed_product(bits, group_size, has_zeros, f"{n}.", seed=n)
        for n in range(-(-STEP_BYTES // size))
    ]
    took = seconds(graphs, 1, threads, repeat) / len(graphs)
    return {"us": 1e6 * took, "bytes_per_s": size / took}


def seconds(graphs: list[Graph], rows: int, threads: int, repeat: int) -> float:
    """Of one run through all products; the best of the repeats."""
    outputs = [output for node, _ in graphs for output in node.output]
    model = helper.make_model(
        helper.make_graph(
            [node for node, _ in graphs],
            "products",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, COLUMNS])],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, OUT])
                for name in outputs
            ],
            [weight for _, weights in graphs for weight in weights],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)],
        ir_version=10,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = {"x": np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32)}
    session.run(None, x)
    collapse()
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        session.run(None, x)
        best = min(best, time.perf_counter() - started)
    return best


def float_product() -> Graph:
    """Float32 weights."""
    weights = np.random.default_rng(1).standard_normal((COLUMNS, OUT), np.float32)
    return helper.make_node("MatMul", ["x", "w"], ["y"]), [numpy_helper.from_array(weights, "w")]


def packed_product(
    bits: int,
    group_size: int = GROUP,
    has_zeros: bool = False,
    prefix: str = "",
    *,
    seed: int = 0,
) -> Graph:
    """Codes in groups, activations in int8 (accuracy_level 4)."""
    random = np.random.default_rng(seed)
    groups = COLUMNS // group_size
    constants = {
        "w": random.integers(0, 256, (OUT, groups, group_size * bits // 8), np.uint8),
        "s": random.random((OUT, groups), np.float32),
    }
    if has_zeros:
        constants["z"] = random.integers(0, 256, (OUT, -(-groups * bits // 8)), np.uint8)
    names = [f"{prefix}{name}" for name in constants]
    node = helper.make_node(
        "MatMulNBits", ["x", *names], [f"{prefix}y"], domain=MICROSOFT, K=COLUMNS, N=OUT,
        bits=bits, block_size=group_size, accuracy_level=4,
    )  # fmt: skip
    tensors = zip(constants.values(), names, strict=True)
    return node, [numpy_helper.from_array(values, name) for values, name in tensors]


def dynamic_product() -> Graph:
    """Int8 weights with one scale, activations rounded as they come."""
    random = np.random.default_rng(3)
    weights = random.integers(-127, 128, (COLUMNS, OUT), np.int8)
    constants = {"w": weights, "s": np.float32(0.01), "z": np.int8(0)}
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["y"], domain=MICROSOFT)
    return node, [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]


if __name__ == "__main__":
    main()
