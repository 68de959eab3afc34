"""Transformers' own rotary embedding, with the YaRN factor of a config or with another one."""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

# What a config may say of its own factor alone.
_OF_ONE_FACTOR = ("attention_factor", "mscale", "mscale_all_dim")


class TorchRopes:
    """The ropes of one checkpoint.

    Args:
        config: transformers', as loaded.
        original_context: positions that the model was trained with, where its config is silent.
    """

    def __init__(self, config: Any, original_context: int | None) -> None:
        self._config = config
        self._own: dict[str, Any] = dict(config.rope_parameters or {})
        self._is_yarn = self._own.get("rope_type") == "yarn"
        self._is_told = original_context is not None
        self._positions = int(config.max_position_embeddings)
        named = self._own.get("original_max_position_embeddings") if self._is_yarn else None
        self._native = int(original_context or named or self._positions)
        factor = (self._own.get("factor") or self._positions / self._native) if self._is_yarn else 1
        self.factor = float(factor)

    def embedding(self, factor: float) -> Any:
        """The module; of the checkpoint's own factor as its config has it, unless that is told."""
        is_own = factor == self.factor
        if is_own and not self._is_told:
            return Qwen2RotaryEmbedding(self._config)
        changed = copy.deepcopy(self._config)
        changed.rope_parameters = self._plain()
        if factor != 1 or (is_own and self._is_yarn):
            kept = self._own if self._is_yarn else self._plain()
            changed.rope_parameters = {
                key: value for key, value in kept.items() if is_own or key not in _OF_ONE_FACTOR
            } | {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": self._native,
            }
        return Qwen2RotaryEmbedding(changed)

    def context(self, factor: float) -> int:
        """YaRN reaches factor times the original length, whatever max_position_embeddings says."""
        reach = math.ceil(factor * self._native)
        is_as_configured = factor == self.factor and not self._is_told
        return max(self._positions, reach) if is_as_configured else reach

    def _plain(self) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self._own["rope_theta"]}
