"""``config.json`` of an MLX folder: the checkpoint's, in the spelling that MLX programs read.

mlx-lm 0.32 (``models/qwen2.py``, ``models/rope_utils.py``) drops keys that it does not know in
silence. It reads ``rope_theta`` and ``rope_scaling`` but not ``rope_parameters``, ties the head
unless it is told not to, needs ``rms_norm_eps``, and takes YaRN's attention factor from ``mscale``
alone.
"""

from __future__ import annotations

import math
from typing import Any

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.rope import Rope
from qwen2x.quantize.scheme import Scheme

# The second row is what transformers does not read of a Qwen2, and mlx-lm would: other weights, an
# architecture in a Python file, another order of the rotated pairs.
_DROPPED = (
    "_name_or_path", "rope_parameters", "rope_scaling", "rope_theta", "dtype",
    "quantization", "quantization_config", "model_file", "rope_traditional",
)  # fmt: skip
_CLOSE = 1e-9


def mlx_config(
    config: Qwen2Config, dtype: str, scheme: Scheme | None, overrides: dict[str, Scheme | None]
) -> dict[str, Any]:
    """The dictionary, keys sorted.

    Args:
        config: the checkpoint's.
        dtype: float type of the weights.
        scheme: of the matrices that are not named in ``overrides``; None: all are floats.
        overrides: schemes by module path, of those whose scheme may be another one.
    """
    rope = config.rope
    written = {key: value for key, value in config.raw.items() if key not in _DROPPED}
    written |= {
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": _yarn(rope) if rope.is_yarn else None,
        "tie_word_embeddings": config.is_tied,
        "torch_dtype": dtype,
    }
    if scheme is not None:
        settings = _settings(scheme)
        named = {path: _settings(other) if other else False for path, other in overrides.items()}
        settings |= {path: own for path, own in named.items() if own != settings}
        written |= {"quantization": settings, "quantization_config": settings}
    return dict(sorted(written.items()))


def unread_by_mlx_lm(config: Qwen2Config) -> list[str]:
    """What mlx-lm ignores of a model that our own runtime follows, in words; mostly nothing."""
    notes, rope = [], config.rope
    if rope.is_yarn and not rope.truncate:
        notes.append("mlx-lm ignores rope_scaling's truncate: false and rounds YaRN's ramp")
    if rope.is_yarn and rope.factor <= 1 and abs(rope.attention_factor - 1) > _CLOSE:
        notes.append("mlx-lm takes 1 for attention_factor where YaRN's factor is not above 1")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        notes.append("mlx-lm takes hidden_size / num_attention_heads for head_dim")
    return notes


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}


def _yarn(rope: Rope) -> dict[str, Any]:
    """Written out in full: mlx-lm's defaults differ from transformers'."""
    scaling: dict[str, Any] = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "attention_factor": rope.attention_factor,
    }
    if not rope.truncate:
        scaling["truncate"] = False
    usual = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    if abs(rope.attention_factor - usual) > _CLOSE and rope.factor > 1:
        # mlx-lm multiplies by (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1);
        # transformers ignores both beside an attention factor.
        scaling["mscale"] = (rope.attention_factor - 1) / (0.1 * math.log(rope.factor))
        scaling["mscale_all_dim"] = 0
    return scaling
