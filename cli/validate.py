"""``qwen2x validate``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import click

from qwen2x.cli.machine import peak_memory_bytes
from qwen2x.cli.options import json_option, open_source, place_options
from qwen2x.cli.output import finite, log, print_json, print_table
from qwen2x.quantize.errors import RequestError

BUILT_IN_TEXT = "validation_text.txt"


@click.command(
    "validate",
    epilog="\b\nExample: qwen2x validate qwen-int4 --against Qwen/Qwen2.5-0.5B-Instruct",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", required=True, help="The checkpoint it was made of: folder or hub id.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="The text to read. Default: a built-in mix."
)
@click.option("--tokens", type=int, default=1024, show_default=True, help="How many to compare.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens read at once.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="Also write one page here. Default: none."
)
@click.option(
    "--revision", help="Branch, tag or commit, when --against is a hub id. Default: main."
)
@place_options
@json_option
def command(
    bundle: Path,
    against: str,
    text: Path | None,
    html: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare BUNDLE's logits with those of transformers' own Qwen2 in float32.

    The same tokens go through both. Further checks read the bundle in other ways (step by step, in
    chunks, in a batch, at far positions), which must not matter. Exit 0: pass, 1: fail. The figures
    are also recorded in the bundle.
    """
    if html is not None and not html.absolute().parent.is_dir():
        raise RequestError(f"--html {html} lies in no folder; make it first: mkdir {html.parent}")
    report = run_validation(bundle, against, read_text(text), quiet=as_json, **options)
    if html is not None:
        _write_page(html, bundle, against, report)
    result = report.to_json() | {"peak_memory_bytes": peak_memory_bytes()}
    if as_json:
        print_json(result)
    else:
        print_report(bundle, report)
    if report.verdict == "fail":
        click.get_current_context().exit(1)


def run_validation(
    folder: Path,
    against: str,
    text: str,
    *,
    tokens: int = 1024,
    window: int = 512,
    revision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = False,
) -> Any:
    """Validates a bundle and records the figures in its manifest; gives the Report."""
    from qwen2x.exporters.bundle import changed_source_files, open_bundle
    from qwen2x.runtimes.generate import read_text_files
    from qwen2x.runtimes.runtime import open_runtime
    from qwen2x.runtimes.tolerance import tolerance_for
    from qwen2x.runtimes.validate import Check, validate

    opened = open_bundle(folder)
    source = open_source(against, revision)
    changed = changed_source_files(opened, source)
    if changed:
        log(
            f"{against} is not the checkpoint that {folder} was made of "
            f"({opened.manifest['source']['id']}): {', '.join(changed[:3])} differ"
        )
    token_ids = read_text_files(source).tokenizer.encode(text)
    with (
        open_runtime(folder, device=device, threads=threads) as candidate,
        open_runtime(source, backend="torch", device="cpu", threads=threads) as reference,
    ):
        _require_same_shape(opened, candidate, reference, against)
        report = validate(
            candidate,
            reference,
            token_ids,
            tolerance=tolerance_for(opened.scheme, opened.dtype),
            tokens=tokens,
            window=window,
            on_step=lambda step: None if quiet else log(f"checking {step}"),
        )
    report.facts["scheme"] = opened.scheme
    report.checks.append(
        Check(name="source_is_the_same", value=float(not changed), limit=1, is_floor=True)
    )
    # Figures against another checkpoint say nothing of the bundle, and do not replace its own.
    if not changed:
        _record(opened, report)
    return report


def read_text(path: Path | None) -> str:
    """The user's text, or the built-in one."""
    if path is None:
        built_in = resources.files("qwen2x.runtimes") / BUILT_IN_TEXT
        return built_in.read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--text {path} cannot be read as UTF-8 text: {error}") from None


def print_report(bundle: Path, report: Any) -> None:
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
            ("perplexity", f"{found.perplexity:.4f}, PyTorch {found.perplexity_reference:.4f}"),
            ("bits per weight", f"{facts['bits_per_weight']:.2f} ({facts['scheme']})"),
        ]
    )  # fmt: skip
    for check in report.checks:
        sign = ">=" if check.is_floor else "<="
        judge = f" (judge: {check.judge})" if check.judge else ""
        line = f"{check.verdict}  {check.name}: {check.value:.4g} {sign} {check.limit:g}{judge}"
        click.echo(f"  {line}")


def _write_page(html: Path, bundle: Path, against: str, report: Any) -> None:
    from qwen2x.cli.validation_page import write_page

    try:
        write_page(html, bundle, against, report)
    except OSError as error:
        raise RequestError(f"--html {html} cannot be written: {error.strerror}") from None


def _record(bundle: Any, report: Any) -> None:
    """Writes the figures into the manifest, if the bundle may be written to."""
    from qwen2x.exporters.bundle import write_manifest

    quality = {key: value for key, value in report.to_json().items() if key != "tolerance"}
    try:
        write_manifest(bundle.folder, {**bundle.manifest, "quality": finite(quality)})
    except OSError as error:
        log(f"the figures were not recorded in {bundle.folder}: {error.strerror}")


def _require_same_shape(opened: Any, candidate: Any, reference: Any, against: str) -> None:
    if candidate.vocab_size != reference.vocab_size:
        raise RequestError(
            f"{opened.folder} has {candidate.vocab_size} vocabulary rows, {against} has "
            f"{reference.vocab_size}: not the checkpoint it was made of "
            f"({opened.manifest['source']['id']})"
        )
