"""What every runtime can do, and how one is opened."""

from __future__ import annotations

import importlib
import operator
import platform
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen2x.exporters.bundle import is_bundle, open_bundle
from qwen2x.quantize.errors import BackendError, RequestError
from qwen2x.runtimes.sampler import Sampling

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]
DEFAULT_CHUNK = 512


class Runtime(Protocol):
    """One model with one KV cache. No caller sees a backend's own array type.

    Attributes:
        folder: where tokenizer and generation config lie.
        backend: ``onnx``, ``mlx`` or ``torch``; device: ``cpu``, ``cuda`` or ``metal``.
        dtype: float type of activations and cache.
        vocab_size: columns of the logits; the tokenizer may know fewer.
        max_context: positions that the model can be used for.
        eos_token_ids: tokens that end a text.
        cached_ids: the tokens whose keys and values are in the cache.
        weight_bytes, bits_per_weight: of the weights as this runtime reads them.
    """

    folder: Path
    backend: str
    device: str
    dtype: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    cached_ids: list[int]
    weight_bytes: int
    bits_per_weight: float

    @property
    def cache_length(self) -> int:
        """Positions in the cache."""
        ...

    def append(self, token_ids: Sequence[int], keep: int = 1) -> Logits:
        """Runs tokens behind the cache and gives the logits float32 [keep, vocab] of the last."""
        ...

    def prefill(self, token_ids: Sequence[int]) -> Logits:
        """Runs a prompt behind the cache, in chunks, and gives the last row's logits [vocab]."""
        ...

    def decode(self, token_id: int) -> Logits:
        """Runs one token behind the cache and gives its logits float32 [vocab]."""
        ...

    def logits(
        self,
        token_ids: TokenIds,
        *,
        lengths: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> Logits:
        """Logits float32 [batch, sequence, vocab] of whole rows, apart from the cache.

        Args:
            token_ids: int64 [batch, sequence], padded on the right.
            lengths: valid tokens per row; all of them by default.
            positions: of the columns, rising; 0, 1, ... by default. A jump needs a single row.
        """
        ...

    def truncate(self, length: int) -> None:
        """Drops the cache beyond ``length`` positions."""
        ...

    def reset(self) -> None:
        """Empties the cache."""
        ...

    def close(self) -> None:
        """Gives the memory back."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class SamplesAhead(Protocol):
    """A runtime that also chooses tokens, so that their logits can stay on its device.

    It may queue a step before the last choice is taken, so that the device has work while the host
    turns a token into text. Choices are those that ``Sampler`` would make of the same logits with
    the same seed.
    """

    def sample_ahead(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        context: Sequence[int],
        known: int,
        limit: int,
    ) -> Generator[int, None, None]:
        """Runs tokens behind the cache, then yields the tokens that follow, one by one.

        Whenever it yields, and wherever it is left, ``cached_ids`` holds all tokens but the last
        that it gave: the step that is queued for that one does not count.

        Args:
            token_ids: the prompt, or what the cache does not hold of it.
            sampling: how to choose; its random numbers are drawn from the seed, one per token.
            context: the whole prompt, for the repetition penalty.
            known: only the first so many tokens of the vocabulary are chosen.
            limit: tokens to yield at most.

        Raises:
            RequestError: what does not fit the context, or logits that are not finite.
        """
        ...


def open_runtime(
    path: str | Path,
    *,
    backend: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    verify: bool = False,
    prefill_chunk: int = DEFAULT_CHUNK,
    graph: bool = False,
    kv_bits: int | None = None,
    record: bool = False,
) -> Runtime:
    """Opens a bundle, or with ``backend="torch"`` a Hugging Face folder.

    Args:
        path: the folder.
        backend: ``onnx``, ``mlx`` or ``torch``; by default what the bundle was made for.
        device: ``cpu``, ``cuda``, ``metal`` (with mlx), or ``auto``: with onnx what the bundle was
            made for, if it is here; with mlx and torch a GPU, if there is one.
        threads: threads within an operator; by default one per physical core. MLX decides itself.
        verify: hash every file of the bundle first.
        prefill_chunk: tokens of a prompt that are run at once.
        graph: run an MLX folder's ``decode.mlxfn`` instead of our own forward pass.
        kv_bits: 8 keeps the KV cache of an MLX folder in 8 bits; by default it holds floats. An
            ONNX bundle has the cache that it was exported with, and 8 requires one in 8 bits.
        record: record what an ONNX graph does, node by node, for ``profile``; others cannot.

    Raises:
        BundleError: a damaged or unfit bundle.
        BackendError: a backend, device or extra that is missing here.
    """
    folder = Path(path)
    if prefill_chunk < 1:
        raise BackendError(f"prefill_chunk must be 1 or more, got {prefill_chunk}")
    if backend not in (None, "onnx", "mlx", "torch"):
        raise BackendError(f"backend must be 'onnx', 'mlx' or 'torch', got {backend!r}")
    if backend == "torch" or (backend is None and not is_bundle(folder) and _is_source(folder)):
        _require_kv_bits(kv_bits, "torch")
        return _open_torch(folder, device, threads)
    bundle = open_bundle(folder, verify=verify)
    if backend not in (None, bundle.target):
        raise BackendError(
            f"{folder} is made for {bundle.target}, the backend is {backend}; "
            f"export it with --to {backend}"
        )
    if graph and bundle.target != "mlx":
        raise BackendError(
            f"{folder} is made for {bundle.target}, which is a graph anyway; leave out --graph"
        )
    _require_kv_bits(kv_bits, "a graph" if graph else bundle.target)
    if kv_bits is not None and bundle.target == "onnx" and bundle.cache["dtype"] != "int8":
        raise BackendError(
            f"{folder} was exported with a KV cache in {bundle.cache['dtype']}, expected int8; "
            "export it again with --kv-bits 8, or leave it out here"
        )
    module = _import_backend(bundle.target)
    opened: Runtime
    if graph:
        module = importlib.import_module("qwen2x.runtimes.mlx_graph_runtime")
        opened = module.MlxGraphRuntime(bundle, device=device)
    elif bundle.target == "mlx":
        options = {"device": device, "prefill_chunk": prefill_chunk, "kv_bits": kv_bits}
        opened = module.MlxRuntime(bundle, **options)
    else:
        options = {"device": device, "prefill_chunk": prefill_chunk, "threads": threads}
        opened = module.open_onnx(bundle, **options, record=record)
    return opened


def _open_torch(folder: Path, device: str, threads: int | None) -> Runtime:
    if is_bundle(folder):
        raise BackendError(
            f"{folder} is a bundle, which torch cannot run; give the checkpoint it was made of"
        )
    module = _import_backend("torch")
    return cast(Runtime, module.TorchRuntime(folder, device=device, threads=threads))


def default_backend() -> str:
    """What to export for where nobody says: ``mlx`` on Apple silicon, else ``onnx``."""
    is_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    return "mlx" if is_apple_silicon else "onnx"


class CacheBookkeeping:
    """What every runtime with one cache does alike: checks, chunks, and which tokens are in it.

    A subclass implements ``_run`` (append a chunk, give the logits of its last rows) and
    ``_truncate_cache``; it may implement ``_reserve`` (make room before the first chunk).
    """

    max_context: int
    vocab_size: int
    prefill_chunk: int = DEFAULT_CHUNK

    def __init__(self) -> None:
        self.cached_ids: list[int] = []

    @property
    def cache_length(self) -> int:
        """See ``Runtime``."""
        return len(self.cached_ids)

    def append(self, token_ids: Sequence[int], keep: int = 1) -> Logits:
        """See ``Runtime``."""
        token_ids = integers(token_ids)
        self._require_fits(token_ids)
        if not 1 <= keep <= len(token_ids):
            raise RequestError(f"keep must be in 1..{len(token_ids)}, got {keep}")
        self._reserve(self.cache_length + len(token_ids))
        rows: list[Logits] = []
        for start in range(0, len(token_ids), self.prefill_chunk):
            chunk = token_ids[start : start + self.prefill_chunk]
            end = start + len(chunk)
            wanted = max(0, min(len(chunk), end - (len(token_ids) - keep)))
            logits = self._run(np.array([chunk], np.int64), max(1, wanted))
            self.cached_ids.extend(chunk)
            if wanted:
                rows.append(logits)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def prefill(self, token_ids: Sequence[int]) -> Logits:
        """See ``Runtime``."""
        last: Logits = self.append(token_ids)[-1]
        return last

    def decode(self, token_id: int) -> Logits:
        """See ``Runtime``."""
        last: Logits = self.append([token_id])[-1]
        return last

    def truncate(self, length: int) -> None:
        """See ``Runtime``."""
        if not 0 <= length <= self.cache_length:
            raise RequestError(f"truncate needs 0..{self.cache_length} positions, got {length}")
        if length < self.cache_length:
            self._truncate_cache(length)
            del self.cached_ids[length:]

    def reset(self) -> None:
        """See ``Runtime``."""
        self.truncate(0)

    def close(self) -> None:
        """Gives the memory back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _reserve(self, length: int) -> None:
        """Told the length that the cache is about to have."""

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        raise NotImplementedError

    def _truncate_cache(self, length: int) -> None:
        raise NotImplementedError

    def _require_fits(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("expected at least one token, got none")
        wrong = [token for token in token_ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise RequestError(f"token ids must be in 0..{self.vocab_size - 1}, got {wrong[0]}")
        self._require_room(self.cache_length + len(token_ids))

    def _require_room(self, needed: int) -> None:
        if needed > self.max_context:
            raise RequestError(
                f"{needed} positions are needed, the context has {self.max_context}; "
                "shorten the prompt"
            )

    def _require_rows(
        self,
        token_ids: TokenIds,
        lengths: Sequence[int] | None,
        positions: Sequence[int] | None,
    ) -> tuple[list[int], TokenIds]:
        """Checks the arguments of ``logits``; gives lengths of rows and positions of columns."""
        if token_ids.ndim != 2 or token_ids.size == 0:
            raise RequestError(
                f"expected token ids [batch, sequence] with tokens, got shape {token_ids.shape}"
            )
        batch, sequence = token_ids.shape
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise RequestError(f"token ids must be in 0..{self.vocab_size - 1}, got {wrong}")
        taken = [sequence] * batch if lengths is None else list(lengths)
        if len(taken) != batch or not all(1 <= length <= sequence for length in taken):
            raise RequestError(
                f"expected {batch} lengths in 1..{sequence}, one per row, got {taken}"
            )
        places = np.array(integers(range(sequence) if positions is None else positions), np.int64)
        if len(places) != sequence or (np.diff(places) < 1).any():
            raise RequestError(f"expected {sequence} rising positions, got {places.tolist()!r:.80}")
        if places[0] < 0 or places[-1] >= self.max_context:
            raise RequestError(
                f"positions {places[0]}..{places[-1]} are needed, the "
                f"context has 0..{self.max_context - 1}; shorten the rows"
            )
        return taken, places


def integers(token_ids: Sequence[Any]) -> list[int]:
    """Plain integers, of NumPy's integers too."""
    try:
        return [operator.index(token) for token in token_ids]
    except TypeError:
        raise RequestError(f"token ids must be integers, got {token_ids!r:.80}") from None


def _require_kv_bits(kv_bits: int | None, backend: str) -> None:
    if kv_bits is None:
        return
    if kv_bits != 8:
        raise BackendError(
            f"kv_bits must be 8, got {kv_bits!r}; fewer spoil the keys of Qwen2, leave it out for "
            "floats"
        )
    if backend not in ("mlx", "onnx"):
        raise BackendError(
            f"an 8-bit KV cache is there for onnx and mlx, not for {backend}; leave out --kv-bits "
            "(kv_bits)"
        )


def _is_source(folder: Path) -> bool:
    return (folder / "config.json").is_file()


# By backend: its module, the libraries that may be missing, and the extra that has them.
_BACKENDS = {
    "onnx": ("qwen2x.runtimes.onnx_device", ("onnxruntime",), "cpu"),
    "mlx": ("qwen2x.runtimes.mlx_runtime", ("mlx", "libmlx"), "mlx"),
    "torch": ("qwen2x.runtimes.torch_runtime", ("torch", "transformers"), "torch"),
}


def _import_backend(backend: str) -> Any:
    module, libraries, extra = _BACKENDS[backend]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # MLX without its core fails as a shared library that is not found, which has no name.
        missing = (error.name or str(error)).split(".")[0]
        if missing not in libraries:
            raise
        raise BackendError(
            f"{missing} is not installed; expected by this backend: "
            f'pip install "qwen2x[{extra}]"{_where(backend)}'
        ) from None


def _where(backend: str) -> str:
    """What else to know of an extra on this platform."""
    if backend != "mlx":
        return ""
    if sys.platform == "linux":
        return ', or for an NVIDIA GPU "mlx[cuda13]"'
    if sys.platform == "darwin":
        return "" if platform.machine() == "arm64" else " on a Mac with Apple silicon"
    return " on macOS or Linux; here, export with --to onnx"
