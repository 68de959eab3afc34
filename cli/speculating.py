"""The options that let a command guess ahead, and the smaller model that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.runtimes.generate import Generation
    from qwen2x.runtimes.runtime import Runtime


def speculation_options(function: Any) -> Any:
    """``--speculate`` and ``--draft``."""
    for decorate in (
        click.option(
            "--draft",
            type=click.Path(path_type=Path),
            help="A smaller BUNDLE of the same family, which guesses ahead instead of the text. "
            "Default: none.",
        ),
        click.option(
            "--speculate",
            is_flag=True,
            help="Guess ahead from the text itself where that is faster; the text stays the same.",
        ),
    ):
        function = decorate(function)
    return function


@contextmanager
def speculating(
    runtime: Runtime, *, speculate: bool, draft: Path | None, threads: int | None
) -> Iterator[bool | Runtime]:
    """What ``generate`` takes as ``speculate``, for a command's two options.

    Raises:
        RequestError: both are given, or the draft's tokenizer is another one.
    """
    if draft is None:
        yield speculate
        return
    if speculate:
        raise RequestError("--speculate guesses from the text, --draft with a model; give one")
    from qwen2x.runtimes.draft_model import require_same_tokenizer
    from qwen2x.runtimes.runtime import open_runtime

    with open_runtime(draft, threads=threads) as smaller:
        require_same_tokenizer(runtime, smaller)
        yield smaller


def speculation_of(answer: Generation) -> dict[str, int] | None:
    """The ``speculation`` of ``run --json``: passes, drafted and accepted; None without."""
    counts = answer.speculation
    return None if counts is None else vars(counts).copy()


def speculation_text(answer: Generation) -> str:
    """The same for people, behind a comma; nothing without."""
    counts = answer.speculation
    if counts is None:
        return ""
    return f", {counts.accepted} of {counts.drafted} guesses right in {counts.passes} passes"
