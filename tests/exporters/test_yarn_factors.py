"""Which factors a checkpoint's bundle gets, and which it may be given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.options import Options
from qwen2x.exporters.yarn_factors import choose_factors
from qwen2x.quantize.errors import ConfigError
from tests.tiny_checkpoint import write_tiny_checkpoint

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instruct") / "source"
    return write_tiny_checkpoint(folder, max_position_embeddings=32768)


def changed(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, (1, 2, 4)),
        ({"target": "mlx"}, (1, 2, 4)),
        ({"max_context": 32768}, (1,)),
        ({"max_context": 32769}, (1, 2)),
        ({"max_context": 65537}, (1, 2, 4)),
        ({"yarn": (1.0, 8.0)}, (1, 8)),
        # Rotation outside of the kernel would cost every token; whoever wants it says so.
        ({"device": "cuda"}, None),
        ({"device": "cuda", "dtype": "float32"}, (1, 2, 4)),
        ({"device": "cuda", "yarn": (1.0, 4.0)}, (1, 4)),
    ],
)
def test_an_instruct_model_gets_what_its_card_promises(
    options: dict[str, Any], factors: tuple[float, ...] | None, instruct: Path
) -> None:
    assert choose_factors(Options(**options), instruct).yarn == factors


def test_a_base_model_with_a_template_keeps_its_plain_rope(tmp_path: Path) -> None:
    """Those of Qwen2.5 come with one, and end their texts with another token."""
    folder = write_tiny_checkpoint(tmp_path / "base", max_position_embeddings=32768)
    changed(folder, "generation_config.json", eos_token_id=2013)
    assert choose_factors(Options(), folder).yarn == (1,)


def test_a_template_in_the_tokenizers_config_counts_too(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "source", max_position_embeddings=32768)
    template = (folder / "chat_template.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").unlink()
    changed(folder, "tokenizer_config.json", chat_template=None)
    assert choose_factors(Options(), folder).yarn == (1,)
    changed(folder, "tokenizer_config.json", chat_template=template)
    assert choose_factors(Options(), folder).yarn == (1, 2, 4)


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        ({"rope_scaling": YARN, "max_position_embeddings": 32768}, (1, 4)),
        ({"rope_scaling": YARN | {"factor": 2.5}, "max_position_embeddings": 131072}, (1, 2.5)),
        ({"rope_scaling": YARN | {"factor": 1.0}, "max_position_embeddings": 32768}, None),
        ({"max_position_embeddings": 131072}, (1,)),
        ({"max_position_embeddings": 4096}, (1,)),
    ],
)
def test_other_lengths_and_configs_with_yarn(
    config: dict[str, Any], factors: tuple[float, ...] | None, tmp_path: Path
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "source", **config)
    assert choose_factors(Options(), folder).yarn == factors


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ((), "rise within 1..256, such as 1,2,4; got ''"),
        ((0.5,), "got '0.5'"),
        ((1.0, 1.0), "got '1,1'"),
        ((4.0, 2.0), "got '4,2'"),
        ((1.0, float("nan")), "got '1,nan'"),
        ((1.0, 257.0), "got '1,257'"),
        ((2.0, 4.0), "need 1 among them.*got 2,4, expected 1,2,4 or one"),
    ],
)
def test_factors_that_make_no_sense_are_refused(factors: tuple[float, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Options(yarn=factors)
