"""How ONNX Runtime is set up for each device, as rows of a table."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qwen2x.exporters.bundle import Bundle
from qwen2x.exporters.onnx_probe import LARGEST_CODE, LARGEST_WEIGHT, largest_sums
from qwen2x.quantize.errors import BackendError


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One device of ONNX Runtime.

    Attributes:
        name: the execution provider's.
        options: of the provider.
        session: entries of the session's configuration, by ``onnxruntime_session_options_config_
            keys.h`` and, for ``ep.cuda``, ``matmul_nbits.h`` of onnxruntime 1.31.
        graph_options: of the provider, where a decode step shall be captured as a CUDA graph.
        has_own_memory: arrays are copied to the device and back.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    graph_options: Mapping[str, str] = field(default_factory=dict)
    has_own_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a session is opened.

    Attributes:
        device: a key of ``PROVIDERS``.
        threads: within an operator; by default one per physical core.
        record: a folder for what the session's profiler writes.
        is_captured: runs may be captured as graphs, where the device has such.
    """

    device: str
    threads: int | None = None
    record: Path | None = None
    is_captured: bool = False


PROVIDERS = {
    "cpu": Provider(
        name="CPUExecutionProvider",
        session={"session.prepack.enable_parallel": "1"},
    ),
    "cuda": Provider(
        name="CUDAExecutionProvider",
        # float32 means float32, and an arena that doubles would take twice a model's memory.
        options={"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
        # The fpA_intB kernel (``ep.cuda.fpa_intb_gemm``) stays off: it was slower on an H200, see
        # docs/performance.md. ORT_FPA_INTB_GEMM=1 turns it on; a bias in the node would forbid it.
        session={
            "optimization.disable_specified_optimizers": "MatMulNBitsFusion",
            "session.use_device_allocator_for_initializers": "1",
        },
        graph_options={"enable_cuda_graph": "1"},
        has_own_memory=True,
    ),
}


def available_devices() -> list[str]:
    """Devices that this onnxruntime was built for."""
    providers = ort.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider.name in providers]


def choose_device(bundle: Bundle, device: str) -> str:
    """The device that a bundle is run on; ``auto`` is what it was made for, if that is here.

    Raises:
        BackendError: it is not here, or the bundle is not for it.
    """
    if device == "auto":
        device = bundle.device if bundle.device in available_devices() else "cpu"
    if device not in PROVIDERS:
        raise BackendError(f"device must be auto, cpu or cuda, got {device!r}")
    if device not in available_devices():
        raise BackendError(
            f"onnxruntime {ort.__version__} has no {PROVIDERS[device].name} here; "
            f'pip install "qwen2x[{device}]" (and uninstall the other onnxruntime first)'
        )
    if device == "cuda" and bundle.device == "cpu":
        raise BackendError(
            f"{bundle.folder} is made for the CPU; export it again with --device cuda"
        )
    if bundle.dtype == "bfloat16" and device == "cpu":
        raise BackendError(
            f"{bundle.folder} is a bfloat16 bundle for cuda, which is not here; "
            "export it again with --device cpu"
        )
    return device


@functools.cache
def sums_are_exact() -> bool:
    """Whether this processor adds products of codes of 8 bits without loss.

    On x86 without VNNI, two products are added in 16 bits, where those of large codes do not fit
    (onnxruntime's MatMulInteger of unsigned and signed codes); then a prompt is better read by the
    graph that decodes.
    """
    rows, columns = 32, 64
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        largest_sums(rows, columns), options, providers=["CPUExecutionProvider"]
    )
    codes = np.full((rows, columns), LARGEST_CODE, np.uint8)
    sums: Any = session.run(None, {"codes": codes})[0]
    return bool((sums == LARGEST_CODE * LARGEST_WEIGHT * columns).all())
