"""What differs between ONNX Runtime's providers, as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from onnx import TensorProto

from qwen2x.quantize.errors import BackendError

NUMPY_TYPES: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: bfloat16,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
}
_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """How a graph must be built for one device and float type.

    Attributes:
        float_type: ONNX element type of weights, activations and the KV cache.
        residual_type: element type of the residual stream and the norms. float16 keeps them in
            float32, because Qwen2's residual stream leaves float16's range.
        is_fused: GroupQueryAttention with rotary inside and a cache that may be shared, against
            the standard Attention operator with a cache that is concatenated.
        accuracy_level: MatMulNBits' compute type; 4 is int8 activations, which the CPU needs.
        reads_positions: GroupQueryAttention rotates to position_ids. On CUDA, decoding rotates to
            the number of cached tokens instead (``FlashDecoding`` in onnxruntime's
            ``group_query_attention_impl.cu``), which is no row of stacked tables.
        has_bias_in_matmul: MatMulNBits takes the q/k/v bias itself. CUDA's fast 4-bit kernel
            wants it outside.
    """

    device: str
    dtype: str
    float_type: int
    residual_type: int
    is_fused: bool
    accuracy_level: int
    reads_positions: bool
    has_bias_in_matmul: bool

    @property
    def cache_layout(self) -> str:
        """``shared``: past and present may be one buffer. ``concatenated``: present grows."""
        return "shared" if self.is_fused else "concatenated"

    @property
    def opset(self) -> int:
        """Version of the default operator set: the first with RMSNormalization and Attention."""
        return 23


def _row(device: str, dtype: str, **changes: Any) -> Target:
    element = _DTYPES[dtype]
    values: dict[str, Any] = {
        "float_type": element,
        "residual_type": TensorProto.FLOAT if dtype == "float16" else element,
        "is_fused": True,
        "accuracy_level": 4 if device == "cpu" else 0,
        "reads_positions": device == "cpu",
        "has_bias_in_matmul": device == "cpu",
    }
    return Target(device=device, dtype=dtype, **(values | changes))


# GroupQueryAttention has no float32 kernel on CUDA, hence the standard operators there.
# float16 on the CPU runs through casts and is slower than float32, hence no such row.
TARGETS = (
    _row("cpu", "float32"),
    _row("cuda", "float32", is_fused=False),
    _row("cuda", "float16"),
    _row("cuda", "bfloat16"),
)


def find_target(
    device: str, dtype: str | None, *, is_quantized: bool, has_int8_cache: bool = False
) -> Target:
    """The row for a device and float type; without a type, what the device is best at.

    Raises:
        BackendError: there is no such row.
    """
    if dtype is None:
        dtype = "float32" if device == "cpu" else "bfloat16"
    if device == "cpu" and dtype == "bfloat16":
        dtype = "float32"
    for target in TARGETS:
        if (target.device, target.dtype) == (device, dtype):
            break
    else:
        known = sorted({row.dtype for row in TARGETS if row.device == device})
        raise BackendError(
            f"no ONNX graph for --device {device} --dtype {dtype}; "
            + (f"choose --dtype {' or '.join(known)}" if known else "choose --device cpu or cuda")
        )
    unfit = "--bits" if is_quantized else "--kv-bits" if has_int8_cache else None
    if unfit and not target.is_fused:
        raise BackendError(
            f"{unfit} with --dtype float32 on cuda has no kernel; choose --dtype bfloat16 or "
            "float16"
        )
    return target
