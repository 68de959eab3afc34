"""What a CUDA device has room for, and what is said when it is full."""

from __future__ import annotations

import ctypes
import re

from qwen2x.exporters.bundle import Bundle
from qwen2x.quantize.errors import BackendError

_FULL = re.compile(
    r"out of memory|Failed to allocate memory|bfc_arena|cudaErrorMemoryAllocation"
    r"|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_GB = 1e9
# Bits per weight of what may be exported instead, scales and float norms included, widest first.
_CHOICES = (("--bits 8", 8.5), ("--bits 4", 4.5))
# What kernels need beside weights and cache.
_WORKSPACE = 0.5 * _GB


def is_out_of_memory(reason: str) -> bool:
    """Whether an error's text says that the device is full."""
    return _FULL.search(reason) is not None


def out_of_memory(bundle: Bundle, free: int | None = None) -> BackendError:
    """The error for a device that is full: what was needed, what is there, what would fit.

    Args:
        bundle: what was opened or run.
        free: bytes that are free on the device; asked of the driver by default.
    """
    if free is None:
        free = free_bytes()
    weights = f"the weights take {bundle.weight_bytes / _GB:.2f} GB"
    cache = f"every 1,000 positions of cache {1000 * _position_bytes(bundle) / _GB:.2f} GB"
    there = "" if free is None else f", {free / _GB:.2f} GB were free"
    return BackendError(
        f"out of device memory with {bundle.folder}: {weights}, {cache}{there}; "
        f"{_what_fits(bundle, free)}"
    )


def _what_fits(bundle: Bundle, free: int | None) -> str:
    parameters = 8 * bundle.weight_bytes / bundle.bits_per_weight
    for option, bits in _CHOICES:
        needed = parameters * bits / 8 + _WORKSPACE
        if bits < bundle.bits_per_weight - 0.5 and (free is None or needed <= free):
            return (
                f"export it again with {option} (about {needed / _GB:.2f} GB), or shorten the text"
            )
    return "close what else uses the device, shorten the text, or use --device cpu"


def _position_bytes(bundle: Bundle) -> int:
    """Bytes of one position's keys and values in all layers."""
    cache = bundle.cache
    item = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[cache["dtype"]]
    values: int = 2 * cache["layers"] * cache["num_key_value_heads"] * cache["head_dim"] * item
    return values


def free_bytes() -> int | None:
    """Free memory of the first CUDA device, None where no driver tells."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    context = ctypes.c_void_p()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        results = (
            driver.cuInit(0),
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
            driver.cuCtxSetCurrent(context),
            driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
        )
    except (OSError, AttributeError):
        return None
    return None if any(results) else free.value
