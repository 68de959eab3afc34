"""The judges of a graph: transformers' own Qwen2 in float32, and plain ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import Qwen2ForCausalLM
from transformers import logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

Float = NDArray[np.float32]
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


def load_judge(source: Path) -> Qwen2ForCausalLM:
    """Transformers' model of a checkpoint folder, in float32."""
    return Qwen2ForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def judge_logits(
    model: Qwen2ForCausalLM, input_ids: NDArray[np.int64], first_position: int = 0
) -> Float:
    """Logits float32 [batch, sequence, vocabulary] of unpadded rows."""
    ids = torch.from_numpy(input_ids)
    positions = torch.arange(first_position, first_position + ids.shape[1])[None].expand_as(ids)
    with torch.inference_mode():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits.float().numpy()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Logits and the cache after a call."""

    logits: Float
    cache: dict[str, NDArray[Any]]


class Session:
    """A graph in ONNX Runtime's CPU provider, with nothing of ours between."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.pasts = [
            item for item in self.session.get_inputs() if item.name.startswith("past_key_values.")
        ]

    def run(
        self,
        input_ids: NDArray[np.int64],
        *,
        cache: dict[str, NDArray[Any]] | None = None,
        attention_mask: NDArray[np.int64] | None = None,
        position_ids: NDArray[np.int64] | None = None,
        **optional: NDArray[Any],
    ) -> Outcome:
        """One call; without a mask all is valid, without positions they go on from the cache."""
        batch, new = input_ids.shape
        cache = self._empty_cache(batch) if cache is None else cache
        past = next(iter(cache.values())).shape[2]
        if attention_mask is None:
            attention_mask = np.ones((batch, past + new), np.int64)
        if position_ids is None:
            position_ids = np.tile(np.arange(past, past + new, dtype=np.int64), (batch, 1))
        feeds = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **cache,
            **optional,
        }
        names = [item.name for item in self.session.get_outputs()]
        values = dict(zip(names, self.session.run(names, feeds), strict=True))
        logits = values.pop("logits")
        renamed = {name.replace("present", "past_key_values"): v for name, v in values.items()}
        return Outcome(logits=logits, cache=renamed)

    def _empty_cache(self, batch: int) -> dict[str, NDArray[Any]]:
        return {
            item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), _NUMPY[item.type])
            for item in self.pasts
        }


def random_ids(batch: int, length: int, vocabulary: int = 2048) -> NDArray[np.int64]:
    """Token ids, the same each time."""
    return np.random.default_rng(7).integers(0, vocabulary, (batch, length), np.int64)
