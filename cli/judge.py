"""Whom bundles are compared with: a checkpoint in PyTorch, or another bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2x.cli.options import open_source
from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.exporters.bundle import Bundle
    from qwen2x.exporters.config import Qwen2Config
    from qwen2x.runtimes.runtime import Runtime
    from qwen2x.runtimes.tolerance import Tolerance


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Whom a bundle is compared with. ``bundle`` is None for a checkpoint, which PyTorch runs.

    ``original_context`` is what a bundle was told of its checkpoint, see ``Options``.
    """

    name: str
    folder: Path
    bundle: Bundle | None = None
    original_context: int | None = None
    # Of its files, which are hashed once for all bundles.
    _sha256: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def backend(self) -> str:
        """What runs it."""
        return "torch" if self.bundle is None else self.bundle.target

    @property
    def config(self) -> Qwen2Config:
        """The model's numbers."""
        from qwen2x.exporters.config import read_config

        if self.bundle is not None:
            return self.bundle.model_config
        return read_config(self.folder, self.original_context)

    def shared_factor(self, bundles: Sequence[Bundle]) -> float:
        """The YaRN factor to compare with: its own if all have it, else the smallest that all have.

        Raises:
            RequestError: there is none.
        """
        contexts = [bundle.rope_contexts for bundle in bundles]
        shared = set(contexts[0]).intersection(*contexts[1:])
        if self.bundle is None:
            own = self.config.rope.factor
        else:
            own = next(iter(self.bundle.rope_contexts))
            shared &= set(self.bundle.rope_contexts)
        if not shared:
            raise RequestError(
                f"{self.name} and {', '.join(str(bundle.folder) for bundle in bundles)} have no "
                "YaRN factor in common; export them with one, such as --yarn 1,2,4"
            )
        return own if own in shared else min(shared)

    def open(
        self, device: str, threads: int | None, factor: float, *more_factors: float
    ) -> Runtime:
        """Its runtime with a YaRN factor; PyTorch takes any, and some more to change to.

        PyTorch is on the CPU in float32, wherever the bundle runs.
        """
        runtime = self._open(device, threads, (factor, *more_factors))
        runtime.use_rope(factor)
        return runtime

    def _open(self, device: str, threads: int | None, factors: Sequence[float]) -> Runtime:
        from qwen2x.runtimes.runtime import open_runtime

        if self.bundle is None:
            return open_runtime(
                self.folder, backend="torch", device="cpu", threads=threads, yarn=factors,
                original_context=self.original_context,
            )  # fmt: skip
        return open_runtime(self.folder, device=device_for(self.bundle, device), threads=threads)

    def tolerance(self, candidate: Bundle) -> Tolerance:
        """What may lie between it and a candidate."""
        from qwen2x.runtimes.tolerance import with_int8_cache

        bundles = [candidate, *([self.bundle] if self.bundle else [])]
        limits = self._tolerance_of_weights(candidate)
        has_int8_cache = any(bundle.cache["dtype"] == "int8" for bundle in bundles)
        return with_int8_cache(limits) if has_int8_cache else limits

    def _tolerance_of_weights(self, candidate: Bundle) -> Tolerance:
        from qwen2x.runtimes.tolerance import tolerance_between, tolerance_for

        ours = candidate.scheme, candidate.dtype
        if self.bundle is None:
            # A quantized checkpoint gives a bundle its integers, and PyTorch reads the same ones.
            is_quantized = self.config.quantization is not None
            return tolerance_between(ours, ours) if is_quantized else tolerance_for(*ours)
        theirs = self.bundle.scheme, self.bundle.dtype
        both = candidate.is_ours and self.bundle.is_ours
        return tolerance_between(ours, theirs, same_integers=both)

    def changed_files(self, candidate: Bundle) -> list[str]:
        """Files that the candidate was made of, and that the judge is not, or is not made of."""
        ours = candidate.manifest["source"]["sha256"]
        if self.bundle is None:
            return [name for name, sha256 in ours.items() if self._hash(name) != sha256]
        theirs = self.bundle.manifest["source"]["sha256"]
        # A folder of another program does not say what it was made of.
        return [name for name in ours if theirs and theirs.get(name) != ours[name]]

    def _hash(self, name: str) -> str:
        """Of a file of the checkpoint; nothing where it is missing."""
        from qwen2x.exporters.bundle import sha256_of

        path = self.folder / name
        if name not in self._sha256:
            self._sha256[name] = sha256_of(path) if path.is_file() else ""
        return self._sha256[name]


def find_judge(against: str, revision: str | None, candidate: Path | None = None) -> Judge:
    """The checkpoint (folder or hub id) or bundle of that name.

    Args:
        against: its name.
        revision: of a hub id.
        candidate: a bundle of it, which may have been told what its config does not say.

    Raises:
        InputError: it is neither, or not whole.
    """
    from qwen2x.exporters.bundle import is_bundle, open_bundle
    from qwen2x.exporters.hub import resolve_source

    folder = Path(against)
    if not is_bundle(folder):
        # A hub id may be that of a folder for MLX.
        folder = resolve_source(against, revision=revision)
    elif revision is not None:
        raise RequestError(f"{against} is a bundle, which has no revisions; leave it out")
    if is_bundle(folder):
        return Judge(name=against, folder=folder, bundle=open_bundle(folder))
    told = None if candidate is None else open_bundle(candidate).original_context
    folder = open_source(folder, None, told)
    return Judge(name=against, folder=folder, original_context=told)


def device_for(bundle: Bundle, device: str) -> str:
    """One --device for bundles of several targets: what a target does not have is its auto."""
    return "auto" if bundle.target == "onnx" and device == "metal" else device
