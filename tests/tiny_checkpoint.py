"""Tiny random Qwen2 checkpoints on disk, in the shapes and spellings that released ones have."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from safetensors.numpy import save_file

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-qwen2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}


def write_tiny_checkpoint(
    folder: Path,
    *,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 2048,
    head_dim: int | None = None,
    is_tied: bool = True,
    dtype: str = "bfloat16",
    max_shard_bytes: int | None = None,
    seed: int = 0,
    max_position_embeddings: int = 512,
    **config_changes: Any,
) -> Path:
    """Writes config, random weights, generation config and the tokenizer of the example.

    Args:
        folder: created, and returned.
        hidden_size: like the arguments after it, the config's key of that name.
        intermediate_size: see above.
        num_hidden_layers: see above.
        num_attention_heads: see above.
        num_key_value_heads: see above.
        vocab_size: rows of the embedding; the tokenizer knows 2016 tokens.
        head_dim: written only if given.
        is_tied: without it an ``lm_head.weight`` is stored.
        dtype: ``float32``, ``float16`` or ``bfloat16``, of all tensors.
        max_shard_bytes: splits the weights into shards of at most this size, with an index.
        seed: of the weights.
        max_position_embeddings: the config's key of that name.
        **config_changes: more keys of ``config.json``; None removes a key.
    """
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "vocab_size": vocab_size,
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": is_tied,
        "use_sliding_window": False,
        "sliding_window": max_position_embeddings,
        "max_window_layers": num_hidden_layers,
        "bos_token_id": 2013,
        "eos_token_id": 2015,
        "torch_dtype": dtype,
    }
    config = {key: value for key, value in (config | config_changes).items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("generation_config.json", *TOKENIZER_FILES):
        shutil.copyfile(EXAMPLE / name, folder / name)
    write_weights(folder, random_tensors(config, seed, dtype), max_shard_bytes)
    return folder


def random_tensors(config: dict[str, Any], seed: int, dtype: str) -> dict[str, NDArray[Any]]:
    """Every tensor of the model, named as in Hugging Face checkpoints.

    Matrices keep the size of what they multiply, norms lie around 1, and the q/k/v biases are of
    the size of what they are added to, so that an error in any of them shows in the logits.
    """
    random = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    widths = {
        "q_proj": heads * head_dim,
        "k_proj": kv_heads * head_dim,
        "v_proj": kv_heads * head_dim,
    }

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        values = random.standard_normal((rows, columns), np.float32) / math.sqrt(columns)
        return values.astype(_DTYPES[dtype])

    def vector(size: int, centre: float, spread: float) -> NDArray[Any]:
        values = centre + spread * random.standard_normal(size, np.float32)
        return values.astype(_DTYPES[dtype])

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, width in widths.items():
            tensors[f"{layer}.self_attn.{name}.weight"] = matrix(width, hidden)
            tensors[f"{layer}.self_attn.{name}.bias"] = vector(width, 0, 0.5)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim)
        tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[f"{layer}.mlp.up_proj.weight"] = matrix(inner, hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = matrix(hidden, inner)
        tensors[f"{layer}.input_layernorm.weight"] = vector(hidden, 1, 0.1)
        tensors[f"{layer}.post_attention_layernorm.weight"] = vector(hidden, 1, 0.1)
    tensors["model.norm.weight"] = vector(hidden, 1, 0.1)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def write_weights(
    folder: Path, tensors: dict[str, NDArray[Any]], max_shard_bytes: int | None = None
) -> None:
    """One file, or with a limit as many as it takes and their index."""
    if max_shard_bytes is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    shards: list[dict[str, NDArray[Any]]] = [{}]
    for name, values in tensors.items():
        if (
            shards[-1]
            and sum(v.nbytes for v in shards[-1].values()) + values.nbytes > max_shard_bytes
        ):
            shards.append({})
        shards[-1][name] = values
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
