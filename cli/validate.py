"""``qwen2x validate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2x.cli.judge import find_judge
from qwen2x.cli.judging import Judgement, Wish, judge_bundle, read_text, to_json
from qwen2x.cli.machine import peak_memory_bytes
from qwen2x.cli.options import json_option, place_options, reading_options
from qwen2x.cli.output import log, print_columns, print_json, print_table
from qwen2x.cli.reading import text_name

if TYPE_CHECKING:
    from qwen2x.runtimes.validate import Report

_EXAMPLES = """\b
Example: qwen2x validate qwen-int4 --against Qwen/Qwen2.5-0.5B-Instruct
         qwen2x validate qwen-onnx qwen-mlx --against ./Qwen2.5-0.5B-Instruct --layers
         qwen2x validate qwen-mlx --against qwen-onnx
"""


@click.command("validate", epilog=_EXAMPLES)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--against", required=True, help="The checkpoint (folder or hub id), or another bundle."
)
@reading_options
@click.option(
    "--long",
    "is_long",
    is_flag=True,
    help="Also every YaRN factor at far positions, which takes seconds and no long prompt.",
)
@click.option("--layers", is_flag=True, help="Also show where hidden states part, layer by layer.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write one page with plots here, layers among them. Default: none.",
)
@click.option(
    "--revision", help="Branch, tag or commit, when --against is a hub id. Default: main."
)
@place_options
@json_option
def command(
    bundles: tuple[Path, ...],
    against: str,
    text: Path | None,
    html: Path | None,
    layers: bool,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare BUNDLES' logits with those of transformers' own Qwen2 in float32.

    The same tokens go through both. Further checks read a bundle in other ways (step by step, in
    chunks, in a batch, at far positions), which must not matter. Exit 0: pass, 1: fail. The figures
    are also recorded in the bundle, and shown in its README.md. Several bundles, for ONNX and MLX,
    are shown side by side. Another bundle may stand in for PyTorch.
    """
    from qwen2x.exporters.bundle import open_bundle

    if html is not None:
        from qwen2x.cli.page import require_page_possible

        require_page_possible(html, bundles)
    wish = Wish(
        text=read_text(text),
        text_name=text_name(text),
        wants_page=html is not None,
        wants_layers=layers,
        on_step=lambda step: None if as_json else log(f"checking {step}"),
        **options,
    )
    judge = find_judge(against, revision, bundles[0])
    for bundle in bundles[1:]:
        open_bundle(bundle)  # else what was found of those before it would be lost
    judgements = []
    for bundle in bundles:
        if len(bundles) > 1 and not as_json:
            log(f"{bundle}:")
        judgements.append(judge_bundle(bundle, judge, wish))
    if html is not None:
        from qwen2x.cli.validation_page import write_validation_page

        write_validation_page(html, judgements)
    _print(judgements, as_json, layers)
    if any(judgement.report.verdict == "fail" for judgement in judgements):
        click.get_current_context().exit(1)


def _print(judgements: list[Judgement], as_json: bool, layers: bool) -> None:
    peak = {"peak_memory_bytes": peak_memory_bytes()}
    if not as_json:
        if len(judgements) == 1:
            print_report(judgements[0].folder, judgements[0].report)
        else:
            _print_side_by_side(judgements)
        if layers:
            _print_layers(judgements)
    elif len(judgements) == 1:
        print_json(to_json(judgements[0]) | peak)
    else:
        failed = any(judgement.report.verdict == "fail" for judgement in judgements)
        parts = [to_json(judgement) for judgement in judgements]
        print_json({"verdict": "fail" if failed else "pass", "bundles": parts} | peak)


