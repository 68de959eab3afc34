"""How far transformers' own logits move when its products are disturbed, by layout of positions.

    python -m benchmarks.gap_noise CHECKPOINT [--noise 0.003] [--seeds 3]

The layouts are those of ``validate --long``: tokens in a row, and half of them behind a gap. After
every matrix product of a layer its output is changed by noise of that relative size. Behind a gap
the KL divergence is larger by the ratio; so rounding alone is larger there, whoever rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measure import write_result
from qwen2x.cli.judging import read_text
from qwen2x.runtimes.compare import kl_divergence
from qwen2x.runtimes.runtime import Logits
from qwen2x.runtimes.tokenizer import Tokenizer
from qwen2x.runtimes.torch_runtime import TorchRuntime

TOKENS, HALF = 48, 24
FACTORS = (1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--noise", type=float, default=0.003)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    judge = TorchRuntime(args.checkpoint, yarn=FACTORS)
    ids = np.array([Tokenizer(args.checkpoint).encode(read_text(None))[:TOKENS]])
    found: list[dict[str, Any]] = []
    for factor, context in judge.rope_contexts.items():
        judge.use_rope(factor)
        for position in [end for end in judge.rope_contexts.values() if end <= context]:
            start = position - (TOKENS - HALF)
            layouts = {
                "row": [*range(position - TOKENS, position)],
                "gap": [*range(HALF), *range(start, position)],
            }
            moved = {
                layout: median(
                    moved_by_noise(judge, ids, places, args.noise, seed)
                    for seed in range(args.seeds)
                )
                for layout, places in layouts.items()
            }
            ratio = moved["gap"] / moved["row"]
            found.append({"factor": factor, "last_position": position - 1, **moved, "ratio": ratio})
    write_result("gap_noise", {"noise": args.noise, "seeds": args.seeds, "kl_median": found})


def moved_by_noise(
    judge: TorchRuntime, ids: Any, places: list[int], noise: float, seed: int
) -> float:
    """The median KL divergence, over the second half of the tokens, in nats."""
    plain: Logits = judge.logits(ids, positions=places)[0]
    with disturbed(judge, noise, seed):
        other: Logits = judge.logits(ids, positions=places)[0]
    return float(np.median(kl_divergence(plain, other)[HALF:]))


@contextmanager
def disturbed(judge: TorchRuntime, noise: float, seed: int) -> Iterator[None]:
    """Noise behind every linear module of the layers."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: Any, inputs: Any, output: Any) -> Any:
        return output * (1 + noise * torch.randn(output.shape, generator=generator))

    layers = judge._model.model.layers
    hooks = [
        module.register_forward_hook(disturb)
        for module in layers.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    main()
