"""What every runtime can do, and how one is opened."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen2x.exporters.bundle import is_bundle, open_bundle
from qwen2x.quantize.errors import BackendError
from qwen2x.runtimes.backends import import_backend
from qwen2x.runtimes.ropes import factor_refused
from qwen2x.runtimes.sampler import Sampling

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]
DEFAULT_CHUNK = 512
DEFAULT_PREFILL_MEMORY = 512_000_000
# Told how many tokens of a prompt have been run, from 0 on, and of how many.
OnPrefill = Callable[[int, int], None]


class Runtime(Protocol):
    """One model with one KV cache. No caller sees a backend's own array type.

    Attributes:
        folder: where tokenizer and generation config lie.
        backend: ``onnx``, ``mlx`` or ``torch``; device: ``cpu``, ``cuda`` or ``metal``.
        dtype: float type of activations and cache.
        vocab_size: columns of the logits; the tokenizer may know fewer.
        max_context: positions that the model can be used for.
        rope_factor: the YaRN factor in use, 1 for none: the checkpoint's own until ``use_rope``.
        eos_token_ids: tokens that end a text.
        cached_ids: the tokens whose keys and values are in the cache.
        rope_factor: YaRN's, with which the keys in the cache were rotated; 1 is none.
        on_prefill: is told before, between and after the pieces of a prompt that takes several.
        weight_bytes, bits_per_weight: of the weights as this runtime reads them.
    """

    folder: Path
    backend: str
    device: str
    dtype: str
    vocab_size: int
    max_context: int
    rope_factor: float
    eos_token_ids: tuple[int, ...]
    cached_ids: list[int]
    on_prefill: OnPrefill | None
    weight_bytes: int
    bits_per_weight: float

    @property
    def cache_length(self) -> int:
        """Positions in the cache."""
        ...

    @property
    def rope_contexts(self) -> Mapping[float, int]:
        """Positions that each YaRN factor reaches, by factor, rising."""
        ...

    @property
    def rope_context(self) -> int:
        """Positions that the factor in use reaches."""
        ...

    def use_rope(self, factor: float) -> None:
        """Takes another factor from here on, and empties the cache if it was another."""
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

    def decode_guessed(self, token_ids: Sequence[int]) -> Logits:
        """All rows [tokens, vocab] of one pass; what ``decode`` gives, where kernels allow it."""
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

    def reserve(self, positions: int) -> None:
        """Makes room in the cache for so many positions, and refuses more than memory holds."""
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
class ReadsPromptsInInt8(Protocol):
    """A runtime that may read long prompts by other products than all else."""

    @property
    def reads_prompts_in_int8(self) -> bool:
        """Whether it does."""
        ...


@runtime_checkable
class AttendsByProducts(Protocol):
    """A runtime that has a second way to attend, for single tokens behind long caches.

    Attributes:
        products_from: positions of a cache from which on it is taken; 0: wherever it can be.
        has_products: whether there is that way.
    """

    products_from: int
    has_products: bool


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
    prefill_memory: int = DEFAULT_PREFILL_MEMORY,
    graph: bool = False,
    kv_bits: int | None = None,
    yarn: Sequence[float] = (),
    original_context: int | None = None,
    record: bool = False,
    room: int | None = None,
) -> Runtime:
    """Opens a bundle, or with ``backend="torch"`` a Hugging Face folder.

    Args:
        path: the folder.
        backend: ``onnx``, ``mlx`` or ``torch``; by default what the bundle was made for.
        device: ``cpu``, ``cuda``, ``metal`` (with mlx), or ``auto``: with onnx what the bundle was
            made for, if it is here; with mlx and torch a GPU, if there is one.
        threads: threads within an operator; by default one per physical core. MLX decides itself.
        verify: hash every file of the bundle first.
        prefill_chunk: tokens of a prompt that are run at once, at most.
        prefill_memory: bytes that running them may take beside weights and cache: fewer tokens
            are run at once where it would be more. With torch and graphs their own affair.
        graph: run an MLX folder's ``decode.mlxfn`` instead of our own forward pass.
        kv_bits: 8 keeps the KV cache of an MLX folder in 8 bits; by default it holds floats. An
            ONNX bundle has the cache that it was exported with, and 8 requires one in 8 bits.
        yarn: factors that there must be to choose from. PyTorch takes any beside the checkpoint's
            own, a bundle has those that it was exported with.
        original_context: positions that a checkpoint was trained with, where its config is silent.
        record: record what an ONNX graph does, node by node, for ``profile``; others cannot.
        room: positions that will be used at most, where that is known. An ONNX graph on the CPU has
            a second way to attend, which long caches want and short ones pay for.

    Raises:
        BundleError: a damaged or unfit bundle.
        BackendError: a backend, device or extra that is missing here.
    """
    folder = Path(path)
    for name, limit in (("prefill_chunk", prefill_chunk), ("prefill_memory", prefill_memory)):
        if limit < 1:
            raise BackendError(f"{name} must be 1 or more, got {limit}")
    if backend not in (None, "onnx", "mlx", "torch"):
        raise BackendError(f"backend must be 'onnx', 'mlx' or 'torch', got {backend!r}")
    if backend == "torch" or (backend is None and not is_bundle(folder) and _is_source(folder)):
        _require_kv_bits(kv_bits, "torch")
        return _open_torch(
            folder, device=device, threads=threads, yarn=yarn, original_context=original_context
        )
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
    for factor in yarn:
        if factor not in bundle.rope_contexts:
            raise factor_refused(factor, bundle.rope_contexts)
    _require_kv_bits(kv_bits, "a graph" if graph else bundle.target)
    if kv_bits is not None and bundle.target == "onnx" and bundle.cache["dtype"] != "int8":
        raise BackendError(
            f"{folder} was exported with a KV cache in {bundle.cache['dtype']}, expected int8; "
            "export it again with --kv-bits 8, or leave it out here"
        )
    module = import_backend(bundle.target)
    limits: dict[str, Any] = {"prefill_chunk": prefill_chunk, "prefill_memory": prefill_memory}
    opened: Runtime
    if graph:
        module = importlib.import_module("qwen2x.runtimes.mlx_graph_runtime")
        opened = module.MlxGraphRuntime(bundle, device=device)
    elif bundle.target == "mlx":
        opened = module.MlxRuntime(bundle, device=device, kv_bits=kv_bits, **limits)
    else:
        limits |= {"threads": threads, "record": record, "room": room}
        opened = module.open_onnx(bundle, device=device, **limits)
    return opened


def _open_torch(folder: Path, **options: Any) -> Runtime:
    if is_bundle(folder):
        raise BackendError(
            f"{folder} is a bundle, which torch cannot run; give the checkpoint it was made of"
        )
    module = import_backend("torch")
    return cast(Runtime, module.TorchRuntime(folder, **options))


def default_backend() -> str:
    """What to export for where nobody says: ``mlx`` on Apple silicon, else ``onnx``."""
    is_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    return "mlx" if is_apple_silicon else "onnx"


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
