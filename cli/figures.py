"""One bundle's size and its distance from its original, measured now or recorded earlier."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.exporters.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What tables and plots show of a bundle. A figure that is not finite is NaN.

    ``ran_on`` is backend and device, ``bytes`` are those of all files; KL divergence is in nats.
    """

    folder: Path
    scheme: str
    method: str
    ran_on: str
    bits_per_weight: float
    bytes: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity: float
    perplexity_reference: float

    @property
    def way(self) -> str:
        """Scheme and method."""
        return self.scheme if self.method in ("none", "unknown") else f"{self.scheme} {self.method}"

    @property
    def distance(self) -> float:
        """The mean KL divergence, infinite where it is no number."""
        return math.inf if math.isnan(self.kl_mean) else self.kl_mean


_NUMBERS = (
    "kl_mean", "kl_p99", "kl_max", "top1_agreement", "perplexity", "perplexity_reference",
)  # fmt: skip


def figures_of(bundle: Bundle, quality: Mapping[str, Any]) -> Figures:
    """Of a report's JSON object, or of what is recorded in a manifest."""
    numbers = {name: _number(quality[name]) for name in _NUMBERS}
    return Figures(
        folder=bundle.folder,
        scheme=bundle.scheme,
        method=str(bundle.manifest["method"]),
        ran_on=f"{quality['backend']} {quality['device']}",
        bits_per_weight=bundle.bits_per_weight,
        bytes=bundle.bytes,
        **numbers,
    )


def smaller_and_closer(one: Figures, all_of_them: Sequence[Figures]) -> Figures | None:
    """The closest bundle that is no larger and no farther, and better in one of both."""
    better = [
        other
        for other in all_of_them
        if (other.bytes, other.distance) != (one.bytes, one.distance)
        and other.bytes <= one.bytes
        and other.distance <= one.distance
    ]
    return min(better, key=lambda other: (other.distance, other.bytes), default=None)


def frontier(all_of_them: Sequence[Figures]) -> list[Figures]:
    """Those that no other is smaller and closer than, by size."""
    best = [one for one in all_of_them if smaller_and_closer(one, all_of_them) is None]
    return sorted(best, key=lambda one: one.bytes)


def recorded_figures(bundle: Bundle) -> tuple[Figures, Mapping[str, Any]]:
    """What ``validate`` recorded in a bundle, and on which text.

    Raises:
        RequestError: it recorded nothing, or did so when texts were not recorded yet.
    """
    if not bundle.is_ours:
        raise RequestError(
            f"{bundle.folder} was made by another program and records nothing; leave out --stored"
        )
    quality = bundle.manifest.get("quality", {})
    try:
        return figures_of(bundle, quality), {**quality["text"]}
    except (KeyError, TypeError):
        raise RequestError(
            f"{bundle.folder} has no recorded figures that name their text; record them: "
            f"qwen2x validate {bundle.folder} --against SOURCE"
        ) from None


def recorded_beside(bundles: Sequence[Bundle], text: Mapping[str, Any]) -> list[Figures]:
    """Recorded figures of folders beside these, of the same source and the same text."""
    from qwen2x.exporters.bundle import MANIFEST, Bundle

    own = {bundle.folder.resolve() for bundle in bundles}
    sources = [bundle.manifest["source"]["sha256"] for bundle in bundles]
    found = []
    for path in sorted({path for own_one in own for path in own_one.parent.glob(f"*/{MANIFEST}")}):
        if path.parent in own:
            continue
        # Its files are not checked: what is shown of it is no more than what was recorded.
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            other = Bundle(folder=path.parent, manifest=manifest)
            figures, its_text = recorded_figures(other)
            is_alike = manifest["source"]["sha256"] in sources and is_same_text(text, its_text)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if is_alike:
            found.append(figures)
    return found


def is_same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether figures may be compared: the same tokens, read in windows of the same length."""
    return all(one.get(key) == other.get(key) for key in ("sha256", "window"))


def _number(value: Any) -> float:
    """A manifest has null for what is not finite."""
    return math.nan if value is None or not math.isfinite(value) else float(value)
