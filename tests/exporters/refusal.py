"""An export that must be refused: one line that helps, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import InputError


def refused_export(source: Path, out: Path, **options: Any) -> str:
    """The message of a failing export.

    ``out`` must lie in a folder of its own that does not exist yet; that folder must be gone
    again, so that neither a bundle nor a partial folder nor a lock was left.
    """
    assert not out.parent.exists(), "give an out whose parent the export has to make"
    before = listing(source)
    with pytest.raises(InputError) as caught:
        export(source, out=out, **options)
    assert not out.parent.exists(), f"left behind: {sorted(out.parent.rglob('*'))}"
    assert listing(source) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of what lies in a folder."""
    return {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.exists()
    }
