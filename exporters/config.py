"""``config.json`` of a Qwen2 model: read, checked, refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2x.exporters.rope import Rope, read_rope
from qwen2x.exporters.stored_quantization import StoredQuantization, read_stored_quantization
from qwen2x.quantize.errors import ConfigError, SourceError

_LARGEST = {"vocab_size": 1 << 24, "num_hidden_layers": 1 << 12}
_LARGEST_DIMENSION = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """The numbers of a dense Qwen2 or Qwen2.5 model, named as in ``config.json``.

    ``raw`` is the file without ``quantization_config``, which ``quantization`` is read of.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    is_tied: bool
    rope: Rope
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any]
    quantization: StoredQuantization | None = None

    @property
    def query_size(self) -> int:
        """Columns of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Columns of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def cache_elements_per_token(self) -> int:
        """Keys and values of all layers for one position, in elements."""
        return 2 * self.num_hidden_layers * self.key_value_size

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the float model, by its Hugging Face name, with its shape."""
        hidden, inner = self.hidden_size, self.intermediate_size
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (self.query_size, hidden),
            "self_attn.q_proj.bias": (self.query_size,),
            "self_attn.k_proj.weight": (self.key_value_size, hidden),
            "self_attn.k_proj.bias": (self.key_value_size,),
            "self_attn.v_proj.weight": (self.key_value_size, hidden),
            "self_attn.v_proj.bias": (self.key_value_size,),
            "self_attn.o_proj.weight": (hidden, self.query_size),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        tensors: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for index in range(self.num_hidden_layers):
            for name, shape in layer.items():
                tensors[f"model.layers.{index}.{name}"] = shape
        tensors["model.norm.weight"] = (hidden,)
        if not self.is_tied:
            tensors["lm_head.weight"] = (self.vocab_size, hidden)
        return tensors

    @property
    def parameters(self) -> int:
        """The number of weights, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.expected_tensors().values())


def read_config(folder: Path, original_context: int | None = None) -> Qwen2Config:
    """The config of a checkpoint folder; eos ids from ``generation_config.json`` where it has any.

    Args:
        folder: of the checkpoint.
        original_context: positions that the model was trained with, if the config is silent.

    Raises:
        SourceError: there is no ``config.json``.
        ConfigError: it is not JSON, or not a model that we can carry over faithfully.
    """
    raw = read_json(folder / "config.json")
    if raw is None:
        raise SourceError(f"{folder} has no config.json; expected a Hugging Face model folder")
    generation = read_json(folder / "generation_config.json") or {}
    return parse_config(raw, generation, original_context)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def parse_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any], original_context: int | None = None
) -> Qwen2Config:
    """A checked config of the dictionaries in ``config.json`` and ``generation_config.json``."""
    _require_dense_qwen2(raw)
    layers = _dimension(raw, "num_hidden_layers")
    _refuse_sliding_window(raw, layers)
    hidden = _dimension(raw, "hidden_size")
    heads = _dimension(raw, "num_attention_heads")
    key_value_heads = _dimension(raw, "num_key_value_heads", heads)
    head_dim = _dimension(raw, "head_dim", hidden // heads)
    if raw.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
    if heads % key_value_heads:
        raise ConfigError(
            f"num_key_value_heads {key_value_heads} does not divide num_attention_heads {heads}"
        )
    if head_dim % 8:
        raise ConfigError(f"head_dim must be a multiple of 8, got {head_dim}")
    return Qwen2Config(
        vocab_size=_dimension(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_dimension(raw, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=_epsilon(raw),
        is_tied=_is_tied(raw),
        rope=read_rope(raw, head_dim, original_context),
        bos_token_id=_token_id(raw, generation, "bos_token_id"),
        pad_token_id=_token_id(raw, generation, "pad_token_id"),
        eos_token_ids=_eos(raw, generation),
        raw={key: value for key, value in raw.items() if key != "quantization_config"},
        quantization=_quantization(raw, layers),
    )


def _require_dense_qwen2(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type != "qwen2":
        named = f"{model_type!r}" + (" (mixture of experts)" if model_type == "qwen2_moe" else "")
        raise ConfigError(f"expected a Qwen2 model (model_type 'qwen2'), got {named}")
    architectures = raw.get("architectures") or ["Qwen2ForCausalLM"]
    if not isinstance(architectures, list) or "Qwen2ForCausalLM" not in architectures:
        raise ConfigError(f"expected the architecture Qwen2ForCausalLM, got {architectures!r}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act must be 'silu' for Qwen2, got {raw['hidden_act']!r}")
    if raw.get("dual_chunk_attention_config"):
        raise ConfigError(
            "dual_chunk_attention_config (the 1M models) is not supported; remove it to use the "
            "model within its native context"
        )


def _quantization(raw: Mapping[str, Any], layers: int) -> StoredQuantization | None:
    found = raw.get("quantization_config")
    return read_stored_quantization(found, layers) if found else None


def _refuse_sliding_window(raw: Mapping[str, Any], layers: int) -> None:
    """Transformers 5: with a window in use, layers from max_window_layers on slide."""
    listed = raw.get("layer_types")
    if listed is not None:
        if listed != ["full_attention"] * layers:
            raise ConfigError(
                f"expected layer_types to be full_attention for all {layers} layers (no sliding "
                f"window, as in every released Qwen2), got {listed!r}"
            )
        return
    first = raw.get("max_window_layers", 28)
    slides = bool(raw.get("use_sliding_window")) and raw.get("sliding_window", 4096) is not None
    if slides and (not isinstance(first, int) or first < layers):
        raise ConfigError(
            f"sliding window attention is in use (window {raw.get('sliding_window')}, from layer "
            f"{first}); expected use_sliding_window false, as in every released Qwen2"
        )


def _dimension(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    largest = _LARGEST.get(key, _LARGEST_DIMENSION)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ConfigError(
            f"config.json: {key} must be a whole number in 1..{largest}, got {value!r}"
        )
    return value


def _is_tied(raw: Mapping[str, Any]) -> bool:
    value = raw.get("tie_word_embeddings", False)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: tie_word_embeddings must be true or false, got {value!r}")
    return value


def _epsilon(raw: Mapping[str, Any]) -> float:
    value = raw.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigError(f"config.json: rms_norm_eps must lie between 0 and 1, got {value!r}")
    return float(value)


def _token_id(raw: Mapping[str, Any], generation: Mapping[str, Any], key: str) -> int | None:
    value = generation.get(key, raw.get(key))
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} must be a whole number or null, got {value!r}")


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    if value is None:
        value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise ConfigError(f"eos_token_id must be a whole number or a list, got {value!r}")
    outside = [item for item in ids if item >= _dimension(raw, "vocab_size")]
    if outside:
        raise ConfigError(
            f"eos_token_id {outside[0]} lies beyond the vocabulary of {raw['vocab_size']}"
        )
    return tuple(dict.fromkeys(ids))
