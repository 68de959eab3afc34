"""The memory that an answer will take, told before anything is loaded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from qwen2x.exporters.bundle import Bundle
from qwen2x.runtimes.backends import import_backend
from qwen2x.runtimes.memory import require_memory
from qwen2x.runtimes.memory_needs import Chunking
from qwen2x.runtimes.rope_choice import Yarn, choose_rope
from qwen2x.runtimes.runtime import DEFAULT_CHUNK, DEFAULT_PREFILL_MEMORY

# Interpreter, backend and tokenizer: about what onnxruntime 1.32 takes on Linux beside weights.
LIBRARY_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a prompt and its answer take.

    Attributes:
        prompt_tokens: of the prompt.
        new_tokens: of the answer, at most.
        rope_factor: YaRN's, 1 for none.
        max_context: positions that it reaches.
        weight_bytes: as they lie on disk.
        chunking: how the prompt is run.
        free_bytes: that a cache and all else may take; None where nobody says.
    """

    prompt_tokens: int
    new_tokens: int
    rope_factor: float
    max_context: int
    weight_bytes: int
    chunking: Chunking
    free_bytes: int | None

    @property
    def positions(self) -> int:
        """Of the cache, in the end."""
        return self.prompt_tokens + self.new_tokens

    @property
    def cache_bytes(self) -> int:
        """For all positions."""
        return self.positions * self.chunking.needs.per_position

    @property
    def work_bytes(self) -> int:
        """For the piece of the prompt that takes most."""
        return self.chunking.work_bytes(0, self.prompt_tokens)

    @property
    def chunks(self) -> tuple[int, int]:
        """Tokens of the prompt that are run at once at its beginning, and at its end."""
        first, last = (self.chunking.size(past) for past in (0, max(0, self.prompt_tokens - 1)))
        return min(first, self.prompt_tokens), min(last, self.prompt_tokens)

    @property
    def peak_bytes(self) -> int:
        """Of the process, about."""
        return self._beside_cache + self.cache_bytes

    @property
    def fitting(self) -> int | None:
        """Positions that memory holds; None where nobody says."""
        if self.free_bytes is None:
            return None
        rest = max(0, self.free_bytes - self._beside_cache)
        return min(self.max_context, rest // self.chunking.needs.per_position)

    def require_fits(self, new_tokens: int) -> None:
        """Refuses a prompt and so many new tokens that memory has no room for.

        Raises:
            RequestError: with the tokens that would fit.
        """
        require_memory(
            self.prompt_tokens + new_tokens,
            taken=0,
            bytes_per_position=self.chunking.needs.per_position,
            free=self.free_bytes,
            beside=self._beside_cache,
        )

    @property
    def _beside_cache(self) -> int:
        return self.weight_bytes + self.work_bytes + LIBRARY_BYTES


def footprint_of(
    bundle: Bundle,
    *,
    prompt_tokens: int,
    new_tokens: int | None,
    yarn: Yarn = "auto",
    device: str = "auto",
    kv_bits: int | None = None,
    prefill_chunk: int = DEFAULT_CHUNK,
    prefill_memory: int = DEFAULT_PREFILL_MEMORY,
) -> Footprint:
    """What a bundle would take; nothing but its backend's library is loaded.

    Args:
        bundle: an ONNX bundle or an MLX folder.
        prompt_tokens: of the prompt.
        new_tokens: at most; None is the rest of the context.
        yarn: as in ``generate``.
        device: as in ``open_runtime``, like what follows.
        kv_bits: see above.
        prefill_chunk: see above.
        prefill_memory: see above.

    Raises:
        BackendError: a device or a library that is not here.
        RequestError: no factor reaches over prompt and answer.
    """
    import_backend(bundle.target)
    memory = importlib.import_module(f"qwen2x.runtimes.{bundle.target}_memory")
    place = memory.planned_device(bundle, device)
    needs = memory.needs_of(bundle, place, kv_bits)
    chosen = choose_rope(bundle.rope_contexts, prompt_tokens, new_tokens, yarn)
    return Footprint(
        prompt_tokens=prompt_tokens,
        new_tokens=chosen.max_tokens,
        rope_factor=chosen.factor,
        max_context=bundle.rope_contexts[chosen.factor],
        weight_bytes=bundle.weight_bytes + memory.prompt_bytes(bundle),
        chunking=Chunking(most=prefill_chunk, memory_bytes=prefill_memory, needs=needs),
        free_bytes=memory.free_bytes(place),
    )
