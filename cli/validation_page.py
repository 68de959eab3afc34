"""The page of ``validate``: figures, plots, layers, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen2x.cli.figures import figures_of
from qwen2x.cli.judging import Judgement
from qwen2x.cli.page import Page, Shown, write_page


def write_validation_page(path: Path, judgements: Sequence[Judgement]) -> None:
    """Writes the page of bundles that were judged on one text by one judge."""
    facts = judgements[0].report.facts
    page = Page(
        shown=[_shown(judgement) for judgement in judgements],
        against=facts["reference"]["name"],
        backend=facts["reference"]["backend"],
        text=facts["text"],
    )
    write_page(path, page)


def _shown(judgement: Judgement) -> Shown:
    report = judgement.report
    return Shown(
        bundle=judgement.bundle,
        figures=figures_of(judgement.bundle, report.to_json()),
        kl=report.difference.kl,
        worst=judgement.worst,
        layers=judgement.layers,
        layer_limit=report.tolerance.layer_error,
        checks=report.checks,
        verdict=report.verdict,
    )
