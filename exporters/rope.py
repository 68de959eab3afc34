"""Rotary positions: how a config spells them, and the frequencies that follow, YaRN included.

The numbers are those of transformers 5 (``modeling_rope_utils.py``: ``_compute_yarn_parameters``),
computed in the same order and the same float32 steps, so that angles agree at long positions too.
YaRN is https://arxiv.org/abs/2309.00071.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2x.quantize.errors import ConfigError

DEFAULT_THETA = 10_000.0
NATIVE_POSITIONS = 32_768
_LARGEST_POSITIONS = 1 << 24
_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "partial_rotary_factor",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of one model. ``factor`` 1 with ``is_yarn`` false is the plain one."""

    theta: float
    head_dim: int
    max_position_embeddings: int
    is_yarn: bool = False
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def max_positions(self) -> int:
        """Positions that the model can be used for: YaRN reaches factor times the original."""
        if not self.is_yarn:
            return self.max_position_embeddings
        reach = math.ceil(self.factor * self.original_max_position_embeddings)
        return max(self.max_position_embeddings, reach)

    def inverse_frequencies(self) -> NDArray[np.float32]:
        """Radians per position, float32 [head_dim / 2]."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        # Correctly rounded powers: within 1 ulp of PyTorch's vectorised float32 power.
        powers = (np.float64(self.theta) ** exponents.astype(np.float64)).astype(np.float32)
        plain: NDArray[np.float32] = np.float32(1) / powers
        if not self.is_yarn:
            return plain
        stretched = np.float32(1) / (np.float32(self.factor) * powers)
        keep = np.float32(1) - self._ramp()
        frequencies: NDArray[np.float32] = stretched * (np.float32(1) - keep) + plain * keep
        return frequencies

    def _ramp(self) -> NDArray[np.float32]:
        """0 where a pair keeps its frequency, 1 where it is stretched; float32 [head_dim / 2]."""
        low, high = self._pair_turning(self.beta_fast), self._pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001
        pairs = np.arange(self.head_dim // 2, dtype=np.float32)
        ramp: NDArray[np.float32] = (pairs - np.float32(low)) / np.float32(high - low)
        return np.clip(ramp, np.float32(0), np.float32(1))

    def _pair_turning(self, turns: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        length = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return self.head_dim * math.log(length) / (2 * math.log(self.theta))


def read_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embedding that a Hugging Face config describes, in any of its three spellings.

    Raises:
        ConfigError: unknown type or key, two spellings that contradict, values out of range.
    """
    settings = _merge_spellings(config)
    unknown = sorted(set(settings) - _KEYS)
    if unknown:
        raise ConfigError(
            f"rope settings: unknown key {', '.join(unknown)}; "
            f"expected only {', '.join(sorted(_KEYS))}"
        )
    kind = _kind(settings)
    theta = _number(settings, "rope_theta", DEFAULT_THETA)
    if theta <= 1:
        raise ConfigError(f"rope_theta must be greater than 1, got {theta}")
    positions = _positions(config, "max_position_embeddings", NATIVE_POSITIONS)
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(
            f"partial_rotary_factor must be 1 for Qwen2, got {settings['partial_rotary_factor']}"
        )
    if kind == "default":
        return Rope(theta=theta, head_dim=head_dim, max_position_embeddings=positions)
    return _read_yarn(settings, theta, head_dim, positions)


def _merge_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` (transformers 5), ``rope_scaling`` (4), and what may stand outside."""
    merged: dict[str, Any] = {}
    for source in ("rope_parameters", "rope_scaling"):
        settings = config.get(source) or {}
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{source} must be an object or null, got {settings!r}")
        for key, value in settings.items():
            if merged.get(key) is None:
                merged[key] = value
            elif value is not None and merged[key] != value:
                raise ConfigError(
                    f"rope_parameters and rope_scaling contradict: {key} is {merged[key]!r} in one "
                    f"and {value!r} in the other; keep one of them"
                )
    for key in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor"):
        value = config.get(key)
        if value is not None and merged.get(key) not in (None, value):
            raise ConfigError(
                f"{key} is {value!r} but the rope settings say {merged[key]!r}; keep one"
            )
        if value is not None:
            merged[key] = value
    return merged


def _kind(settings: Mapping[str, Any]) -> str:
    kinds = {str(settings[key]) for key in ("type", "rope_type") if settings.get(key) is not None}
    if len(kinds) > 1:
        raise ConfigError(f"rope type and rope_type contradict: {' and '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    if kind not in ("default", "yarn"):
        raise ConfigError(f"rope type {kind!r} is not used by Qwen2; expected 'default' or 'yarn'")
    if kind == "default" and settings.get("factor") not in (None, 1, 1.0):
        raise ConfigError(
            f"rope settings have factor {settings['factor']} but no type; "
            'add "rope_type": "yarn" or remove the factor'
        )
    return kind


def _read_yarn(settings: Mapping[str, Any], theta: float, head_dim: int, positions: int) -> Rope:
    given = settings.get("original_max_position_embeddings")
    if given is None and positions > NATIVE_POSITIONS:
        raise ConfigError(
            "yarn needs original_max_position_embeddings (32768 for Qwen2): "
            f"max_position_embeddings is {positions}, which is not what the model was "
            "trained with; add it to the rope settings"
        )
    original = _positions(settings, "original_max_position_embeddings", positions)
    if "factor" not in settings:
        raise ConfigError('yarn needs a factor, got none; add "factor" to the rope settings')
    factor = _number(settings, "factor", positions / original)
    truncate = settings.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"rope truncate must be true or false, got {truncate!r}")
    return Rope(
        theta=theta,
        head_dim=head_dim,
        max_position_embeddings=positions,
        is_yarn=True,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_attention_factor(settings, factor),
        beta_fast=_number(settings, "beta_fast", 32.0, zero_is_default=True),
        beta_slow=_number(settings, "beta_slow", 1.0, zero_is_default=True),
        truncate=truncate,
    )


def _attention_factor(settings: Mapping[str, Any], factor: float) -> float:
    """What multiplies cos and sin: given, or from both mscales, or from the factor alone."""
    if settings.get("attention_factor") is not None:
        return _number(settings, "attention_factor", 1.0)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        above, below = _number(settings, "mscale", 1), _number(settings, "mscale_all_dim", 1)
        return magnitude(above) / magnitude(below)
    return magnitude(1.0)


def _positions(settings: Mapping[str, Any], key: str, default: int) -> int:
    value = settings.get(key)
    if value is None:
        return default
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not 1 <= value <= _LARGEST_POSITIONS:
        raise ConfigError(f"{key} must be a whole number in 1..{_LARGEST_POSITIONS}, got {value!r}")
    return int(value)


def _number(
    settings: Mapping[str, Any], key: str, default: float, *, zero_is_default: bool = False
) -> float:
    value = settings.get(key)
    if value is None or (zero_is_default and value == 0):
        return float(default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"rope {key} must be a number, got {value!r}")
    if not 0 < value < 1e30:
        raise ConfigError(f"rope {key} must be a positive number, got {value!r:.40}")
    return float(value)
