"""From a bundle on disk to tokens and logits."""

from qwen2x.runtimes.generate import generate
from qwen2x.runtimes.runtime import open_runtime

__all__ = ["generate", "open_runtime"]
