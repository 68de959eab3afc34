"""The backends' modules, imported when one is opened; what is missing is told with its extra."""

from __future__ import annotations

import importlib
import platform
import sys
from typing import Any

from qwen2x.quantize.errors import BackendError

# By backend: its module, the libraries that may be missing, and the extra that has them.
_BACKENDS = {
    "onnx": ("qwen2x.runtimes.onnx_device", ("onnxruntime",), "cpu"),
    "mlx": ("qwen2x.runtimes.mlx_runtime", ("mlx", "libmlx"), "mlx"),
    "torch": ("qwen2x.runtimes.torch_runtime", ("torch", "transformers"), "torch"),
}


def import_backend(backend: str) -> Any:
    """The module of ``onnx``, ``mlx`` or ``torch``.

    Raises:
        BackendError: its library is not installed.
    """
    module, libraries, extra = _BACKENDS[backend]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # MLX without its core fails as a shared library that is not found, which has no name.
        missing = (error.name or str(error)).split(".")[0]
        if missing not in libraries:
            raise
        raise BackendError(
            f"{missing} is not installed; expected by this backend: "
            f'pip install "qwen2x[{extra}]"{_where(backend)}'
        ) from None


def _where(backend: str) -> str:
    """What else to know of an extra on this platform."""
    if backend != "mlx":
        return ""
    if sys.platform == "linux":
        return ', or for an NVIDIA GPU "mlx[cuda13]"'
    if sys.platform == "darwin":
        return "" if platform.machine() == "arm64" else " on a Mac with Apple silicon"
    return " on macOS or Linux; here, export with --to onnx"
