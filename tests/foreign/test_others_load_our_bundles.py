"""Bundles in onnxruntime-genai and in optimum: the same greedy text as in our own runtime.

Each runs in an environment of its own (``environments.py``), because optimum-onnx wants an older
transformers than ours. The real checkpoint joins when QWEN2X_REAL_CHECKPOINT names its folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from qwen2x.exporters.exporter import export
from qwen2x.runtimes.runtime import open_runtime
from tests.foreign.environments import CannotInstallError, Environment, Outcome, open_environment

pytestmark = pytest.mark.foreign

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-qwen2"
REAL = os.environ.get("QWEN2X_REAL_CHECKPOINT", "")
NEW_TOKENS = 64
# After these prompts no text ends within 64 tokens, and the best token leads clearly each time (by
# 0.2 logits with the real checkpoint), so that kernels which round differently agree as well.
PROMPTS = {
    "tiny": "And it came to pass, that the king said unto",
    "real": "<|im_start|>user\nWrite the numbers from 1 to 30 in words.<|im_end|>\n"
    "<|im_start|>assistant\n",
}
# All in composed form: genai's tokenizer ignores the NFC normalizer of a tokenizer.json.
TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs; isn't it? I'LL, we'Re.",
    "def f(x):\n    return x ** 2\n\n\n# done\t\ttabs\r\n\r\n",
    "  leading and   inner   spaces  ",
    "大型语言模型是什么？日本語テキスト、한국어 텍스트",
    "Привет, мир! Ünïcödé café, العربية हिन्दी",
    "emoji 🙂👩\u200d👩\u200d👧 and a\u00a0b\u2003c",
    "100,000.5 + 2^10 = 1024, 1234567890",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
]

needs_real = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL, reason="QWEN2X_REAL_CHECKPOINT names no checkpoint folder"),
]
BUNDLES = [
    pytest.param(("tiny", {}), id="tiny-float32"),
    pytest.param(("tiny", {"bits": 4, "method": "rtn"}), id="tiny-int4"),
    pytest.param(("tiny", {"kv_bits": 8}), id="tiny-int8-cache"),
    pytest.param(("real", {}), id="real-float32", marks=needs_real),
    pytest.param(("real", {"bits": 4, "method": "rtn"}), id="real-int4", marks=needs_real),
]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A bundle, a prompt, and how our own runtime goes on."""

    folder: Path
    prompt: list[int]
    token_ids: list[int]
    leads: list[float]

    def assert_same(self, token_ids: list[int]) -> None:
        """Equal token for token; a difference is named with the lead of the token it displaced."""
        pairs = zip(self.token_ids, token_ids, strict=False)
        first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        assert first is None, (
            f"token {first}: ours {self.token_ids[first]} leads by {self.leads[first]:.4f}, "
            f"theirs is {token_ids[first]}"
        )
        assert len(token_ids) == len(self.token_ids)


@pytest.fixture(scope="module", params=BUNDLES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exported]:
    name, options = request.param
    folder = tmp_path_factory.mktemp("foreign") / "bundle"
    export(_source(name), out=folder, **options)
    prompt = _tokenizer(folder).encode(PROMPTS[name]).ids
    token_ids, leads = _continue_greedily(folder, prompt)
    yield Exported(folder=folder, prompt=prompt, token_ids=token_ids, leads=leads)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def genai() -> Environment:
    return _open("genai")


@pytest.fixture(scope="module")
def optimum() -> Environment:
    return _open("optimum")


@pytest.fixture(scope="module")
def by_genai(exported: Exported, genai: Environment) -> dict[str, Any]:
    outcome = genai.run("genai_generate.py", exported.folder, exported.prompt, NEW_TOKENS)
    return outcome.result


@pytest.fixture(scope="module")
def by_optimum(exported: Exported, optimum: Environment) -> Outcome:
    arguments = (exported.folder, exported.prompt, NEW_TOKENS, "default")
    return optimum.run("optimum_generate.py", *arguments)


def test_the_text_is_long_and_varied_enough_to_tell(exported: Exported) -> None:
    assert len(exported.token_ids) == NEW_TOKENS
    assert len(set(exported.token_ids)) > 8


