"""Prefill and decode speed of a GGUF file in OpenVINO GenAI; run inside its environment.

python openvino_speed.py MODEL.gguf TOKEN_IDS_JSON NEW_TOKENS REPEAT THREADS
"""

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai


def main() -> None:
    path, ids, new_tokens, repeat, threads = sys.argv[1], *map(json.loads, sys.argv[2:6])
    options = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    pipeline = openvino_genai.LLMPipeline(path, "CPU", **options)
    # It keeps the cache of a prompt that it has read: each run has another one, and ids come last.
    turns = [ids[turn:] + ids[:turn] for turn in range(repeat, -1, -1)]
    runs = [measure(pipeline, turned, new_tokens) for turned in turns][1:]
    prefill = sorted(len(ids) / first for first, _ in runs)[len(runs) // 2]
    decode = sorted((new_tokens - 1) / rest for _, rest in runs)[len(runs) // 2]
    print(json.dumps({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}))


def measure(
    pipeline: openvino_genai.LLMPipeline, ids: list[int], new_tokens: int
) -> tuple[float, float]:
    """Seconds to the first token, and for all others; greedy, end tokens not before the end."""
    wanted = openvino_genai.GenerationConfig()
    wanted.max_new_tokens, wanted.ignore_eos, wanted.do_sample = new_tokens, True, False
    row = np.array([ids], np.int64)
    inputs = openvino_genai.TokenizedInputs(
        openvino.Tensor(row), openvino.Tensor(np.ones_like(row))
    )
    started = time.perf_counter()
    moments: list[float] = []

    class Watch(openvino_genai.StreamerBase):
        def write(self, token: object) -> openvino_genai.StreamingStatus:
            count = len(token) if isinstance(token, list) else 1
            moments.extend([time.perf_counter()] * count)
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing is kept back."""

    pipeline.generate(inputs, wanted, Watch())
    if len(moments) != new_tokens:
        raise SystemExit(f"expected {new_tokens} tokens, got {len(moments)}")
    return moments[0] - started, moments[-1] - moments[0]


if __name__ == "__main__":
    main()
