"""Runs in onnxruntime-genai's environment: a bundle in ``og.Generator``, greedy."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as og


def main(folder: str, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    model = og.Model(folder)
    params = og.GeneratorParams(model)
    # The checkpoint's own defaults sample and penalize repetition.
    length = len(prompt) + new_tokens
    params.set_search_options(do_sample=False, repetition_penalty=1.0, max_length=length)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    tokens: list[int] = []
    while len(tokens) < new_tokens and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return {
        "token_ids": tokens,
        "model_type": model.type,
        "cache_shape": list(generator.get_output("present.0.key").shape),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))))
