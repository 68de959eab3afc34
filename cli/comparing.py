"""Several bundles against one source by their figures alone, measured now or recorded earlier."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen2x.cli.figures import (
    Figures,
    figures_of,
    is_same_text,
    recorded_figures,
    smaller_and_closer,
)
from qwen2x.cli.judge import Judge
from qwen2x.cli.judging import Wish, warn_of_changed_files
from qwen2x.cli.output import finite
from qwen2x.cli.reading import WorstPlace
from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.exporters.bundle import Bundle
    from qwen2x.runtimes.stored_logits import StoredLogits

_NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "is_tied", "rope",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One bundle of a comparison; ``kl`` (nats per position) and ``worst`` where it was run now."""

    bundle: Bundle
    figures: Figures
    kl: tuple[float, ...] = ()
    worst: Sequence[WorstPlace] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Bundles by size, and what they were compared with, on which text (see ``Reading``)."""

    reference: str
    backend: str
    text: Mapping[str, Any]
    bundles: Sequence[Compared]

    @property
    def figures(self) -> list[Figures]:
        """Of all bundles, by size."""
        return [compared.figures for compared in self.bundles]

    def to_json(self) -> dict[str, Any]:
        """The object that ``compare --json`` prints."""
        from dataclasses import asdict

        entries = []
        for compared in self.bundles:
            better = smaller_and_closer(compared.figures, self.figures)
            entry = asdict(compared.figures)
            entry["bundle"] = str(entry.pop("folder"))
            entry["target"] = compared.bundle.target
            entry["smaller_and_closer"] = str(better.folder) if better else None
            entries.append(entry)
        return {
            "reference": {"name": self.reference, "backend": self.backend},
            "perplexity_reference": self.bundles[0].figures.perplexity_reference,
            "text": dict(self.text),
            "bundles": finite(entries),
        }


def compare_bundles(bundles: Sequence[Bundle], judge: Judge, wish: Wish) -> Comparison:
    """Runs the judge once and every bundle on the same windows; one model is open at a time.

    Raises:
        InputError: bundles of another model, one that cannot be run here, or no room on the disk.
    """
    from qwen2x.runtimes.compare import compare
    from qwen2x.runtimes.generate import read_text_files

    for bundle in bundles:
        require_same_model(bundle, judge)
        warn_of_changed_files(bundle, judge)
    tokenizer = read_text_files(judge.folder).tokenizer
    token_ids = tokenizer.encode(wish.text)
    factor = judge.shared_factor(bundles)
    context = min(bundle.rope_contexts[factor] for bundle in bundles)
    reading = wish.read(token_ids, context)
    for bundle in bundles:
        wish.open(bundle).close()  # what cannot be run is told before the judge takes minutes
    found = []
    with _reference_logits(judge, wish, reading.windows, factor) as stored:
        for bundle in bundles:
            wish.on_step(str(bundle.folder))
            with wish.open(bundle) as candidate:
                candidate.use_rope(factor)
                difference = compare(stored, candidate, reading.windows)
                place = {"backend": candidate.backend, "device": candidate.device}
            found.append(
                Compared(
                    bundle=bundle,
                    figures=figures_of(bundle, difference.figures() | place),
                    kl=difference.kl,
                    worst=reading.in_words(difference.worst, tokenizer),
                )
            )
    return Comparison(
        reference=judge.name,
        backend=judge.backend,
        text=reading.to_json(),
        bundles=_by_size(found),
    )


def stored_comparison(bundles: Sequence[Bundle]) -> Comparison:
    """The same of what ``validate`` recorded, without running anything.

    Raises:
        RequestError: a bundle without figures, or figures of other texts or sources.
    """
    recorded = [recorded_figures(bundle) for bundle in bundles]
    first, (_, text) = bundles[0], recorded[0]
    for bundle, (_, its_text) in zip(bundles, recorded, strict=True):
        if not is_same_text(text, its_text):
            raise RequestError(
                f"{first.folder} was measured on {_name(text)}, {bundle.folder} on "
                f"{_name(its_text)}; validate both with the same --text, --tokens and --window, or "
                "leave out --stored"
            )
        if bundle.manifest["source"]["sha256"] != first.manifest["source"]["sha256"]:
            raise RequestError(
                f"{first.folder} and {bundle.folder} were made of different checkpoints "
                f"({first.manifest['source']['id']}, {bundle.manifest['source']['id']}); compare "
                "bundles of one"
            )
    pairs = zip(bundles, recorded, strict=True)
    found = [Compared(bundle=bundle, figures=figures) for bundle, (figures, _) in pairs]
    return Comparison(
        reference=str(first.manifest["source"]["id"]),
        backend="torch",
        text=text,
        bundles=_by_size(found),
    )


def require_same_model(bundle: Bundle, judge: Judge) -> None:
    """Raises RequestError where a bundle's config has other numbers than its judge's."""
    ours, theirs = bundle.model_config, judge.config
    for name in _NUMBERS:
        if getattr(ours, name) != getattr(theirs, name):
            raise RequestError(
                f"{bundle.folder} was made of {bundle.manifest['source']['id']}, whose {name} is "
                f"{getattr(ours, name)}, that of {judge.name} is {getattr(theirs, name)}; compare "
                "bundles with the checkpoint that they were made of"
            )


@contextmanager
def _reference_logits(
    judge: Judge, wish: Wish, windows: Sequence[Sequence[int]], factor: float
) -> Iterator[StoredLogits]:
    """The judge's logits in a file without a name, which nothing leaves behind."""
    from qwen2x.exporters.cache_folder import cache_folder
    from qwen2x.exporters.staging import turn_os_errors
    from qwen2x.runtimes.stored_logits import StoredLogits, require_room

    folder = cache_folder()
    wish.on_step(judge.name)
    with turn_os_errors(folder):
        # Not the system's folder for such files, which often is memory.
        folder.mkdir(parents=True, exist_ok=True)
        require_room(folder, windows, judge.config.vocab_size)
    with ExitStack() as opened:
        with turn_os_errors(folder):
            file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
        opening = judge.open(wish.device, wish.threads, factor)
        with opening as reference, turn_os_errors(folder):
            stored = StoredLogits(reference, windows, file)
        yield stored


def _by_size(found: Sequence[Compared]) -> list[Compared]:
    return sorted(found, key=lambda one: (one.figures.bytes, one.figures.distance))


def _name(text: Mapping[str, Any]) -> str:
    return (
        f"{text.get('tokens')} tokens of {text.get('name')} in windows of {text.get('window')} "
        f"(sha256 {str(text.get('sha256'))[:12]})"
    )
