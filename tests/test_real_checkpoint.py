"""The limits that a real 0.5B checkpoint must keep, against transformers in float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.cli.judging import read_text
from qwen2x.exporters import export
from qwen2x.runtimes.compare import Difference, compare, kl_divergence, windows_of
from qwen2x.runtimes.generate import generate
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.sampler import Sampling
from qwen2x.runtimes.tokenizer import Tokenizer

TEXTS = Path(__file__).resolve().parents[1] / "benchmarks" / "texts"
NAME = "QWEN2X_REAL_CHECKPOINT"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(NAME not in os.environ, reason=f"{NAME} names no checkpoint's folder"),
]


@pytest.fixture(scope="module")
def judge() -> Iterator[Runtime]:
    with open_runtime(os.environ[NAME], backend="torch") as runtime:
        yield runtime


def difference(
    judge: Runtime, out: Path, tokens: int, target: str = "onnx", **options: Any
) -> Difference:
    source = Path(os.environ[NAME])
    export(source, target, out=out, **options)
    ids = Tokenizer(source).encode(read_text(None))
    with open_runtime(out) as runtime:
        return compare(judge, runtime, windows_of(ids, tokens, 256))


def test_float32_is_the_same_model(judge: Runtime, tmp_path: Path) -> None:
    found = difference(judge, tmp_path / "float", 1024)
    assert found.positions == 1024
    assert found.kl_mean <= 1e-5
    assert found.top1_agreement >= 0.995
    assert found.max_abs_diff <= 5e-3


def test_mlx_in_float32_is_the_same_model(judge: Runtime, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    # Few positions: on the CPU mlx's products are plain loops.
    found = difference(judge, tmp_path / "mlx", 32, "mlx", dtype="float32")
    assert found.positions == 32
    assert found.kl_mean <= 1e-5
    assert found.max_abs_diff <= 5e-3


def test_eight_bits_are_nearly_the_same_model(judge: Runtime, tmp_path: Path) -> None:
    found = difference(judge, tmp_path / "int8", 512, bits=8)
    assert found.kl_mean <= 0.003
    assert found.top1_agreement >= 0.95


def test_four_bits_stay_near(judge: Runtime, tmp_path: Path) -> None:
    # 0.85 of the 0.147 that onnxruntime-genai's own 4-bit export has on news prose.
    found = difference(judge, tmp_path / "int4", 512, bits=4, method="rtn")
    assert found.kl_mean <= 0.125
    assert found.top1_agreement >= 0.75


def test_a_cache_in_eight_bits_adds_little_over_4096_tokens(tmp_path: Path) -> None:
    source = Path(os.environ[NAME])
    folders = [tmp_path / "float-cache", tmp_path / "int8-cache"]
    for folder, kv_bits in zip(folders, (None, 8), strict=True):
        export(source, out=folder, kv_bits=kv_bits)
    texts = [(TEXTS / f"{kind}.txt").read_text("utf-8") for kind in ("prose", "code")]
    ids = [token for text in texts for token in Tokenizer(source).encode(text)][:4096]
    assert len(ids) == 4096
    added = []
    with open_runtime(folders[0]) as floats, open_runtime(folders[1]) as codes:
        for start in range(0, len(ids), 512):
            chunk = ids[start : start + 512]
            theirs, ours = (runtime.append(chunk, keep=512) for runtime in (floats, codes))
            added.append(kl_divergence(theirs, ours))
    assert np.concatenate(added).mean() <= 0.002


def test_text_that_is_guessed_ahead_is_that_of_plain_decoding(tmp_path: Path) -> None:
    source = Path(os.environ[NAME])
    export(source, out=tmp_path / "int8", bits=8)
    prose = (TEXTS / "prose.txt").read_text("utf-8")[:600]
    ids = Tokenizer(source).encode(prose)
    with open_runtime(tmp_path / "int8", threads=2) as runtime:
        # Groups of 32 and 64: in every bit.
        runtime.prefill(ids[:64])
        single = np.stack([runtime.decode(token).copy() for token in ids[64:84]])
        runtime.truncate(64)
        guessed = [runtime.decode_guessed(ids[start : start + 5]) for start in range(64, 84, 5)]
        np.testing.assert_array_equal(np.concatenate(guessed), single)
        for prompt in (f"Repeat this text word for word:\n\n{prose}", "Tell me about lighthouses."):
            texts = []
            for speculate in (False, True):
                # A prompt of which all but the last token is cached is summed otherwise.
                runtime.reset()
                answer = generate(
                    runtime, prompt, max_tokens=48, sampling=Sampling(), speculate=speculate
                )
                texts.append(answer.run().token_ids)
            assert texts[0] == texts[1]
