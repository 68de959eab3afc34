"""A reference's logits on disk, so that several candidates are compared with one run of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.compare import GivesLogits
from qwen2x.runtimes.runtime import Logits, TokenIds

_ITEM_BYTES = 4


class StoredLogits:
    """Gives the rows of windows that were run before, as the runtime itself did.

    Float32, since 16 bits would cost more than an 8-bit bundle does. Memory holds one window.
    """

    def __init__(
        self, reference: GivesLogits, windows: Sequence[Sequence[int]], file: IO[bytes]
    ) -> None:
        self._file = file
        # By the window's tokens: where its logits begin, and their shape [1, sequence, vocab].
        self._places: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        for window in windows:
            ids = np.array([window], np.int64)
            if ids.tobytes() in self._places:
                continue
            logits = np.ascontiguousarray(reference.logits(ids), np.float32)
            self._places[ids.tobytes()] = file.tell(), logits.shape
            file.write(logits.data)
        file.flush()

    def logits(self, token_ids: TokenIds) -> Logits:
        """Float32 [1, sequence, vocab] of one of the windows."""
        offset, shape = self._places[token_ids.tobytes()]
        logits: Logits = np.empty(shape, np.float32)
        self._file.seek(offset)
        read = self._file.readinto(logits.data.cast("B"))  # type: ignore[attr-defined]
        assert read == logits.nbytes
        return logits


def require_room(folder: Path, windows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises RequestError where the disk of a folder cannot hold the logits of all windows."""
    needed = sum(len(window) for window in windows) * vocab_size * _ITEM_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RequestError(
            f"the reference's logits need {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB "
            "are free; ask for fewer --tokens, or set QWEN2X_CACHE to a folder with more room"
        )
