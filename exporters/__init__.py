"""From a checkpoint to a bundle on disk.

``export`` is imported on first use: a runtime, which reads bundles only, needs no onnx.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2x.exporters.exporter import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    if name == "export":
        from qwen2x.exporters.exporter import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
