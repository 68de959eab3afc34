"""Standard output whose failures are told in one line."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager

from qwen2x.quantize.errors import Qwen2xError


class OutputError(Qwen2xError):
    """A result that standard output does not take."""


class StandardOutput(io.TextIOWrapper):
    """Raises OutputError where the disk behind it is full, or it is closed.

    A pipe whose reader went away stays the OSError that it is, which click ends in silence.
    """

    def write(self, text: str, /) -> int:
        """See ``io.TextIOWrapper``."""
        with _told():
            return super().write(text)

    def flush(self) -> None:
        """See ``io.TextIOWrapper``."""
        with _told():
            super().flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise OutputError(
            f"standard output cannot be written: {error.strerror}; free some space there, or send "
            "it elsewhere"
        ) from None
