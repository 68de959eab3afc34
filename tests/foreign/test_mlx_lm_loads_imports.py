"""Folders made of GPTQ and AWQ checkpoints in mlx-lm, which opens an AWQ checkpoint itself too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters.exporter import export
from tests.exporters.judge import judge_logits, load_judge
from tests.foreign.test_mlx_lm_loads_our_folders import LOGITS, PROMPT, TEXT, ask_mlx_lm
from tests.packed_checkpoint import write_packed_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None or importlib.util.find_spec("mlx") is None,
    reason="mlx-lm is not installed",
)

CASES: dict[str, dict[str, Any]] = {
    "gptq": {"group_size": 64},
    "gptq-zero-points": {"sym": False, "is_tied": False},
    "gptq-of-8-bits": {"bits": 8, "sym": False, "group_size": 128},
    "gptq-whole-rows": {"group_size": -1},
    "awq": {"method": "awq", "sym": False, "group_size": 64},
}


def test_mlx_lm_computes_what_transformers_does_with_the_checkpoints_integers(
    tmp_path: Path,
) -> None:
    packed = {
        name: write_packed_checkpoint(tmp_path / name, **case) for name, case in CASES.items()
    }
    folders = {
        name: export(item.folder, "mlx", out=tmp_path / f"{name}-mlx", dtype="float32").bundle
        for name, item in packed.items()
    }
    half = export(packed["awq"].folder, "mlx", out=tmp_path / "awq-half").bundle
    # mlx-lm's own reading of the format, which has nothing of ours.
    folders |= {"awq-half": half, "awq-as-it-is": packed["awq"].folder}
    ask_mlx_lm(
        {
            "folders": {name: str(folder) for name, folder in folders.items()},
            "prompt": PROMPT.tolist(),
            "new_tokens": 2,
            "text": TEXT,
            "out": str(tmp_path),
        }
    )
    logits = {name: np.load(tmp_path / f"{name}.npy") for name in folders}
    for name, item in packed.items():
        expected = judge_logits(load_judge(item.floats), PROMPT[None])[0]
        assert np.abs(logits[name] - expected).max() <= LOGITS, name
    # The same bytes reach the same kernels.
    assert np.array_equal(logits["awq-half"], logits["awq-as-it-is"])
