"""What ``validate`` found, written into the bundle: its manifest, and its model card."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from qwen2x.cli.output import finite, log

if TYPE_CHECKING:
    from qwen2x.exporters.bundle import Bundle
    from qwen2x.runtimes.validate import Report


def record(bundle: Bundle, report: Report) -> None:
    """Writes the figures, if the bundle may be written to; what export estimated stays beside."""
    from qwen2x.exporters.bundle import write_manifest
    from qwen2x.exporters.model_card import update_card
    from qwen2x.exporters.options import version

    quality = {key: value for key, value in report.to_json().items() if key != "tolerance"}
    quality["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    quality["qwen2x"] = version()
    if "estimate" in bundle.manifest["quality"]:
        quality["estimate"] = bundle.manifest["quality"]["estimate"]
    manifest = {**bundle.manifest, "quality": finite(quality)}
    try:
        write_manifest(bundle.folder, manifest)
        update_card(bundle.folder, manifest)
    except OSError as error:
        log(f"the figures were not recorded in {bundle.folder}: {error.strerror}")
