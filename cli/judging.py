"""Bundles against their judge, in full: the figures of ``validate`` and its further checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2x.cli.judge import Judge, device_for
from qwen2x.cli.output import log
from qwen2x.cli.reading import BUILT_IN_NAME, Reading, WorstPlace
from qwen2x.cli.recording import record
from qwen2x.quantize.errors import BackendError, RequestError

if TYPE_CHECKING:
    from qwen2x.exporters.bundle import Bundle
    from qwen2x.runtimes.layers import LayerDifference
    from qwen2x.runtimes.runtime import Runtime
    from qwen2x.runtimes.validate import Report

BUILT_IN_TEXT = "validation_text.txt"
_LAYER_TOKENS = 64
_TOP = 5

Tokens = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How bundles are to be compared.

    ``wants_layers`` refuses a runtime that shows none, ``wants_page`` leaves them out there;
    ``is_long`` also looks at every YaRN factor at far positions.
    """

    text: str
    text_name: str = BUILT_IN_NAME
    tokens: int = 1024
    window: int = 512
    device: str = "auto"
    threads: int | None = None
    wants_layers: bool = False
    wants_page: bool = False
    graph: bool = False
    kv_bits: str | None = None
    is_long: bool = False
    on_step: Callable[[str], None] = field(default=lambda step: None)

    def read(self, token_ids: Sequence[int], max_context: int) -> Reading:
        """What of a text is compared.

        Raises:
            RequestError: values out of range, or a text that is too short to compare anything.
        """
        from qwen2x.runtimes.compare import windows_of

        window = min(self.window, max_context)
        windows = windows_of(token_ids, self.tokens, window)
        return Reading(name=self.text_name, window=window, windows=windows)

    def open(self, bundle: Bundle) -> Runtime:
        """The runtime of a bundle that is to be compared."""
        from qwen2x.runtimes.runtime import open_runtime

        return open_runtime(
            bundle.folder,
            device=device_for(bundle, self.device),
            threads=self.threads,
            graph=self.graph,
            kv_bits=int(self.kv_bits) if self.kv_bits else None,
        )


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One bundle's report, and what was looked at beside it."""

    bundle: Bundle
    report: Report
    next_tokens: Tokens
    reference_next_tokens: Tokens
    layers: list[LayerDifference]
    worst: list[WorstPlace]

    @property
    def folder(self) -> Path:
        """The bundle's."""
        return self.bundle.folder


