"""llama.cpp reads a prompt, run by the Python of its own environment.

    python long_prefill_llama.py MODEL.gguf IDS.json THREADS COUNT

Its own defaults: pieces of 512 tokens, a float16 cache, flash attention where it chooses so.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

PIECE = 512


def main(path: str, ids: str, threads: int, count: int) -> dict[str, Any]:
    tokens: list[int] = json.loads(Path(ids).read_text(encoding="utf-8"))[:count]
    loading = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = count
    parameters.n_batch = parameters.n_ubatch = PIECE
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp cannot open {path}")
    batch = llama_cpp.llama_batch_init(PIECE, 0, 1)
    started = time.perf_counter()
    for start in range(0, count, PIECE):
        _fill(batch, tokens[start : start + PIECE], start, count)
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise SystemExit(f"llama_decode ended with {code}")
    llama_cpp.llama_synchronize(context)
    seconds = time.perf_counter() - started
    return {
        "prompt_tokens": count,
        "tokens_per_s": count / seconds,
        "peak_memory_bytes": _peak_memory_bytes(),
    }


def _fill(batch: Any, tokens: list[int], start: int, count: int) -> None:
    """Only the prompt's last token gives logits."""
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place] = token
        batch.pos[place] = start + place
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = 0
        batch.logits[place] = start + place == count - 1


def _peak_memory_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    model, ids, threads, count = sys.argv[1:]
    print(json.dumps(main(model, ids, int(threads), int(count))))