def test_genai_goes_on_as_we_do(exported: Exported, by_genai: dict[str, Any]) -> None:
    exported.assert_same(by_genai["token_ids"])


def test_genai_shares_one_buffer_for_past_and_present(
    exported: Exported, by_genai: dict[str, Any]
) -> None:
    config = json.loads((exported.folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["search"]["past_present_share_buffer"] is True
    assert by_genai["model_type"] == "qwen2"
    # A growing cache would be one shorter: the last token's keys are not in it yet.
    assert by_genai["cache_shape"][2] == len(exported.prompt) + NEW_TOKENS


def test_optimum_goes_on_as_we_do(exported: Exported, by_optimum: Outcome) -> None:
    exported.assert_same(by_optimum.result["token_ids"])


def test_optimum_keeps_the_cache_and_feeds_mask_and_positions_itself(
    exported: Exported, by_optimum: Outcome
) -> None:
    result, prompt_tokens = by_optimum.result, len(exported.prompt)
    assert result["can_use_cache"]
    assert not result["use_io_binding"], "with binding, the calls cannot be seen"
    assert len(result["calls"]) == len(exported.token_ids)
    for index, call in enumerate(result["calls"]):
        past = prompt_tokens + index - 1 if index else 0
        total = prompt_tokens + index
        assert call["input_ids"] == [1, total - past]
        assert call["attention_mask"] == [[1] * total]
        assert call["position_ids"] == [list(range(past, total))]
        assert call["past_key_values.0.key"][2] == past


def test_optional_inputs_are_not_seen_by_optimum(exported: Exported, by_optimum: Outcome) -> None:
    manifest = json.loads((exported.folder / "qwen2x.json").read_text(encoding="utf-8"))
    assert manifest["optional_inputs"]
    assert by_optimum.result["input_names"] == manifest["inputs"]
    assert set(by_optimum.result["calls"][0]) == set(manifest["inputs"])


def test_nobody_warns_about_shapes_or_a_legacy_graph(by_optimum: Outcome) -> None:
    said = by_optimum.messages
    assert "does not match actual shape" not in said
    assert "legacy" not in said
    warnings = [line for line in said.splitlines() if "[W:onnxruntime" in line]
    assert all("num_logits_to_keep" in line or "rope_index" in line for line in warnings)


@pytest.mark.parametrize("exported", BUNDLES[:2], indirect=True)
def test_optimum_can_bind_outputs_as_it_does_on_cuda(
    exported: Exported, optimum: Environment
) -> None:
    """It takes the shape of logits from the names of the inputs' axes."""
    arguments = (exported.folder, exported.prompt, NEW_TOKENS, "bound")
    result = optimum.run("optimum_generate.py", *arguments).result
    assert result["use_io_binding"]
    exported.assert_same(result["token_ids"])


def test_genai_tokenizes_like_tokenizers(exported: Exported, genai: Environment) -> None:
    judge = _tokenizer(exported.folder)
    token_ids = [judge.encode(text).ids for text in TEXTS]
    texts = [judge.decode(row, skip_special_tokens=True) for row in token_ids]
    result = genai.run("genai_tokenize.py", exported.folder, json.dumps(TEXTS)).result
    assert result["token_ids"] == token_ids
    assert result["texts"] == texts
    assert result["streamed"] == "".join(texts)


def _source(name: str) -> Path:
    return TINY if name == "tiny" else Path(REAL)


def _open(name: str) -> Environment:
    try:
        return open_environment(name)
    except CannotInstallError as error:
        pytest.skip(str(error))


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _continue_greedily(folder: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The new tokens, an end token included, and by how much each led the next best."""
    token_ids: list[int] = []
    leads: list[float] = []
    with open_runtime(folder, backend="onnx") as runtime:
        logits = runtime.prefill(prompt)
        while True:
            second, best = np.partition(logits, -2)[-2:]
            leads.append(float(best - second))
            token_ids.append(int(logits.argmax()))
            if len(token_ids) == NEW_TOKENS or token_ids[-1] in runtime.eos_token_ids:
                return token_ids, leads
            logits = runtime.decode(token_ids[-1])
