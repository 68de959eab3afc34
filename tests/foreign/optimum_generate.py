"""Runs in optimum's environment: a bundle in ``ORTModelForCausalLM``, greedy, with its KV cache.

Prints what it chose by itself, too: whether it binds inputs and outputs, and what it fed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main(folder: str, prompt: list[int], new_tokens: int, binding: str) -> dict[str, Any]:
    use_io_binding = {"default": None, "bound": True}[binding]
    model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=use_io_binding)
    calls: list[dict[str, Any]] = []
    if not model.use_io_binding:
        _record_calls(model.session, calls)
    # The checkpoint's own defaults sample and penalize repetition.
    tokens = model.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.0
    )
    return {
        "token_ids": tokens[0, len(prompt) :].tolist(),
        "use_io_binding": model.use_io_binding,
        "can_use_cache": model.can_use_cache,
        "input_names": list(model.input_names),
        "calls": calls,
    }


def _record_calls(session: Any, calls: list[dict[str, Any]]) -> None:
    """Notes per run: the mask's and the positions' values, and every other input's shape."""
    run = session.run

    def recording_run(names: Any, feed: dict[str, Any], *rest: Any) -> Any:
        valued = ("attention_mask", "position_ids")
        calls.append(
            {name: (x.tolist() if name in valued else list(x.shape)) for name, x in feed.items()}
        )
        return run(names, feed, *rest)

    session.run = recording_run


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
