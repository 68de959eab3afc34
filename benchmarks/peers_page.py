"""The table and the plot of ``benchmarks.peers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

from benchmarks.measure import RESULTS

_PARTS = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"}
_OUR_COLOR, _PEER_COLOR = "#c4461f", "#3465a4"
_WIDTH, _LABELS, _ROW, _GAP, _TOP = 900, 210, 22, 46, 24
_VALUES = 60
_PAGE = """\
# Speed beside the peers

Written by `python -m benchmarks.peers` on {{ date }}: {{ machine.processor }}, {{ machine.cores }}
cores, {{ machine.system }}. {{ prompt_tokens }} prompt and {{ new_tokens }} new tokens, \
{{ threads }} threads, greedy; medians of
{{ count }} rounds in which every side ran once, in turn. KL divergence is that of
[quality.md](quality.md), on prose.

| | MB of weights | KL, prose | prefill, tokens/s | decode, tokens/s |
|---|--:|--:|--:|--:|
{% for side in sides %}| {{ side.name }} | {{ side.size }} | {{ side.kl }} | \
{{ side.prefill }} | {{ side.decode }} |
{% endfor %}
Ours over theirs, prefill / decode:

| |{% for peer in peers %} {{ peer }} |{% endfor %}
|---|{% for peer in peers %}--:|{% endfor %}
{% for row in ratios %}| {{ row.name }} |{% for cell in row.cells %} {{ cell }} |{% endfor %}
{% endfor %}
![Speed beside the peers](peers.svg)
"""
_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" \
font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="Speed beside the peers">
<rect width="{{ width }}" height="{{ height }}" fill="#fff"/>
{% for plot in plots %}<text x="{{ labels }}" y="{{ plot.top - 8 }}" font-weight="600">\
{{ plot.name }}, tokens/s</text>
{% for bar in plot.bars %}<text x="{{ labels - 8 }}" y="{{ bar.y + 13 }}" text-anchor="end">\
{{ bar.name }}</text>
<rect x="{{ labels }}" y="{{ bar.y }}" width="{{ bar.width }}" height="16" fill="{{ bar.color }}"/>
<text x="{{ labels + bar.width + 6 }}" y="{{ bar.y + 13 }}">{{ bar.value }}</text>
{% endfor %}{% endfor %}</svg>
"""


def write_peers_page(result: Mapping[str, Any]) -> None:
    """Writes peers.md and peers.svg beside the JSON that they show."""
    environment = Environment(autoescape=False, keep_trailing_newline=True)
    page = environment.from_string(_PAGE).render(
        **{name: result[name] for name in ("date", "machine", "prompt_tokens", "new_tokens")},
        threads=result["threads"],
        count=len(result["rounds"]),
        sides=_rows(result),
        peers=_peers(result),
        ratios=_ratio_rows(result),
    )
    (RESULTS / "peers.md").write_text(page, encoding="utf-8")
    plots = [_plot(result, index, part) for index, part in enumerate(_PARTS)]
    height = plots[-1]["top"] + len(result["median"]) * _ROW + 10
    svg = environment.from_string(_SVG).render(
        plots=plots, width=_WIDTH, height=height, labels=_LABELS
    )
    (RESULTS / "peers.svg").write_text(svg, encoding="utf-8")


def _rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "size": f"{result['bytes'][name] / 1e6:.0f}",
            "kl": f"{result['kl_mean'][name]:.3g}" if name in result["kl_mean"] else "",
            **{part: f"{speeds[key]:.1f}" for part, key in _PARTS.items()},
        }
        for name, speeds in result["median"].items()
    ]


def _peers(result: Mapping[str, Any]) -> list[str]:
    first = next(iter(result["ratio"].values()), {})
    return list(first)


def _ratio_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "cells": [
                " / ".join(f"{found[key]:.2f}" for key in _PARTS.values())
                for found in against.values()
            ],
        }
        for name, against in result["ratio"].items()
    ]


def _plot(result: Mapping[str, Any], index: int, part: str) -> dict[str, Any]:
    speeds = {name: found[_PARTS[part]] for name, found in result["median"].items()}
    top = _TOP + index * (len(speeds) * _ROW + _GAP)
    scale = (_WIDTH - _LABELS - _VALUES) / max(speeds.values())
    bars = [
        {
            "name": name,
            "y": top + row * _ROW,
            "width": round(value * scale, 1),
            "value": f"{value:.0f}",
            "color": _OUR_COLOR if name.startswith("qwen2x ") else _PEER_COLOR,
        }
        for row, (name, value) in enumerate(speeds.items())
    ]
    return {"name": part, "top": top, "bars": bars}
