from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.compare import compare
from qwen2x.runtimes.runtime import Logits, TokenIds
from qwen2x.runtimes.stored_logits import StoredLogits, require_room

VOCAB = 40


class Model:
    """Logits that depend on the whole row; counts how often it is asked."""

    def __init__(self, seed: int) -> None:
        self.table = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)).astype("f4")
        self.asked = 0

    def logits(self, token_ids: TokenIds) -> Logits:
        self.asked += 1
        rows: Logits = self.table[token_ids] + token_ids.sum().astype(np.float32)
        return rows


def test_stored_logits_stand_for_the_model_bit_by_bit() -> None:
    windows = [[1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8]]
    reference, candidate = Model(1), Model(2)
    direct = compare(Model(1), candidate, windows)
    with tempfile.TemporaryFile() as file:
        stored = StoredLogits(reference, windows, file)
        assert reference.asked == 3, "equal windows are run once"
        assert file.tell() == 8 * VOCAB * 4
        assert compare(stored, candidate, windows) == direct
        assert compare(stored, Model(1), windows).kl_max == 0
        assert reference.asked == 3


def test_logits_of_another_type_are_stored_as_floats() -> None:
    class Doubles(Model):
        def logits(self, token_ids: TokenIds) -> Logits:
            return super().logits(token_ids).astype(np.float64)[:, ::1]  # type: ignore[return-value]

    with tempfile.TemporaryFile() as file:
        stored = StoredLogits(Doubles(1), [[1, 2]], file)
        ids = np.array([[1, 2]])
        np.testing.assert_array_equal(stored.logits(ids), Model(1).logits(ids))


def test_a_full_disk_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 10**9))
    require_room(tmp_path, [[0] * 512] * 2, 200_000)
    with pytest.raises(RequestError, match=r"need 2\.46 GB in .*, 1\.00 GB are free; ask for"):
        require_room(tmp_path, [[0] * 512] * 6, 200_000)
