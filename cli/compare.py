"""``qwen2x compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qwen2x.cli.comparing import Comparison, compare_bundles, require_same_model, stored_comparison
from qwen2x.cli.figures import Figures, smaller_and_closer
from qwen2x.cli.judge import find_judge
from qwen2x.cli.judging import Wish, read_text
from qwen2x.cli.machine import peak_memory_bytes
from qwen2x.cli.options import json_option, place_options, reading_options
from qwen2x.cli.output import figure_text, log, print_columns, print_json, size_text
from qwen2x.cli.reading import text_name
from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.exporters.bundle import Bundle

_EXAMPLES = """\b
Example: qwen2x compare qwen-int4 qwen-int8 qwen-mlx --against ./Qwen2.5-0.5B-Instruct
         qwen2x compare qwen-int4 qwen-int8 --stored
"""
# What only running a model asks for.
_RUNNING = ("text", "tokens", "window", "device", "threads", "graph", "kv_bits")


@click.command("compare", epilog=_EXAMPLES)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--against",
    help="The checkpoint (folder or hub id) that they were made of. Needed, except with --stored.",
)
@reading_options
@click.option(
    "--stored", is_flag=True, help="Run nothing; show what validate recorded in the bundles."
)
@click.option(
    "--html", type=click.Path(path_type=Path), help="Also write one page here. Default: none."
)
@click.option(
    "--revision", help="Branch, tag or commit, when --against is a hub id. Default: main."
)
@place_options
@json_option
def command(
    bundles: tuple[Path, ...],
    against: str | None,
    text: Path | None,
    stored: bool,
    html: Path | None,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show BUNDLES of one checkpoint in one table: size, bits, and how far each is from it.

    The checkpoint runs once, in PyTorch's float32, and its logits go to a temporary file in the
    cache folder: 4 bytes per token and vocabulary entry. Of validate's figures these are the
    same; it checks nothing else, records nothing, and always ends with 0. A bundle that is marked
    has another beside it that is no larger and no farther: smaller and closer.
    """
    from qwen2x.cli.page import require_page_possible
    from qwen2x.exporters.bundle import open_bundle

    _require_sense(against, stored)
    if html is not None:
        require_page_possible(html, bundles)
    opened = [open_bundle(folder) for folder in bundles]
    if stored:
        found = _stored(opened, against, revision)
    else:
        wish = Wish(
            text=read_text(text),
            text_name=text_name(text),
            on_step=lambda step: None if as_json else log(f"reading with {step}"),
            **options,
        )
        found = compare_bundles(opened, find_judge(str(against), revision, opened[0].folder), wish)
    if html is not None:
        from qwen2x.cli.comparison_page import write_comparison_page

        write_comparison_page(html, found)
    if as_json:
        print_json(found.to_json() | {"peak_memory_bytes": peak_memory_bytes()})
    else:
        _print(found)


def _require_sense(against: str | None, stored: bool) -> None:
    if not stored:
        if against is None:
            raise RequestError(
                "--against is missing; give the checkpoint that the bundles were made of, or "
                "--stored for what was recorded in them"
            )
        return
    context = click.get_current_context()
    given = [
        f"--{name.replace('_', '-')}"
        for name in _RUNNING
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    ]
    if given:
        raise RequestError(f"--stored runs nothing; leave out {' and '.join(given)}, or --stored")


def _stored(bundles: list[Bundle], against: str | None, revision: str | None) -> Comparison:
    if against is not None:
        judge = find_judge(against, revision)
        for bundle in bundles:
            require_same_model(bundle, judge)
    return stored_comparison(bundles)


def _print(found: Comparison) -> None:
    reference = "PyTorch" if found.backend == "torch" else found.backend
    text = found.text
    click.echo(
        f"{found.reference} ({reference}): perplexity "
        f"{found.bundles[0].figures.perplexity_reference:.4f} on {text['tokens']} tokens of "
        f"{text['name']} text in windows of {text['window']}"
    )
    head = ["", "scheme", "bits", "size", "KL mean", "p99", "max", "same top", "perplexity"]
    rows = [_row(figures, found.figures) for figures in found.figures]
    print_columns([[*head, "smaller and closer"], *rows])


def _row(one: Figures, all_of_them: list[Figures]) -> list[str]:
    better = smaller_and_closer(one, all_of_them)
    return [
        str(one.folder),
        one.way,
        f"{one.bits_per_weight:.2f}",
        size_text(one.bytes),
        *(figure_text(value) for value in (one.kl_mean, one.kl_p99, one.kl_max)),
        figure_text(one.top1_agreement, ".2%"),
        figure_text(one.perplexity, ".4f"),
        str(better.folder) if better else "",
    ]
