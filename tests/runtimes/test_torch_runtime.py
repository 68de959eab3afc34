"""The judge behind our protocol is still transformers, called directly here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Qwen2ForCausalLM

from qwen2x.quantize.errors import BackendError, CheckpointError, RequestError
from qwen2x.runtimes.runtime import Logits, Runtime, open_runtime
from tests.tiny_checkpoint import write_tiny_checkpoint

# One model by two ways of the same library.
FLOAT32_SELF = 2e-5
TOKENS = np.random.default_rng(1).integers(0, 2048, 40).tolist()


@pytest.fixture(scope="module")
def expected(random_checkpoint: Path) -> Logits:
    model = Qwen2ForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows: Logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    return rows


@pytest.fixture
def runtime(random_torch: Runtime) -> Runtime:
    random_torch.reset()
    return random_torch


def test_logits_are_those_of_the_model(runtime: Runtime, expected: Logits) -> None:
    found = runtime.logits(np.array([TOKENS]))[0]
    np.testing.assert_allclose(found, expected, atol=FLOAT32_SELF)


def test_steps_chunks_and_truncation_are_those_of_the_model(
    runtime: Runtime, expected: Logits
) -> None:
    np.testing.assert_allclose(runtime.prefill(TOKENS[:20]), expected[19], atol=FLOAT32_SELF)
    runtime.append([1, 2, 3])
    runtime.truncate(15)
    rows = [runtime.decode(token) for token in TOKENS[15:30]]
    np.testing.assert_allclose(np.stack(rows), expected[15:30], atol=FLOAT32_SELF)
    rows_at_once = runtime.append(TOKENS[30:], keep=10)
    np.testing.assert_allclose(rows_at_once, expected[30:], atol=FLOAT32_SELF)
    runtime.reset()
    np.testing.assert_allclose(runtime.decode(TOKENS[0]), expected[0], atol=FLOAT32_SELF)


def test_an_interrupted_run_leaves_the_cache_as_it_was(
    runtime: Runtime, expected: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ctrl-C between two layers: the first had its new keys, the second had not.
    model: Any = runtime._model  # type: ignore[attr-defined]
    runtime.prefill(TOKENS[:10])

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runtime.append(TOKENS[10:20])
    assert runtime.cache_length == 10
    np.testing.assert_allclose(runtime.decode(TOKENS[10]), expected[10], atol=FLOAT32_SELF)


def test_rows_of_a_batch_equal_each_row_alone(runtime: Runtime, expected: Logits) -> None:
    padded = np.array([TOKENS, TOKENS])
    padded[1, 12:] = 0
    found = runtime.logits(padded, lengths=[40, 12])
    np.testing.assert_allclose(found[0], expected, atol=FLOAT32_SELF)
    np.testing.assert_allclose(found[1, :12], expected[:12], atol=FLOAT32_SELF)


def test_yarn_reaches_factor_times_the_original_context(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    source = write_tiny_checkpoint(
        tmp_path / "yarn", max_position_embeddings=128, rope_scaling=scaling
    )
    with open_runtime(source, backend="torch", threads=1) as runtime:
        assert runtime.max_context == 512
        assert np.isfinite(runtime.logits(np.array([TOKENS]), positions=range(472, 512))).all()
        with pytest.raises(RequestError, match="context has"):
            runtime.logits(np.array([TOKENS]), positions=range(473, 513))


def test_facts_and_end_tokens_are_those_of_the_checkpoint(runtime: Runtime) -> None:
    assert (runtime.backend, runtime.device, runtime.dtype) == ("torch", "cpu", "float32")
    assert (runtime.vocab_size, runtime.max_context) == (2048, 512)
    generation = json.loads((runtime.folder / "generation_config.json").read_text("utf-8"))
    end = generation["eos_token_id"]
    assert list(runtime.eos_token_ids) == (end if isinstance(end, list) else [end])


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.bias", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_a_judge_with_a_missing_tensor_is_refused_instead_of_made_up(
    tmp_path: Path, random_checkpoint: Path, name: str
) -> None:
    source = Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_runtime(source, backend="torch")


@pytest.mark.parametrize("damage", ["absent", "cut", "no config", "shape"])
def test_a_damaged_checkpoint_is_refused_in_one_line(
    tmp_path: Path, random_checkpoint: Path, damage: str
) -> None:
    source = Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))
    weights = source / "model.safetensors"
    if damage == "absent":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:10_000])
    elif damage == "no config":
        (source / "config.json").unlink()
    else:
        tensors = load_file(weights)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:64].copy()
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        open_runtime(source, backend="torch")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_here_is_refused(random_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match="no CUDA device here"):
        open_runtime(random_checkpoint, backend="torch", device="cuda")