def judge_bundle(folder: Path, judge: Judge, wish: Wish) -> Judgement:
    """Compares a bundle with its judge, and records the figures in it if the judge is PyTorch."""
    from qwen2x.exporters.bundle import open_bundle
    from qwen2x.runtimes.generate import read_text_files
    from qwen2x.runtimes.validate import Check, validate

    opened = open_bundle(folder)
    changed = warn_of_changed_files(opened, judge)
    tokenizer = read_text_files(judge.folder).tokenizer
    token_ids = tokenizer.encode(wish.text)
    factor = judge.shared_factor([opened])
    with (
        wish.open(opened) as candidate,
        judge.open(wish.device, wish.threads, factor, *opened.rope_contexts) as reference,
    ):
        candidate.use_rope(factor)
        _require_same_shape(opened, candidate, reference, judge.name)
        if wish.wants_layers:
            _require_layers(candidate, reference)
        reading = wish.read(token_ids, candidate.rope_context)
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
        layers = _layers(candidate, reference, token_ids, wish)
        if wish.is_long:
            _look_far(report, candidate, reference, token_ids, wish)
    report.facts.update(_facts(opened, judge, wish, reading, factor))
    report.checks.append(
        Check(name="source_is_the_same", value=float(not changed), limit=1, is_floor=True)
    )
    # Figures against another checkpoint say nothing of the bundle, those with another cache less
    # than its own, which they do not replace.
    if not changed and judge.bundle is None and opened.is_ours and not wish.kv_bits:
        record(opened, report)
    return Judgement(
        bundle=opened,
        report=report,
        next_tokens=ours,
        reference_next_tokens=theirs,
        layers=layers,
        worst=reading.in_words(report.difference.worst, tokenizer),
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


def warn_of_changed_files(bundle: Bundle, judge: Judge) -> list[str]:
    """The files in which the judge is not what the bundle was made of; told on standard error."""
    changed = judge.changed_files(bundle)
    if changed:
        log(
            f"{judge.name} is not the checkpoint that {bundle.folder} was made of "
            f"({bundle.manifest['source']['id']}): {', '.join(changed[:3])} differ"
        )
    return changed


def _look_far(
    report: Report,
    candidate: Runtime,
    reference: Runtime,
    token_ids: Sequence[int],
    wish: Wish,
) -> None:
    """Adds what ``--long`` finds."""
    from dataclasses import asdict

    from qwen2x.runtimes.distance import check_distance

    checks, found = check_distance(candidate, reference, token_ids, report.tolerance, wish.on_step)
    report.checks.extend(checks)
    report.facts["long"] = [asdict(each) for each in found]


def _require_same_shape(
    opened: Bundle, candidate: Runtime, reference: Runtime, against: str
) -> None:
    """Raises RequestError where logits of the two have other lengths."""
    if candidate.vocab_size != reference.vocab_size:
        raise RequestError(
            f"{opened.folder} has {candidate.vocab_size} vocabulary rows, {against} has "
            f"{reference.vocab_size}: not the checkpoint it was made of "
            f"({opened.manifest['source']['id']})"
        )


def _facts(
    bundle: Bundle, judge: Judge, wish: Wish, reading: Reading, factor: float
) -> dict[str, Any]:
    """What was compared with what, so that a recorded report stands by itself."""
    facts = {
        "scheme": bundle.scheme,
        "method": bundle.manifest["method"],
        "bytes": bundle.bytes,
        "cache_dtype": bundle.cache["dtype"],
        "graph": wish.graph,
        "rope_factor": factor,
        "text": reading.to_json(),
        "reference": {"name": judge.name, "backend": judge.backend},
    }
    return facts | ({"kv_bits": int(wish.kv_bits)} if wish.kv_bits else {})


def _next_tokens(
    candidate: Runtime, reference: Runtime, token_ids: Sequence[int]
) -> tuple[Tokens, Tokens]:
    """The likeliest tokens behind the text's beginning, of both."""
    import numpy as np

    from qwen2x.runtimes.compare import top_tokens

    ids = np.array([token_ids[: min(_LAYER_TOKENS, candidate.rope_context)]], np.int64)
    ours, theirs = candidate.logits(ids)[0, -1], reference.logits(ids)[0, -1]
    return top_tokens(ours, _TOP), top_tokens(theirs, _TOP)


def _shows_layers(runtime: Runtime) -> bool:
    return hasattr(runtime, "hidden_states")


def _require_layers(*runtimes: Runtime) -> None:
    for runtime in runtimes:
        if not _shows_layers(runtime):
            raise BackendError(
                f"{runtime.folder} is run by a graph that shows no layers; leave out --graph or "
                "--layers"
            )


def _layers(
    candidate: Runtime, reference: Runtime, token_ids: Sequence[int], wish: Wish
) -> list[LayerDifference]:
    """Layer by layer, where that is wanted and possible."""
    import numpy as np

    from qwen2x.runtimes.layers import compare_layers

    is_possible = _shows_layers(candidate) and _shows_layers(reference)
    if not wish.wants_layers and not (wish.wants_page and is_possible):
        return []
    wish.on_step("layers")
    ids = np.array([token_ids[: min(_LAYER_TOKENS, candidate.rope_context)]], np.int64)
    return compare_layers(reference, candidate, ids)  # type: ignore[arg-type]


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
