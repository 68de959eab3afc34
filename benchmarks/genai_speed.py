"""Prefill and decode speed of an onnxruntime-genai folder; run inside its environment.

python genai_speed.py FOLDER TOKEN_IDS_JSON NEW_TOKENS REPEAT THREADS
"""

import json
import sys
import time

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    folder, ids, new_tokens, repeat, threads = sys.argv[1], *map(json.loads, sys.argv[2:6])
    config = og.Config(folder)
    if threads:
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(overlay))
    model = og.Model(config)
    prompt = np.array(ids, np.int32)
    runs = [measure(model, prompt, new_tokens) for _ in range(repeat + 1)][1:]
    prefill = sorted(len(ids) / first for first, _ in runs)[len(runs) // 2]
    decode = sorted((new_tokens - 1) / rest for _, rest in runs)[len(runs) // 2]
    print(json.dumps({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}))


def measure(model: og.Model, prompt: np.ndarray, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for all others; greedy, end tokens not before the end."""
    length = len(prompt) + new_tokens
    params = og.GeneratorParams(model)
    params.set_search_options(
        do_sample=False, repetition_penalty=1.0, min_length=length, max_length=length
    )
    generator = og.Generator(model, params)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
    return first, time.perf_counter() - started


if __name__ == "__main__":
    main()
