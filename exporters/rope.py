"""Rotary positions: how a config spells them, and the frequencies that follow, YaRN included.

The numbers are those of transformers 5 (``modeling_rope_utils.py``: ``_compute_yarn_parameters``),
computed in the same order and the same float32 steps, so that angles agree at long positions too:
bit for bit for head sizes of 64 and 128. YaRN is https://arxiv.org/abs/2309.00071.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2x.exporters.float32_power import float32_power
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
    """Rotary embedding of one model. ``factor`` 1 with ``is_yarn`` false is the plain one.

    ``original_max_position_embeddings`` 0 is what the config does not say.
    """

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

    @property
    def native_positions(self) -> int:
        """Positions that the model was trained with, which YaRN stretches."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    def with_factor(self, factor: float) -> Rope:
        """The same model with another YaRN factor, 1 for none.

        Raises:
            ConfigError: what this factor stretches, or what its attention factor is, is not known.
        """
        if self.is_yarn and factor == self.factor:
            return self
        native = self.native_positions
        if factor == 1:
            return replace(self, is_yarn=False, factor=1.0, attention_factor=1.0,
                           max_position_embeddings=native)  # fmt: skip
        if not self.original_max_position_embeddings and native > NATIVE_POSITIONS:
            raise _unknown_length(native)
        if self.is_yarn and self.attention_factor != _magnitude(self.factor):
            raise ConfigError(
                f"the rope settings give YaRN factor {self.factor:g} an attention factor of its "
                f"own ({self.attention_factor:g}), which says nothing of factor {factor:g}; "
                f"expected --yarn 1,{self.factor:g} or one of both"
            )
        return replace(self, is_yarn=True, factor=float(factor), max_position_embeddings=native,
                       original_max_position_embeddings=native,
                       attention_factor=_magnitude(factor))  # fmt: skip

    def inverse_frequencies(self) -> NDArray[np.float32]:
        """Radians per position, float32 [head_dim / 2]."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        powers = float32_power(self.theta, exponents)
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


def rope_facts(ropes: Sequence[Rope], max_context: int, default_factor: float) -> dict[str, Any]:
    """The manifest's ``rope``: one entry per YaRN factor in its lists.

    The default factor is the one that other programs run.
    """
    return {
        "theta": ropes[0].theta,
        "factors": [rope.factor for rope in ropes],
        "contexts": [min(max_context, rope.max_positions) for rope in ropes],
        "default_factor": default_factor,
        "original_max_position_embeddings": ropes[0].native_positions,
        "attention_factors": [rope.attention_factor for rope in ropes],
        "max_context": max_context,
    }


def read_rope(
    config: Mapping[str, Any], head_dim: int, original_context: int | None = None
) -> Rope:
    """The rotary embedding that a Hugging Face config describes, in any of its three spellings.

    Args:
        config: ``config.json``.
        head_dim: of the model.
        original_context: positions that it was trained with, where the config does not say so.

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
    original = _original_positions(settings, positions, original_context)
    if kind == "default":
        # A length that only the config names belongs to no stretching.
        original = original if original_context else None
        return Rope(theta=theta, head_dim=head_dim, max_position_embeddings=positions,
                    original_max_position_embeddings=original or 0)  # fmt: skip
    if original is None and positions > NATIVE_POSITIONS:
        raise _unknown_length(positions)
    return _read_yarn(settings, theta, head_dim, positions, original or positions)


def _original_positions(
    settings: Mapping[str, Any], positions: int, given: int | None
) -> int | None:
    """What the settings or the user say; None where both are silent."""
    key = "original_max_position_embeddings"
    if given is None:
        return None if settings.get(key) is None else _positions(settings, key, positions)
    if settings.get(key) not in (None, given):
        raise ConfigError(
            f"--original-context is {given}, but the rope settings of config.json say {key} "
            f"{settings[key]!r}; leave the option out"
        )
    if not 1 <= given <= positions:
        raise ConfigError(
            f"--original-context must be in 1..{positions} (max_position_embeddings), got {given}"
        )
    return given


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


def _unknown_length(positions: int) -> ConfigError:
    return ConfigError(
        "YaRN needs original_max_position_embeddings, the length that the model was trained with: "
        f"max_position_embeddings is {positions}, expected at most {NATIVE_POSITIONS} without it; "
        f'add "original_max_position_embeddings": {NATIVE_POSITIONS} to the rope settings in '
        f"config.json, or export with --original-context {NATIVE_POSITIONS}"
    )


def _read_yarn(
    settings: Mapping[str, Any], theta: float, head_dim: int, positions: int, original: int
) -> Rope:
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

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        above, below = _number(settings, "mscale", 1), _number(settings, "mscale_all_dim", 1)
        return _magnitude(factor, above) / _magnitude(factor, below)
    return _magnitude(factor)


def _magnitude(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


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
