"""llama.cpp, run by the Python of its own environment.

    python quality_llama_run.py write CHECKPOINT FLOAT.gguf     every tensor in float32
    python quality_llama_run.py write-words CHECKPOINT FLOAT.gguf    and the vocabulary
    python quality_llama_run.py quantize FLOAT.gguf OUT.gguf TYPE    TYPE is one of TYPES
    python quality_llama_run.py logits MODEL.gguf IDS.json OUT.npy    float32 [tokens, vocab]

Files have no vocabulary but where a runtime does not open them without one: tokens come as ids, and
a file's bytes are those of its weights.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import ml_dtypes  # noqa: F401  lets numpy read the checkpoint's bfloat16
import numpy as np
from gguf import GGUFWriter, TokenType
from safetensors import safe_open

TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "Q4_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
_FLOAT32 = 0
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(checkpoint: Path, out: Path, *, has_words: bool = False) -> None:
    """The checkpoint as a GGUF file in float32, which holds bfloat16 and float16 exactly."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    writer = GGUFWriter(str(out), "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if has_words:
        _add_words(writer, checkpoint, config["vocab_size"])
    else:
        writer.add_tokenizer_model("no_vocab")
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                if name != "lm_head.weight" or not config["tie_word_embeddings"]:
                    writer.add_tensor(_gguf_name(name), tensors.get_tensor(name).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_words(writer: GGUFWriter, checkpoint: Path, rows: int) -> None:
    """The byte-pair vocabulary and its merges, with a filler for every row without a token."""
    known = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    words = {place: (word, TokenType.NORMAL) for word, place in known["model"]["vocab"].items()}
    for added in known["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        words[added["id"]] = (added["content"], kind)
    filled = [words.get(row, (f"<unused {row}>", TokenType.UNUSED)) for row in range(rows)]
    merges = known["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([word for word, _ in filled])
    writer.add_token_types([kind for _, kind in filled])
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    end = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    writer.add_eos_token_id(end[0] if isinstance(end, list) else end)
    writer.add_bos_token_id(end[-1] if isinstance(end, list) else end)


def quantize(source: Path, out: Path, kind: str) -> None:
    """llama.cpp's own mixture of types under this name, without an importance matrix."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[kind]
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(parameters)
    )
    if code:
        raise SystemExit(f"llama_model_quantize ended with {code}")


def logits(path: Path, ids: Path, out: Path) -> None:
    """Logits of every position in one batch; the cache is float32, so that it adds no error."""
    tokens: list[int] = json.loads(ids.read_text(encoding="utf-8"))
    loading = llama_cpp.llama_model_default_params()
    # Weights stay as they are: with those that 0.3.36 repacks for AMX, llama_decode crashed.
    loading.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = len(tokens)
    parameters.type_k = parameters.type_v = _FLOAT32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp cannot open {path}")
    code = llama_cpp.llama_decode(context, _batch(tokens))
    if code:
        raise SystemExit(f"llama_decode ended with {code}")
    columns = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = np.ctypeslib.as_array(
        llama_cpp.llama_get_logits(context), shape=(len(tokens) * columns,)
    )
    np.save(out, rows.reshape(len(tokens), columns))


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{_NAMES[part]}.{kind}"
    return f"{_NAMES[module]}.{kind}"


def _batch(tokens: list[int]) -> Any:
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = True
    return batch


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command in ("write", "write-words"):
        write(Path(words[0]), Path(words[1]), has_words=command == "write-words")
    elif command == "quantize":
        quantize(Path(words[0]), Path(words[1]), words[2])
    else:
        logits(Path(words[0]), Path(words[1]), Path(words[2]))
