"""``export``: a checkpoint folder or hub id to a bundle, whatever the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2x.exporters.hub import resolve_source, source_id
from qwen2x.exporters.onnx_export import Options, export_onnx
from qwen2x.exporters.onnx_writer import Progress
from qwen2x.exporters.staging import require_absent
from qwen2x.quantize.errors import BackendError


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written: the folder and its manifest."""

    bundle: Path
    manifest: dict[str, Any]


def export(
    source: str | Path,
    target: str = "onnx",
    *,
    out: str | Path,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    source_name: str | None = None,
    **options: Any,
) -> Export:
    """Exports a Qwen2 checkpoint.

    Args:
        source: a Hugging Face folder or a hub id.
        target: ``onnx``.
        out: the bundle's folder; it appears when all of it is on disk.
        revision: branch, tag or commit of a hub id.
        force: replace an existing folder.
        progress: called with bytes written and bytes in all.
        source_name: what the manifest calls the source, if not its id or folder name.
        **options: the fields of ``Options``: bits, group_size, method, dtype, device, max_context.

    Raises:
        InputError: a source, option or folder that does not fit; nothing is left behind.
    """
    if target != "onnx":
        raise BackendError(f"target must be 'onnx', got {target!r}")
    # Before anything is fetched, since that may take hours.
    require_absent(Path(out).absolute(), force)
    folder = resolve_source(source, revision=revision)
    manifest = export_onnx(
        folder,
        Path(out),
        Options(**options),
        source_id=source_name or source_id(source),
        force=force,
        progress=progress or (lambda done, total: None),
    )
    return Export(bundle=Path(out), manifest=manifest)