def print_report(bundle: Path, report: Report) -> None:
    """The figures for people."""
    found, facts = report.difference, report.facts
    click.echo(f"{bundle}: {report.verdict} over {found.positions} positions")
    print_table(
        [
            ("KL divergence", f"{found.kl_mean:.3g} mean, {found.kl_p99:.3g} p99, "
                              f"{found.kl_max:.3g} max (nats)"),
            ("same top token", f"{found.top1_agreement:.2%}, top ten {found.top10_overlap:.2%}"),
            ("logits", f"differ by {found.max_abs_diff:.3g} at most, {found.mean_abs_diff:.3g} on "
                       f"average, cosine {found.cosine:.8f}"),
            ("perplexity", f"{found.perplexity:.4f}, {_reference_name(report)} "
                           f"{found.perplexity_reference:.4f}"),
            ("bits per weight", f"{facts['bits_per_weight']:.2f} ({facts['scheme']})"),
            ("behind guesses", "every bit is the same" if facts["guesses_are_exact"]
                               else "rounded otherwise, which matters where two tokens are close"),
        ]
    )  # fmt: skip
    for check in report.checks:
        sign = ">=" if check.is_floor else "<="
        judge = f" (judge: {check.judge})" if check.judge else ""
        line = f"{check.verdict}  {check.name}: {check.value:.4g} {sign} {check.limit:g}{judge}"
        click.echo(f"  {line}")


def _reference_name(report: Report) -> str:
    reference = report.facts["reference"]
    return "PyTorch" if reference["backend"] == "torch" else str(reference["name"])


def _print_side_by_side(judgements: list[Judgement]) -> None:
    """One column per model, the reference first."""
    from qwen2x.runtimes.generate import read_text_files

    reports = [judgement.report for judgement in judgements]
    found = [report.difference for report in reports]
    first = judgements[0]
    rows = [
        ["", _reference_name(first.report), *(str(judgement.folder) for judgement in judgements)],
        ["runs on", "", *(f"{r.facts['backend']} {r.facts['device']}" for r in reports)],
        ["scheme", "", *(f"{r.facts['scheme']} {r.facts['dtype']}" for r in reports)],
        ["verdict", "", *(report.verdict for report in reports)],
        ["KL divergence, mean", "", *(f"{item.kl_mean:.3g}" for item in found)],
        ["KL divergence, p99", "", *(f"{item.kl_p99:.3g}" for item in found)],
        ["same top token", "", *(f"{item.top1_agreement:.2%}" for item in found)],
        ["largest difference", "", *(f"{item.max_abs_diff:.3g}" for item in found)],
        ["perplexity", f"{found[0].perplexity_reference:.4f}",
         *(f"{item.perplexity:.4f}" for item in found)],
        ["bits per weight", "", *(f"{r.facts['bits_per_weight']:.2f}" for r in reports)],
    ]  # fmt: skip
    tokenizer = read_text_files(first.folder).tokenizer
    columns = [first.reference_next_tokens, *(judgement.next_tokens for judgement in judgements)]
    for place, row in enumerate(zip(*columns, strict=True), 1):
        texts = [f"{tokenizer.decode([token])!r} {logit:.4f}" for token, logit in row]
        rows.append([f"next token, {place}", *texts])
    print_columns(rows)
    for judgement in judgements:
        for check in judgement.report.checks:
            if check.verdict == "fail":
                click.echo(
                    f"  fail  {judgement.folder}: {check.name} is {check.value:.4g}, "
                    f"limit {check.limit:g}"
                )


def _print_layers(judgements: list[Judgement]) -> None:
    """Relative errors of the residual stream, one column per bundle."""
    from qwen2x.runtimes.layers import first_beyond

    click.echo("relative error of hidden states, mean over positions:")
    rows = [["", *(str(judgement.folder) for judgement in judgements)]]
    for parts in zip(*(judgement.layers for judgement in judgements), strict=True):
        rows.append([parts[0].layer, *(f"{part.relative_error:.2e}" for part in parts)])
    print_columns(rows)
    for judgement in judgements:
        limit = judgement.report.tolerance.layer_error
        beyond = first_beyond(judgement.layers, limit)
        where = f"first beyond {limit:g} is {beyond.layer}" if beyond else f"all within {limit:g}"
        click.echo(f"  {judgement.folder}: {where}")
