"""Which YaRN factors a bundle gets where nobody says: those that its checkpoint is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2x.exporters.config import Qwen2Config, read_config, read_json
from qwen2x.exporters.options import LARGEST_FACTOR, Options
from qwen2x.exporters.rope import NATIVE_POSITIONS

# What the cards of Qwen2 Instruct models promise: 131,072 positions of a model with 32,768.
CARD_FACTORS = (1.0, 2.0, 4.0)


def choose_factors(options: Options, folder: Path) -> Options:
    """The options, with factors for the checkpoint in a folder unless they name some.

    YaRN in the config keeps its factor and gains 1. An Instruct model of 32,768 positions gets 1, 2
    and 4, or as many of them as ``max_context`` takes. Any other keeps its plain rope alone, and so
    does a fused graph for CUDA, where several factors take the rotation out of the attention.

    Raises:
        ConfigError: not a model that we can carry over faithfully.
    """
    if options.yarn is not None:
        return options
    config = read_config(folder, options.original_context)
    rope = config.rope
    is_fused = options.dtype != "float32" and options.kv_bits is None
    if options.device == "cuda" and is_fused:
        return options
    if rope.is_yarn:
        has_more = 1 < rope.factor <= LARGEST_FACTOR
        return replace(options, yarn=(1.0, rope.factor)) if has_more else options
    if rope.max_position_embeddings != NATIVE_POSITIONS or not is_instruct(config, folder):
        return replace(options, yarn=(1.0,))
    return replace(options, yarn=_needed(config, options.max_context))


def is_instruct(config: Qwen2Config, folder: Path) -> bool:
    """Whether a model was trained to answer: its text ends with what ends a turn of its template.

    Base models of Qwen2.5 have a chat template too, but end a text with another token.
    """
    settings = read_json(folder / "tokenizer_config.json") or {}
    tokenizer = read_json(folder / "tokenizer.json") or {}
    template = _template(folder / "chat_template.jinja", settings)
    added = tokenizer.get("added_tokens") or []
    ends = [token.get("content") for token in added if token.get("id") in config.eos_token_ids]
    return any(isinstance(end, str) and end in template for end in ends)


def _template(path: Path, settings: Mapping[str, Any]) -> str:
    """The text of a chat template, or of all named ones; empty without any."""
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    return str(settings.get("chat_template") or "")


def _needed(config: Qwen2Config, max_context: int | None) -> tuple[float, ...]:
    """Up to the first factor that reaches the context."""
    reaching = [
        factor
        for factor in CARD_FACTORS
        if max_context is not None and config.rope.with_factor(factor).max_positions >= max_context
    ]
    return CARD_FACTORS[: CARD_FACTORS.index(reaching[0]) + 1] if reaching else CARD_FACTORS
