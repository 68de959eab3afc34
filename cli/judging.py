"""Bundles against their judge: a checkpoint in PyTorch, or another bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2x.cli.options import open_source
from qwen2x.cli.output import finite, log
from qwen2x.quantize.errors import BackendError, RequestError

if TYPE_CHECKING:
    from qwen2x.exporters.bundle import Bundle
    from qwen2x.runtimes.layers import LayerDifference
    from qwen2x.runtimes.runtime import Runtime
    from qwen2x.runtimes.tolerance import Tolerance
    from qwen2x.runtimes.validate import Report

BUILT_IN_TEXT = "validation_text.txt"
_LAYER_TOKENS = 64
_TOP = 5

Tokens = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Whom a bundle is compared with. ``bundle`` is None for a checkpoint, which PyTorch runs."""

    name: str
    folder: Path
    bundle: Bundle | None = None

    def open(self, device: str, threads: int | None) -> Runtime:
        """Its runtime; PyTorch's is on the CPU in float32, wherever the bundle runs."""
        from qwen2x.runtimes.runtime import open_runtime

        if self.bundle is None:
            return open_runtime(self.folder, backend="torch", device="cpu", threads=threads)
        return open_runtime(self.folder, device=_device_for(self.bundle, device), threads=threads)

    def tolerance(self, candidate: Bundle) -> Tolerance:
        """What may lie between it and a candidate."""
        from qwen2x.runtimes.tolerance import tolerance_between, tolerance_for

        ours = candidate.scheme, candidate.dtype
        if self.bundle is None:
            return tolerance_for(*ours)
        theirs = self.bundle.scheme, self.bundle.dtype
        both = candidate.is_ours and self.bundle.is_ours
        return tolerance_between(ours, theirs, same_integers=both)

    def changed_files(self, candidate: Bundle) -> list[str]:
        """Files that the candidate was made of, and that the judge is not, or is not made of."""
        from qwen2x.exporters.bundle import changed_source_files

        if self.bundle is None:
            return changed_source_files(candidate, self.folder)
        theirs = self.bundle.manifest["source"]["sha256"]
        ours = candidate.manifest["source"]["sha256"]
        # A folder of another program does not say what it was made of.
        return [name for name in ours if theirs and theirs.get(name) != ours[name]]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How bundles are to be compared."""

    text: str
    tokens: int = 1024
    window: int = 512
    device: str = "auto"
    threads: int | None = None
    wants_layers: bool = False
    graph: bool = False
    kv_bits: str | None = None
    on_step: Callable[[str], None] = field(default=lambda step: None)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One bundle's report, and what was looked at beside it."""

    folder: Path
    report: Report
    next_tokens: Tokens
    reference_next_tokens: Tokens
    layers: list[LayerDifference]


def find_judge(against: str, revision: str | None) -> Judge:
    """The checkpoint (folder or hub id) or bundle of that name.

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
    return Judge(name=against, folder=open_source(folder, None))


def judge_bundle(folder: Path, judge: Judge, wish: Wish) -> Judgement:
    """Compares a bundle with its judge, and records the figures in it if the judge is PyTorch."""
    from qwen2x.exporters.bundle import open_bundle
    from qwen2x.runtimes.generate import read_text_files
    from qwen2x.runtimes.runtime import open_runtime
    from qwen2x.runtimes.validate import Check, validate

    opened = open_bundle(folder)
    changed = judge.changed_files(opened)
    if changed:
        log(
            f"{judge.name} is not the checkpoint that {folder} was made of "
            f"({opened.manifest['source']['id']}): {', '.join(changed[:3])} differ"
        )
    token_ids = read_text_files(judge.folder).tokenizer.encode(wish.text)
    with (
        open_runtime(
            folder,
            device=_device_for(opened, wish.device),
            threads=wish.threads,
            graph=wish.graph,
            kv_bits=int(wish.kv_bits) if wish.kv_bits else None,
        ) as candidate,
        judge.open(wish.device, wish.threads) as reference,
    ):
        _require_same_shape(opened, candidate, reference, judge.name)
        if wish.wants_layers:
            _require_layers(candidate, reference)
        report = validate(
            candidate,
            reference,
            token_ids,
            tolerance=judge.tolerance(opened),
            tokens=wish.tokens,
            window=wish.window,
            on_step=wish.on_step,
        )
        ours, theirs = _next_tokens(candidate, reference, token_ids)
        layers = _layers(candidate, reference, token_ids, wish) if wish.wants_layers else []
    report.facts["scheme"] = opened.scheme
    report.facts["reference"] = {"name": judge.name, "backend": reference.backend}
    report.checks.append(
        Check(name="source_is_the_same", value=float(not changed), limit=1, is_floor=True)
    )
    if wish.kv_bits:
        report.facts["kv_bits"] = int(wish.kv_bits)
    # Figures against another checkpoint say nothing of the bundle, those with another cache less
    # than its own, which they do not replace.
    if not changed and judge.bundle is None and opened.is_ours and not wish.kv_bits:
        _record(opened, report)
    return Judgement(
        folder=folder,
        report=report,
        next_tokens=ours,
        reference_next_tokens=theirs,
        layers=layers,
    )


def read_text(path: Path | None) -> str:
    """The user's text, or the built-in one."""
    if path is None:
        built_in = resources.files("qwen2x.runtimes") / BUILT_IN_TEXT
        return built_in.read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--text {path} cannot be read as UTF-8 text: {error}") from None


