"""Where what is dear to make is kept for the next time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``QWEN2X_CACHE``, else ``qwen2x`` in the user's cache folder."""
    if named := os.environ.get("QWEN2X_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen2x"
