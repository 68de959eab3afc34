"""The files that make a tokenizer, and whether they go with a model."""

from __future__ import annotations

from pathlib import Path

from qwen2x.exporters.config import read_json
from qwen2x.quantize.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def require_tokenizer_fits(folder: Path, vocab_size: int) -> None:
    """Every token needs a row of the embedding; rows beyond the tokenizer are padding.

    Raises:
        ConfigError: ``tokenizer.json`` cannot be read, or has a token that the model lacks.
    """
    path = folder / "tokenizer.json"
    content = read_json(path)
    if content is None:
        return
    try:
        tokens = dict(content["model"]["vocab"])
        tokens |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        token, largest = max(tokens.items(), key=lambda item: int(item[1]))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path} has no vocabulary as Qwen2's tokenizer has; fetch it again"
        ) from None
    if largest >= vocab_size:
        raise ConfigError(
            f"{path} has the token {token!r} with id {largest}, but the model has vocab_size "
            f"{vocab_size}; use the tokenizer that belongs to these weights"
        )
