"""The KV cache of a long prompt, kept in a file for the next question about it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Protocol, runtime_checkable

from qwen2x.exporters.bundle import Bundle, model_hash, sha256_of
from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.cache_file import (
    CacheArrays,
    CacheFile,
    read_cache_file,
    require_disk,
    write_cache_file,
)
from qwen2x.runtimes.memory_needs import MemoryNeeds
from qwen2x.runtimes.runtime import Runtime

_FORMAT = "qwen2x prompt cache 1"
_ADVICE = "give --prompt-cache another file, or delete this one"


@runtime_checkable
class SavesCache(Protocol):
    """A runtime whose cache can be taken out and put back.

    Attributes:
        bundle: whose weights the cache is of.
        cache_dtype: in which keys and values are kept.
        needs: says what a position takes.
    """

    bundle: Bundle
    cache_dtype: str
    needs: MemoryNeeds

    def export_cache(self, length: int) -> CacheArrays:
        """The first positions; views where the backend has them, to be let go of before a run."""
        ...

    def import_cache(self, token_ids: Sequence[int], arrays: CacheArrays) -> None:
        """Replaces the cache by that of these tokens; the arrays may have more positions."""
        ...


class PromptCache:
    """One file. Whatever a prompt shares with it from the beginning on is not run again.

    It is written where it is missing, and where more of a prompt had to be run than came out of a
    cache, and more than half of what the file holds: another question about the same text, or a
    short one about something else, leaves it as it is; another long text replaces it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self._file: CacheFile | None = None
        self._is_due = False

    def check(self, runtime: Runtime) -> None:
        """Reads the file, if there is one; its factor need only be one of the runtime's.

        Raises:
            RequestError: a runtime that has no such cache, a file that is damaged or belongs to
                something else.
        """
        _require_saving(runtime)
        if self._file is None and self.path.exists():
            self._file = read_cache_file(self.path)
        if self._file is not None:
            factors = {f"{factor:g}" for factor in runtime.rope_contexts}
            found = self._file.metadata.get("rope_factor")
            ignored = {"rope_factor"} if found in factors else set()
            self._require_same(self._file, runtime, ignored)

    def load(self, runtime: Runtime, prompt_ids: Sequence[int], room: int) -> None:
        """Gives a runtime what the file has of a prompt, if that is more than it has itself.

        Args:
            runtime: with the factor that it will run the prompt with.
            prompt_ids: of the whole prompt.
            room: positions that its cache is made for.

        Raises:
            RequestError: what ``check`` refuses, or no room for the file that will be written.
        """
        saving = _require_saving(runtime)
        self.check(runtime)
        if self._file is not None:
            self._require_same(self._file, runtime)
        held = common_prefix(runtime.cached_ids, prompt_ids)
        if self._file is not None:
            shared = common_prefix(self._file.token_ids, prompt_ids)
            if shared > held:
                runtime.reset()
                runtime.reserve(max(room, shared))
                self._require_alike(self._file.arrays, saving.export_cache(0))
                saving.import_cache(prompt_ids[:shared], self._file.arrays)
                held = shared
        kept = 0 if self._file is None else len(self._file.token_ids)
        self._is_due = self._file is None or len(prompt_ids) - held > max(held, kept // 2)
        if self._is_due:
            require_disk(self.path, len(prompt_ids) * saving.needs.per_position)

    def save(self, runtime: Runtime, prompt_ids: Sequence[int]) -> bool:
        """Writes the file if it is due and the prompt has been run; says whether it did.

        Raises:
            RequestError: it cannot be written; the old file stays as it was.
        """
        count = common_prefix(runtime.cached_ids, prompt_ids)
        if not self._is_due or count < len(prompt_ids):
            return False
        self._file = None
        arrays = _require_saving(runtime).export_cache(count)
        write_cache_file(self.path, _key(runtime), list(prompt_ids), arrays)
        self._is_due = False
        return True

    def _require_same(
        self, file: CacheFile, runtime: Runtime, ignored: Set[str] = frozenset()
    ) -> None:
        """Raises RequestError where the file is of something else, with all that differs."""
        wanted = _key(runtime)
        differing = [
            f"{name} {file.metadata.get(name, 'unknown')[:20]}, expected {value[:20]}"
            for name, value in wanted.items()
            if name not in ignored and file.metadata.get(name) != value
        ]
        if differing:
            raise RequestError(
                f"{self.path} is the prompt cache of something else: {'; '.join(differing)}; "
                f"{_ADVICE}"
            )

    def _require_alike(self, arrays: CacheArrays, expected: CacheArrays) -> None:
        """The key says as much; a file may say so and hold others."""
        if _forms(arrays) != _forms(expected):
            raise RequestError(f"{self.path} has other arrays than its bundle's cache; {_ADVICE}")


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common, from the first on."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def _require_saving(runtime: Runtime) -> SavesCache:
    if not isinstance(runtime, SavesCache):
        raise RequestError(
            f"a prompt cache is there for onnx and mlx bundles, not for {runtime.backend} as it is "
            "run here; leave out --prompt-cache (and --graph)"
        )
    return runtime


def _key(runtime: Runtime) -> dict[str, str]:
    """What a cache belongs to; two with the same may stand for each other."""
    tokenizer = runtime.folder / "tokenizer.json"
    return {
        "format": _FORMAT,
        "bundle": model_hash(_require_saving(runtime).bundle),
        "tokenizer": sha256_of(tokenizer) if tokenizer.is_file() else "none",
        "rope_factor": f"{runtime.rope_factor:g}",
        "cache_dtype": _require_saving(runtime).cache_dtype,
    }


def _forms(arrays: CacheArrays) -> dict[str, tuple[int, int, str]]:
    """Heads, columns and type by name."""
    return {
        name: (values.shape[0], values.shape[2], values.dtype.name)
        for name, values in arrays.items()
    }
