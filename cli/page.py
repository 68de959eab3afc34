"""One self-contained HTML page about one or several bundles: plots, figures, and words."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from qwen2x.cli.figures import Figures, recorded_beside, smaller_and_closer
from qwen2x.cli.output import figure_text, size_text
from qwen2x.cli.page_style import STYLE
from qwen2x.cli.page_template import TEMPLATE
from qwen2x.cli.plots import (
    kl_along_positions,
    kl_histogram,
    kl_range,
    layer_errors,
    percentile,
    size_against_kl,
    smoothing_span,
)
from qwen2x.cli.reading import WorstPlace
from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.exporters.bundle import Bundle
    from qwen2x.runtimes.layers import LayerDifference
    from qwen2x.runtimes.validate import Check

_PLACES, _PLACES_OF_SEVERAL = 8, 4


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One bundle on a page; what was not measured is empty, and left out."""

    bundle: Bundle
    figures: Figures
    kl: Sequence[float] = ()
    worst: Sequence[WorstPlace] = ()
    layers: Sequence[LayerDifference] = ()
    layer_limit: float = 0.0
    checks: Sequence[Check] = ()
    verdict: str | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is shown, against what (its name, and the backend that ran it), on which text."""

    shown: Sequence[Shown]
    against: str
    backend: str
    text: Mapping[str, Any]

    @property
    def source(self) -> str:
        """Of a folder its own name; a hub id whole."""
        folder = Path(self.against)
        return folder.absolute().name if folder.is_dir() else self.against

    @property
    def judge(self) -> str:
        """In short, for people."""
        return "PyTorch" if self.backend == "torch" else self.source


def require_page_possible(path: Path, bundles: Sequence[Path]) -> None:
    """Refuses, before minutes of work, a place where no page can be written.

    Raises:
        RequestError: no such folder, no permission, or a place within one of the bundles.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise RequestError(f"--html {path} lies in no folder; make it first: mkdir {path.parent}")
    if path.is_dir():
        raise RequestError(
            f"--html {path} cannot be written: it is a folder; name a file: {path / 'page.html'}"
        )
    if not os.access(folder, os.W_OK):
        raise RequestError(
            f"--html {path} cannot be written: no permission in {folder}; choose another folder"
        )
    if folder.resolve() in {bundle.resolve() for bundle in bundles}:
        raise RequestError(
            f"--html {path} lies in a bundle, whose files are its own; choose another folder"
        )


def write_page(path: Path, page: Page) -> None:
    """Writes it in one step.

    Raises:
        RequestError: the disk refuses.
    """
    from qwen2x.exporters.bundle import write_file

    content = render(page).encode("utf-8", errors="replace")
    try:
        write_file(path, content)
    except OSError as error:
        raise RequestError(f"--html {path} cannot be written: {error.strerror}") from None


def render(page: Page) -> str:
    """The page's HTML."""
    own = [shown.figures for shown in page.shown]
    beside = recorded_beside([shown.bundle for shown in page.shown], page.text)
    variants = sorted([*own, *beside], key=lambda one: (one.bytes, one.distance))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": figure_text, "size": size_text, "visible": visible}
    environment.filters["percent"] = _percent
    all_kl = [value for shown in page.shown for value in shown.kl]
    return environment.from_string(TEMPLATE).render(
        style=STYLE,
        page=page,
        judge=page.judge,
        most_places=_PLACES if len(page.shown) == 1 else _PLACES_OF_SEVERAL,
        title=_title(page),
        parts=[_part(index, shown, all_kl) for index, shown in enumerate(page.shown)],
        variants=[(one, one in own, smaller_and_closer(one, variants)) for one in variants],
        sizes=size_against_kl("sizes", own, beside) if len(variants) > 1 else None,
    )


def visible(text: str) -> str:
    """A token's text with its line ends and tabs as signs."""
    signs = text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
    return signs or "(no text)"


def _title(page: Page) -> str:
    if len(page.shown) > 1:
        return f"{len(page.shown)} bundles against {page.source}"
    return f"{page.shown[0].figures.folder.name} against {page.source}"


def _part(index: int, shown: Shown, all_kl: Sequence[float]) -> dict[str, Any]:
    """What the template shows of one bundle."""
    part: dict[str, Any] = {"shown": shown, "name": shown.figures.folder.name}
    if shown.kl:
        reach = kl_range(shown.kl, all_kl)
        part |= {
            "along": kl_along_positions(f"along{index}", shown.kl, reach),
            "histogram": kl_histogram(f"histogram{index}", shown.kl, reach),
            "p99": percentile(shown.kl, 0.99),
            "span": smoothing_span(len(shown.kl)),
        }
    if shown.layers:
        part["layers"] = layer_errors(f"layers{index}", shown.layers, shown.layer_limit)
    return part


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "not finite"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
