"""The page of ``compare``: the same without layers and checks."""

from __future__ import annotations

from pathlib import Path

from qwen2x.cli.comparing import Comparison
from qwen2x.cli.page import Page, Shown, write_page


def write_comparison_page(path: Path, found: Comparison) -> None:
    """Writes the page; of recorded figures it has the table and size against KL alone."""
    shown = [
        Shown(
            bundle=compared.bundle,
            figures=compared.figures,
            kl=compared.kl,
            worst=compared.worst,
        )
        for compared in found.bundles
    ]
    write_page(
        path,
        Page(shown=shown, against=found.reference, backend=found.backend, text=found.text),
    )
