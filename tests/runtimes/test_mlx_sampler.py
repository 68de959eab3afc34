"""The judge of the device's sampler is the host's, which transformers judges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen2x.runtimes.sampler import Sampler, Sampling

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy with penalty": {"temperature": 0.0, "repetition_penalty": 1.4},
    "plain": {},
    "temperature": {"temperature": 0.3},
    "tiny temperature": {"temperature": 1e-300, "top_p": 0.9},
    "top_k 1": {"top_k": 1},
    "top_k": {"top_k": 20},
    "top_k beyond the vocabulary": {"top_k": 10_000},
    "top_p": {"top_p": 0.8},
    "top_p tiny": {"top_p": 1e-6},
    "top_p nearly all": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "penalty down": {"repetition_penalty": 0.7},
    "as Qwen2.5-Instruct ships": {
        "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1
    },
    "all": {
        "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2
    },
}  # fmt: skip
DTYPES = {"cpu": "float64", "gpu": "float32"}


def random_logits(seed: int, size: int, *, ties: bool) -> NDArray[np.float32]:
    values = 3 * np.random.default_rng(seed).standard_normal(size)
    return (np.round(values * 2) / 2 if ties else values).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_device_and_host_choose_the_same_tokens(settings: dict[str, Any], dtype: str) -> None:
    from qwen2x.runtimes.mlx_sampler import MlxSampler

    for seed in range(12):
        sampling = Sampling(**{"temperature": 1.0, "seed": seed, **settings})
        size = (40, 300, 3000)[seed % 3]
        # Rows of a padded vocabulary, and a context that names some of them.
        known = size - 7
        context = np.random.default_rng(seed).integers(0, size, 30).tolist()
        host = Sampler(sampling, context)
        device = MlxSampler(sampling, context, known, getattr(mx, dtype))
        for step in range(8):
            logits = random_logits(100 * seed + step, size, ties=seed % 2 == 1)
            assert device.choose(mx.array(logits)).item() == host.choose(logits[:known])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_draws_follow_the_distribution_at_its_edges(dtype: str) -> None:
    from qwen2x.runtimes.mlx_sampler import MlxSampler

    class Edge:
        """The ends of what a generator of random numbers can give."""

        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    logits = mx.array([-np.inf, 1.0, 2.0, -np.inf, 1.5, -np.inf], mx.float32)
    for settings, first, last in (({}, 1, 4), ({"top_p": 0.99}, 2, 1), ({"top_k": 2}, 2, 4)):
        for value, expected in ((0.0, first), (1 - 2**-53, last)):
            sampler = MlxSampler(Sampling(temperature=1.0, **settings), [], 6, getattr(mx, dtype))
            sampler._random = Edge(value)  # type: ignore[assignment]
            assert sampler.choose(logits).item() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_no_token(temperature: float, value: float) -> None:
    from qwen2x.runtimes.mlx_sampler import FAILED, MlxSampler

    def choose(logits: NDArray[np.float32]) -> Any:
        return MlxSampler(Sampling(temperature=temperature), [], 50).choose(mx.array(logits)).item()

    logits = random_logits(0, 50, ties=False)
    logits[17] = value
    # One token that is impossible is no fault.
    assert (choose(logits) == FAILED) == (value != -np.inf)
    assert choose(np.full(50, value, np.float32)) == FAILED
