"""``genai_config.json``, which onnxruntime-genai reads instead of the graph's own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.onnx_target import Target


def genai_config(
    config: Qwen2Config, target: Target, max_context: int, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """The dictionary that onnxruntime-genai 0.18 expects (``src/config.cpp``)."""
    providers = [] if target.device == "cpu" else [{target.device: {"enable_cuda_graph": "0"}}]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
        "filename": "model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    eos = list(config.eos_token_ids)
    model = {
        "type": "qwen2",
        "vocab_size": config.vocab_size,
        "context_length": max_context,
        "eos_token_id": eos,
        "bos_token_id": _first(config.bos_token_id, eos),
        "pad_token_id": _first(config.pad_token_id, eos),
        "decoder": decoder,
    }
    search = {
        "max_length": max_context,
        "past_present_share_buffer": target.is_fused,
        "do_sample": bool(generation.get("do_sample", False)),
        "temperature": generation.get("temperature", 1.0),
        "top_k": generation.get("top_k", 50),
        "top_p": generation.get("top_p", 1.0),
        "repetition_penalty": generation.get("repetition_penalty", 1.0),
        "num_beams": 1,
    }
    return {"model": model, "search": search}


def _first(value: int | None, fallback: list[int]) -> int:
    if value is not None:
        return value
    return fallback[0] if fallback else 0
