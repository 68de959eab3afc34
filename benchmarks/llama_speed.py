"""Prefill and decode speed of a GGUF file; run inside llama.cpp's environment.

python llama_speed.py MODEL.gguf TOKEN_IDS_JSON NEW_TOKENS REPEAT THREADS [plain]

plain: leave weights as they lie in the file, where what 0.3.36 repacks for AMX crashes.
"""

import json
import sys
import time

import llama_cpp
import numpy as np


def main() -> None:
    path, ids, new_tokens, repeat, threads = sys.argv[1], *map(json.loads, sys.argv[2:6])
    loading = llama_cpp.llama_model_default_params()
    loading.use_extra_bufts = "plain" not in sys.argv
    model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = len(ids) + new_tokens
    parameters.n_batch = parameters.n_ubatch = min(512, len(ids))
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp cannot open {path}")
    columns = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    runs = [measure(context, columns, ids, new_tokens) for _ in range(repeat + 1)][1:]
    prefill = sorted(len(ids) / first for first, _ in runs)[len(runs) // 2]
    decode = sorted((new_tokens - 1) / rest for _, rest in runs)[len(runs) // 2]
    print(json.dumps({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}))


def measure(
    context: llama_cpp.llama_context_p, columns: int, ids: list[int], new_tokens: int
) -> tuple[float, float]:
    """Seconds to the first token, and for all others; greedy."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    started = time.perf_counter()
    token = 0
    for start in range(0, len(ids), 512):
        token = run(context, columns, ids[start : start + 512])
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = run(context, columns, [token])
    return first, time.perf_counter() - started


def run(context: llama_cpp.llama_context_p, columns: int, tokens: list[int]) -> int:
    """The likeliest token behind these, which go behind those in the cache."""
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if code := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
        raise SystemExit(f"llama_decode ended with {code}")
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(logits, shape=(columns,)).argmax())


if __name__ == "__main__":
    main()
