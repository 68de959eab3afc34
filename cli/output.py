"""Results on standard output, progress and logs on standard error."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from qwen2x.exporters.onnx_writer import Progress


def print_json(value: Mapping[str, Any]) -> None:
    """One object on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def log(text: str) -> None:
    """A line on standard error."""
    click.echo(text, err=True)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Two aligned columns on standard output."""
    width = max(len(left) for left, _ in rows)
    for left, right in rows:
        click.echo(f"  {left:<{width}}  {right}")


def size_text(count: float) -> str:
    """Bytes in decimal units, as disks and downloads are sold."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.2f} {unit}"
    return f"{count:.0f} bytes"


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
    with Bar(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def peak_memory_bytes() -> int:
    """This process's peak resident memory."""
    if sys.platform == "win32":
        return _windows_peak()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _windows_peak() -> int:
    """PeakWorkingSetSize of GetProcessMemoryInfo (psapi.h, PROCESS_MEMORY_COUNTERS)."""

    class Counters(ctypes.Structure):
        _fields_ = (
            ("cb", ctypes.c_ulong),
            ("PageFaultCount", ctypes.c_ulong),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("rest", ctypes.c_size_t * 7),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    windll: Any = getattr(ctypes, "windll")  # noqa: B009 (absent off Windows)
    process = windll.kernel32.GetCurrentProcess()
    windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize)
