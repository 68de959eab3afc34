"""transformers' answers to windows of text, kept on disk, and how far others are from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import ROOT
from qwen2x.runtimes.compare import GivesLogits
from qwen2x.runtimes.runtime import Runtime, open_runtime

_ROWS_AT_ONCE = 64
_CACHE = ROOT / ".cache" / "quality"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one text. KL divergence of the reference to the candidate, in nats per position."""

    positions: int
    kl_mean: float
    kl_mean_standard_error: float
    kl_p99: float
    top1_agreement: float


class Reference:
    """transformers in float32: log-probabilities of windows, kept under ``.cache``, 300 MB each."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._folder = _CACHE / _fingerprint(checkpoint)

    def figures(self, candidate: GivesLogits, windows: Sequence[Sequence[int]]) -> Figures:
        """Runs a candidate over windows.

        In float32 and by torch, since ``qwen2x.runtimes.compare`` takes longer than the models do;
        the two agree to 1e-8 nats.
        """
        divergences: list[torch.Tensor] = []
        agreed = 0
        for window in windows:
            expected = self.log_probabilities(window)
            given = torch.from_numpy(candidate.logits(np.array([window], np.int64))[0])
            for start in range(0, len(window), _ROWS_AT_ONCE):
                p, q = (rows[start : start + _ROWS_AT_ONCE] for rows in (expected, given))
                agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
                divergences.append(kl_divergence(p, log_softmax(q)))
        kl = torch.cat(divergences).clamp(min=0)
        return Figures(
            positions=len(kl),
            kl_mean=float(kl.mean()),
            kl_mean_standard_error=float(kl.std() / len(kl) ** 0.5),
            kl_p99=float(kl.quantile(0.99)),
            top1_agreement=agreed / len(kl),
        )

    def log_probabilities(self, window: Sequence[int]) -> torch.Tensor:
        """Float32 [tokens, vocab], from the cache or by running the model."""
        ids = np.array([window], np.int64)
        path = self._folder / f"{hashlib.sha256(ids.tobytes()).hexdigest()[:16]}.npy"
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = log_softmax(torch.from_numpy(self._runtime.logits(ids)[0]))
            partial = path.with_suffix(".part.npy")
            np.save(partial, rows.numpy())
            partial.replace(path)
        return torch.from_numpy(np.load(path, mmap_mode="c"))

    @cached_property
    def _runtime(self) -> Runtime:
        return open_runtime(self._checkpoint, backend="torch")


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Nats per row, float64 [rows], of log-probabilities [rows, vocab]."""
    return (p.exp() * (p - q)).sum(-1, dtype=torch.float64)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Float32, but for the sum: torch's own is wrong by 2e-6 with so many columns."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True, dtype=torch.float64).log().float()


def _fingerprint(checkpoint: Path) -> str:
    """Names the checkpoint's content without reading it, and the versions that ran it."""
    files = [path.stat() for path in sorted(checkpoint.glob("*.safetensors"))]
    parts = [
        (checkpoint / "config.json").read_text(encoding="utf-8"),
        *(f"{file.st_size} {file.st_mtime_ns}" for file in files),
        *(metadata.version(name) for name in ("torch", "transformers")),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
