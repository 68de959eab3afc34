"""The judge of GPTQ and AWQ folders, against transformers with the definition's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.quantize.errors import CheckpointError
from qwen2x.runtimes.torch_runtime import TorchRuntime
from tests.exporters.judge import judge_logits, load_judge, random_ids
from tests.packed_checkpoint import write_packed_checkpoint

# The same products in the same library.
SAME = 1e-5


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"is_tied": False, "group_size": -1},
        {"bits": 8, "sym": False, "group_size": 128},
        {"sym": False, "settings": {"checkpoint_format": "gptq_v2"}},
        {"order": "own", "sym": False},
        {"method": "awq", "sym": False, "group_size": 64},
    ],
)
def test_the_judge_computes_with_the_weights_of_the_formats_definition(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    packed = write_packed_checkpoint(tmp_path, **variant)
    ids = random_ids(2, 24)
    expected = judge_logits(load_judge(packed.floats), ids)
    runtime = TorchRuntime(packed.folder, device="cpu")
    assert np.abs(runtime.logits(ids) - expected).max() < SAME


def test_the_judge_of_a_packed_folder_is_set_up_as_for_floats(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    packed = write_packed_checkpoint(tmp_path, rope_scaling=yarn)
    runtime = TorchRuntime(packed.folder, device="cpu")
    floats = TorchRuntime(packed.floats, device="cpu")
    assert runtime.eos_token_ids == floats.eos_token_ids
    assert len(runtime.eos_token_ids) > 1  # those of generation_config.json
    assert runtime.max_context == floats.max_context == 2048
    ids = random_ids(1, 600)
    assert np.abs(runtime.logits(ids) - floats.logits(ids)).max() < SAME
    assert np.abs(runtime.prefill(ids[0, :9]) - floats.prefill(ids[0, :9])).max() < SAME


def test_a_tensor_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    packed = write_packed_checkpoint(tmp_path)
    name = "model.layers.1.mlp.down_proj.qweight"
    packed.change(lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"does not hold model.layers.1.mlp.down_proj.weight"):
        TorchRuntime(packed.folder, device="cpu")