def _device_for(bundle: Bundle, device: str) -> str:
    """One --device for bundles of several targets: what a target does not have is its auto."""
    return "auto" if bundle.target == "onnx" and device == "metal" else device


def _next_tokens(
    candidate: Runtime, reference: Runtime, token_ids: Sequence[int]
) -> tuple[Tokens, Tokens]:
    """The likeliest tokens behind the text's beginning, of both."""
    import numpy as np

    from qwen2x.runtimes.compare import top_tokens

    ids = np.array([token_ids[: min(_LAYER_TOKENS, candidate.max_context)]], np.int64)
    ours, theirs = candidate.logits(ids)[0, -1], reference.logits(ids)[0, -1]
    return top_tokens(ours, _TOP), top_tokens(theirs, _TOP)


def _require_layers(*runtimes: Runtime) -> None:
    for runtime in runtimes:
        if not hasattr(runtime, "hidden_states"):
            raise BackendError(
                f"{runtime.folder} is run by a graph that shows no layers; leave out --graph or "
                "--layers"
            )


def _layers(
    candidate: Runtime, reference: Runtime, token_ids: Sequence[int], wish: Wish
) -> list[LayerDifference]:
    import numpy as np

    from qwen2x.runtimes.layers import compare_layers

    wish.on_step("layers")
    ids = np.array([token_ids[: min(_LAYER_TOKENS, candidate.max_context)]], np.int64)
    return compare_layers(reference, candidate, ids)  # type: ignore[arg-type]


def _record(bundle: Bundle, report: Report) -> None:
    """Writes the figures into the manifest, if the bundle may be written to."""
    from qwen2x.exporters.bundle import write_manifest

    quality = {key: value for key, value in report.to_json().items() if key != "tolerance"}
    try:
        write_manifest(bundle.folder, {**bundle.manifest, "quality": finite(quality)})
    except OSError as error:
        log(f"the figures were not recorded in {bundle.folder}: {error.strerror}")


def _require_same_shape(
    opened: Bundle, candidate: Runtime, reference: Runtime, against: str
) -> None:
    if candidate.vocab_size != reference.vocab_size:
        raise RequestError(
            f"{opened.folder} has {candidate.vocab_size} vocabulary rows, {against} has "
            f"{reference.vocab_size}: not the checkpoint it was made of "
            f"({opened.manifest['source']['id']})"
        )


def to_json(judgement: Judgement) -> dict[str, Any]:
    """The object that ``validate --json`` prints for a bundle."""
    from dataclasses import asdict

    from qwen2x.runtimes.layers import first_beyond

    result = judgement.report.to_json()
    result["bundle"] = str(judgement.folder)
    for name in ("next_tokens", "reference_next_tokens"):
        result[name] = [
            {"token_id": token, "logit": logit} for token, logit in getattr(judgement, name)
        ]
    if judgement.layers:
        beyond = first_beyond(judgement.layers, judgement.report.tolerance.layer_error)
        result["layers"] = [asdict(layer) for layer in judgement.layers]
        result["first_layer_beyond"] = beyond.layer if beyond else None
    return result
