"""llama.cpp's quantized files of a checkpoint, and their logits."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.measure import run_measured
from qwen2x.runtimes.runtime import Logits, TokenIds
from tests.foreign.environments import Environment, open_environment

_SCRIPT = Path(__file__).with_name("quality_llama_run.py")


def llama_environment() -> Environment:
    """llama-cpp-python, compiled for this machine once under ``.cache``.

    On machines with AMX it is compiled for everything but that: the weights that 0.3.36 repacks for
    AMX crash it, and the other kernels want them repacked as well to be fast.

    Raises:
        CannotInstallError: for want of a network or a compiler.
    """
    return open_environment("llama-cpp-avx512" if has_amx() else "llama-cpp")


def has_amx() -> bool:
    """Whether this machine multiplies tiles of integers; known on Linux, elsewhere it has none."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "amx_int8" in flags.read_text(encoding="utf-8")


def quantize_with_llama(
    environment: Environment, checkpoint: Path, out: Path, kind: str, *, has_words: bool = False
) -> None:
    """Writes ``out``; the float file that it is made of stays beside it for the next kind."""
    source = out.with_name("float32-words.gguf" if has_words else "float32.gguf")
    if not source.is_file():
        command = "write-words" if has_words else "write"
        run_measured([environment.python, _SCRIPT, command, checkpoint, source])
    run_measured([environment.python, _SCRIPT, "quantize", source, out, kind])


@dataclass(frozen=True, kw_only=True)
class LlamaFile:
    """A GGUF file. Every call is a process, since llama.cpp lives in another environment."""

    environment: Environment
    path: Path

    def logits(self, token_ids: TokenIds) -> Logits:
        """Float32 [1, sequence, vocab]."""
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            ids, out = Path(folder) / "ids.json", Path(folder) / "logits.npy"
            ids.write_text(json.dumps(token_ids[0].tolist()), encoding="utf-8")
            run_measured([self.environment.python, _SCRIPT, "logits", self.path, ids, out])
            rows: Logits = np.load(out)
        return rows[None]
