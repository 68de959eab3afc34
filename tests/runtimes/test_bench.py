from __future__ import annotations

import numpy as np
import pytest

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.bench import bench
from qwen2x.runtimes.cache_bookkeeping import CacheBookkeeping
from qwen2x.runtimes.runtime import Logits, Runtime, TokenIds


class Counting(CacheBookkeeping):
    """Notes the lengths of its runs."""

    max_context, vocab_size = 64, 8

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[int] = []

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        self.runs.append(token_ids.shape[1])
        return np.eye(8, dtype=np.float32)[:keep]

    def _truncate_cache(self, length: int) -> None:
        self.runs.append(-1)


def test_every_repeat_reads_the_prompt_and_decodes_all_but_its_first_token() -> None:
    runtime = Counting()
    speed = bench(runtime, [1, 2, 3], 10, 4, 2)  # type: ignore[arg-type]
    assert runtime.runs == [10, 1, 1, 1, -1] * 3
    assert speed.time_to_first_token_s > 0
    assert speed.prefill_tokens_per_s > 0
    assert speed.decode_tokens_per_s > 0


def test_the_clock_is_the_walls(example_runtime: Runtime) -> None:
    speed = bench(example_runtime, [1, 2, 3], 20, 5, 1)
    assert speed.prefill_tokens_per_s == pytest.approx(20 / speed.time_to_first_token_s)
    assert example_runtime.cache_length == 0


@pytest.mark.parametrize(
    ("text", "prompt", "new", "repeat", "message"),
    [
        ([1], 60, 5, 1, "has 60 tokens, the context 64, with 5"),
        ([], 5, 5, 1, "expected a text"),
        ([1], 0, 5, 1, "expected a text"),
        ([1], 5, 1, 1, "new tokens of 2 or more"),
        ([1], 5, 5, 0, "repeats of 1 or more"),
    ],
)
def test_nothing_to_measure_is_refused(
    text: list[int], prompt: int, new: int, repeat: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        bench(Counting(), text, prompt, new, repeat)  # type: ignore[arg-type]
