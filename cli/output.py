"""Results on standard output, progress and logs on standard error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qwen2x.exporters.weight_writer import Progress
    from qwen2x.runtimes.runtime import OnPrefill


def print_json(value: Mapping[str, Any]) -> None:
    """One object on standard output."""
    click.echo(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def finite(value: Any) -> Any:
    """The same with None for what is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log(text: str) -> None:
    """A line on standard error."""
    click.echo(text, err=True)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Two aligned columns on standard output."""
    width = max(len(left) for left, _ in rows)
    for left, right in rows:
        click.echo(f"  {left:<{width}}  {right}")


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Any number of aligned columns on standard output."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        click.echo(f"  {'  '.join(cells)}".rstrip())


def size_text(count: float) -> str:
    """Bytes in decimal units, as disks and downloads are sold."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.2f} {unit}"
    return f"{count:.0f} bytes"


def figure_text(value: float | None, form: str = ".3g") -> str:
    """A figure; None and what is no number, which a broken bundle gives, in words."""
    return format(value, form) if value is not None and math.isfinite(value) else "not finite"


def layer_progress(*, quiet: bool = False) -> Callable[[str, int, int], None]:
    """Tells what is done to layers, and of the time left, on standard error."""
    started: dict[str, tuple[float, int]] = {}

    def show(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun, already = started.setdefault(stage, (now, done))
        if quiet:
            return
        if done == already:
            log(f"{total} layers to be {stage}" + (f", {done} are already" if done else ""))
            return
        left = (now - begun) / (done - already) * (total - done)
        log(f"{stage} layer {done} of {total}, {left / 60:.1f} minutes left")

    return show


def prefill_progress(*, is_verbose: bool, quiet: bool = False) -> OnPrefill:
    """Tells how far a long prompt is read, and of the time left, on standard error.

    A terminal has one line, which goes in the end; elsewhere, if details are wanted, every tenth
    of the prompt has a line of its own.
    """
    is_terminal = sys.stderr.isatty()
    started, told = 0.0, 0

    def show(done: int, total: int) -> None:
        nonlocal started, told
        if done == 0:
            started, told = time.monotonic(), 0
        if quiet or done == 0:
            return
        rate = done / max(time.monotonic() - started, 1e-9)
        text = f"read {done} of {total} tokens, {rate:.0f}/s, {(total - done) / rate:.0f} s left"
        tenth = 10 * done // total
        if is_terminal:
            click.echo(f"\r{text if done < total else ''}\x1b[K", err=True, nl=False)
        elif is_verbose and tenth > told:
            log(text)
        told = tenth

    return show


@contextmanager
def byte_progress(label: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar with bytes and time left on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=console, disable=quiet or not console.is_terminal)
    task = bar.add_task(label, total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # not earlier: a download before it has a bar of its own
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()
