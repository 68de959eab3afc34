"""The part of a bundle's model card that shows what is recorded in ``quality`` of its manifest.

It stands between two HTML comments, so that it can be written anew in a card that was edited.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

OPENING, CLOSING = "<!-- qwen2x:quality -->", "<!-- /qwen2x:quality -->"
_MARKDOWN = str.maketrans({sign: f"\\{sign}" for sign in "\\|`*_[]"})
_TITLE = "## How close to the original"

Quality = Mapping[str, Any]


def quality_section(manifest: Mapping[str, Any]) -> str:
    """Both comments and what is between: measured figures, else estimated ones, else how to."""
    quality: Quality = manifest["quality"]
    measure = f"`qwen2x validate . --against {manifest['source']['id']}`"
    if is_measured(quality):
        rows = _measured_rows(manifest, quality)
        told = f"Measured by {measure}, which writes them anew; see docs/validation.md of qwen2x."
    elif estimate := quality.get("estimate"):
        rows = _estimated_rows(manifest, estimate)
        told = f"Estimated while exporting, by its own forward pass. {measure} measures them."
    else:
        return "\n".join([OPENING, _TITLE, "", f"Not measured yet: {measure} does.", CLOSING])
    table = [f"| {name} | {_cell(value)} |" for name, value in rows]
    return "\n".join([OPENING, _TITLE, "", "| | |", "|---|---|", *table, "", told, CLOSING])


def replace_section(card: bytes, manifest: Mapping[str, Any]) -> bytes:
    """A card with its section written anew; as it is where it has no such section, or two.

    All other bytes are its owner's, in whatever encoding.
    """
    opening, closing = OPENING.encode(), CLOSING.encode()
    if card.count(opening) != 1 or card.count(closing) != 1:
        return card
    before, _, rest = card.partition(opening)
    old, found, after = rest.partition(closing)
    if not found:
        return card
    section = quality_section(manifest).encode(errors="backslashreplace")
    return before + (section.replace(b"\n", b"\r\n") if b"\r\n" in old else section) + after


def is_measured(quality: Quality) -> bool:
    """Whether ``validate`` has recorded figures, besides which there may be estimates."""
    return "kl_mean" in quality


def _measured_rows(manifest: Mapping[str, Any], quality: Quality) -> list[tuple[str, str]]:
    reference = quality.get("reference", {}).get("backend", "torch")
    rows = [
        ("verdict", str(quality["verdict"])),
        *_figures(quality),
        *_size(manifest),
        ("text", _text(quality)),
        ("ran on", _place(quality)),
        ("compared with", f"{'PyTorch' if reference == 'torch' else reference}, float32"),
    ]
    if "date" in quality:
        rows.append(("measured", f"{quality['date']}, by qwen2x {quality.get('qwen2x', '')}"))
    return rows


def _estimated_rows(manifest: Mapping[str, Any], estimate: Quality) -> list[tuple[str, str]]:
    rows = [*_figures(estimate), *_size(manifest), ("text", _text(estimate))]
    if "by" in estimate:
        rows.append(("estimated by", str(estimate["by"])))
    return rows


def _figures(found: Quality) -> list[tuple[str, str]]:
    kl = ", ".join(
        f"{_number(found.get(key))} {name}"
        for key, name in (("kl_mean", "mean"), ("kl_p99", "99th percentile"), ("kl_max", "largest"))
    )
    perplexity, original = (
        _number(found.get(key), ".4f") for key in ("perplexity", "perplexity_reference")
    )
    return [
        ("KL divergence, nats", kl),
        ("same likeliest token", _number(found.get("top1_agreement"), ".2%")),
        ("perplexity", f"{perplexity}, the original's {original}"),
    ]


def _size(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    scheme, method = manifest["scheme"], manifest["method"]
    return [
        (
            "bits per weight",
            f"{manifest['bits_per_weight']:.2f} ({scheme}"
            + (")" if method == "none" else f", by {method})"),
        ),
        ("size", f"{size / 1e6:,.1f} MB"),
    ]


def _text(found: Quality) -> str:
    """Which tokens were read, as far as it was recorded."""
    text = found.get("text")
    if not isinstance(text, Mapping):
        named = f"{text}, " if text else ""
        return f"{named}{found.get('positions', 'unknown')} positions"
    return (
        f"{text['name']}, {text['tokens']:,} tokens in windows of {text['window']:,} "
        f"(sha256 of their ids {text['sha256'][:12]})"
    )


def _place(quality: Quality) -> str:
    parts = [f"{quality.get('backend')} on {quality.get('device')}, {quality.get('dtype')}"]
    if quality.get("cache_dtype"):
        parts.append(f"cache in {quality['cache_dtype']}")
    if quality.get("graph"):
        parts.append("decode.mlxfn")
    return ", ".join(parts)


def _number(value: Any, form: str = ".3g") -> str:
    """A figure for people; the manifest has null for what is not finite."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return format(value, form) if is_number else "not finite"


def _cell(text: str) -> str:
    """The user's own names must not end a cell, or the section."""
    return html.escape(" ".join(text.split()), quote=False).translate(_MARKDOWN)
