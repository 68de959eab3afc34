"""The matrices of a GPTQ or AWQ checkpoint as they are: its codes, scales and zero points.

Stored matrices are [inputs, outputs], so rows of ours are columns of theirs. A chunk of rows reads
its columns out of the mapped file, whose pages for one matrix at a time stay in memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.stored_quantization import StoredQuantization
from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import Codes, Float, QuantizedMatrix
from qwen2x.quantize.packed_words import AWQ_ORDER, unpack_awq, unpack_inputs, unpack_outputs
from qwen2x.quantize.plan import unit_of
from qwen2x.quantize.scheme import Scheme

Order = NDArray[np.int32]
SCALE_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class PackedMatrices:
    """What an export needs of a quantized checkpoint; reading rows is thread-safe.

    Attributes:
        orders: the inputs of a module in the order of its groups, where that is not their own.

    Raises:
        CheckpointError: orders, zero points or biases that cannot be carried over.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: StoredQuantization) -> None:
        self._checkpoint = checkpoint
        self._quantization = quantization
        self._shapes = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in checkpoint.config.expected_tensors().items()
            if name not in checkpoint.tensors
        }
        self._require_no_bias()
        orders = {module: self._read_order(module) for module in self._shapes}
        self.orders: Mapping[str, Order] = {
            module: order for module, order in orders.items() if order is not None
        }

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of the float model is stored as codes."""
        return name.removesuffix(".weight") in self._shapes

    def schemes(self) -> dict[str, Scheme]:
        """By unit. It is symmetric where all zero points of all its modules are in the middle."""
        types = {
            SCALE_TYPES[self._checkpoint.tensors[f"{module}.scales"].dtype]
            for module in self._shapes
        }
        if len(types) != 1:
            raise CheckpointError(
                f"expected scales of one type, got {' and '.join(sorted(types))}; "
                "give the float checkpoint"
            )
        (scale_type,) = types
        symmetric: dict[str, bool] = {}
        for module in self._shapes:
            unit = unit_of(module)
            symmetric[unit] = symmetric.get(unit, True) and self._is_symmetric(module)
        columns = {unit_of(module): shape[1] for module, shape in self._shapes.items()}
        return {
            unit: self._quantization.scheme(columns[unit], scale_type, is_symmetric=is_symmetric)
            for unit, is_symmetric in symmetric.items()
        }

    def rows(self, name: str, start: int, stop: int, scheme: Scheme) -> QuantizedMatrix:
        """Rows ``start:stop`` of a matrix, columns in the order of their groups.

        Raises:
            CheckpointError: scales that are not finite, zero points that are no codes.
        """
        module = name.removesuffix(".weight")
        codes = self._codes(module, start, stop)
        if module in self.orders:
            codes = codes[:, self.orders[module]]
        scales = self._scales(module, start, stop)
        groups = codes.shape[1] // scheme.group_size
        repeats = groups // scales.shape[1]
        zero_points = None
        if not scheme.is_symmetric:
            zero_points = np.repeat(self._zero_points(module, start, stop), repeats, axis=1)
        return QuantizedMatrix(
            codes=codes,
            scales=np.repeat(scales, repeats, axis=1),
            scheme=scheme,
            zero_points=zero_points,
        )

    def _codes(self, module: str, start: int, stop: int) -> Codes:
        if self._quantization.method == "awq":
            return self._along_outputs(f"{module}.qweight", start, stop)
        words = self._checkpoint.columns(f"{module}.qweight", start, stop)
        return unpack_inputs(words, self._quantization.bits)

    def _scales(self, module: str, start: int, stop: int) -> Float:
        """Float32 [rows, stored groups]."""
        stored = self._checkpoint.columns(f"{module}.scales", start, stop)
        scales = np.ascontiguousarray(stored.T).astype(np.float32)
        if not np.isfinite(scales).all():
            raise CheckpointError(
                f"{module}.scales holds NaN or infinity (columns {start}..{stop - 1}); "
                "expected finite scales: fetch the checkpoint again"
            )
        return scales

    def _zero_points(self, module: str, start: int, stop: int) -> Codes:
        """Uint8 [rows, stored groups]."""
        stored = self._along_outputs(f"{module}.qzeros", start, stop)
        highest = int(stored.max()) + self._quantization.zero_offset
        largest_code = (1 << self._quantization.bits) - 1
        if highest > largest_code:
            raise CheckpointError(
                f"{module}.qzeros holds the zero point {highest}, expected 0..{largest_code}: "
                "programs disagree on what it means; give the float checkpoint"
            )
        return stored + np.uint8(self._quantization.zero_offset)

    def _along_outputs(self, name: str, start: int, stop: int) -> Codes:
        """Codes [rows, n] of a tensor packed along its outputs, of which words may have others."""
        bits = self._quantization.bits
        per_word = len(AWQ_ORDER) if bits == 4 else 4
        first = start // per_word
        words = self._checkpoint.columns(name, first, -(-stop // per_word))
        is_awq = self._quantization.method == "awq"
        codes = unpack_awq(words) if is_awq else unpack_outputs(words, bits)
        return codes[start - first * per_word : stop - first * per_word]

    def _is_symmetric(self, module: str) -> bool:
        zero_points = self._zero_points(module, 0, self._shapes[module][0])
        return bool((zero_points == 1 << (self._quantization.bits - 1)).all())

    def _read_order(self, module: str) -> Order | None:
        """None where groups are of neighbouring inputs."""
        name = f"{module}.g_idx"
        if name not in self._checkpoint.tensors:
            return None
        group_of = self._checkpoint.columns(name)
        groups = self._checkpoint.tensors[f"{module}.scales"].shape[0]
        size = len(group_of) // groups
        order = np.argsort(group_of, kind="stable").astype(np.int32)
        if not np.array_equal(group_of[order], np.arange(len(group_of)) // size):
            raise CheckpointError(
                f"{name} does not give each of {groups} groups {size} inputs; expected groups of "
                "one size: give the float checkpoint"
            )
        return None if np.array_equal(order, np.arange(len(order))) else order

    def _require_no_bias(self) -> None:
        """AutoGPTQ stores a bias for every module; where Qwen2 has none it must be zero."""
        expected = self._checkpoint.config.expected_tensors()
        surplus = [
            name
            for module in self._shapes
            if (name := f"{module}.bias") in self._checkpoint.tensors and name not in expected
        ]
        wrong = [name for name in surplus if self._checkpoint.columns(name).any()]
        if wrong:
            raise CheckpointError(
                f"Qwen2 has no {wrong[0].rsplit('.', 2)[-2]} bias, but {len(wrong)} such tensors "
                f"are not zero, {wrong[0]} first; give the float checkpoint"
            )
