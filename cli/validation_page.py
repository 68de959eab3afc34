"""One self-contained HTML page of a validation, with the divergence along the text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment

_WIDTH, _HEIGHT, _LEFT, _BARS = 860, 220, 60, 200
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ bundle }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 920px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 }
td, th { text-align: left; padding: .25em 1.2em .25em 0; border-bottom: 1px solid #ddd }
.pass { color: #0a7a33 } .fail { color: #b3001b; font-weight: 600 }
</style>
<h1>{{ bundle }}: <span class="{{ verdict }}">{{ verdict }}</span></h1>
<p>Logits of {{ facts.scheme }} ({{ "%.2f"|format(facts.bits_per_weight) }} bits per weight,
{{ facts.backend }} on {{ facts.device }}) against PyTorch's for <b>{{ against }}</b>,
{{ found.positions }} positions.</p>
<table>
<tr><th>KL divergence, mean</th><td>{{ "%.3g"|format(found.kl_mean) }} nats</td></tr>
<tr><th>KL divergence, 99th percentile, largest</th>
<td>{{ "%.3g"|format(found.kl_p99) }}, {{ "%.3g"|format(found.kl_max) }} nats</td></tr>
<tr><th>Same likeliest token</th><td>{{ "%.2f"|format(100 * found.top1_agreement) }} %</td></tr>
<tr><th>Shared among the ten likeliest</th>
<td>{{ "%.2f"|format(100 * found.top10_overlap) }} %</td></tr>
<tr><th>Largest and mean difference of logits</th>
<td>{{ "%.3g"|format(found.max_abs_diff) }}, {{ "%.3g"|format(found.mean_abs_diff) }}</td></tr>
<tr><th>Perplexity, and PyTorch's</th>
<td>{{ "%.4f"|format(found.perplexity) }}, {{ "%.4f"|format(found.perplexity_reference) }}</td></tr>
</table>
<h2>KL divergence along the text</h2>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="KL divergence by position">
{% for line in grid %}<line x1="{{ left }}" x2="{{ width }}" y1="{{ line.y }}" y2="{{ line.y }}"
 stroke="#ddd"/><text x="0" y="{{ line.y + 4 }}" font-size="12">{{ line.label }}</text>
{% endfor %}{% for bar in bars %}<rect x="{{ "%.2f"|format(bar.x) }}" y="{{ "%.2f"|format(bar.y) }}"
 width="{{ "%.2f"|format(bar.width) }}" height="{{ "%.2f"|format(bar.height) }}" fill="#3465a4"/>
{% endfor %}</svg>
<p>Each bar is the largest value of neighbouring positions; the scale is logarithmic.</p>
<h2>Checks</h2>
<table><tr><th>check</th><th>verdict</th><th>value</th><th>limit</th></tr>
{% for check in checks %}<tr><td>{{ check.name }}</td>
<td class="{{ check.verdict }}">{{ check.verdict }}</td><td>{{ "%.4g"|format(check.value) }}</td>
<td>{{ "at least" if check.is_floor else "at most" }} {{ "%g"|format(check.limit) }}</td></tr>
{% endfor %}</table>
</html>
"""


def write_page(path: Path, bundle: Path, against: str, report: Any) -> None:
    """Writes the page of a ``Report`` of ``runtimes.validate``."""
    bars, grid = _bars(report.difference.kl)
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        bundle=bundle.name,
        against=against,
        verdict=report.verdict,
        facts=report.facts,
        found=report.difference,
        checks=report.checks,
        bars=bars,
        grid=grid,
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
    )
    path.write_text(text, encoding="utf-8")


def _bars(kl: tuple[float, ...]) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Bars of neighbouring positions' largest value, and grid lines, on a logarithmic scale."""
    step = max(1, math.ceil(len(kl) / _BARS))
    tops = [max(kl[start : start + step]) for start in range(0, len(kl), step)]
    positive = [top for top in tops if 0 < top < math.inf] or [1e-12]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)

    def height(value: float) -> float:
        if not math.isfinite(value):
            return _HEIGHT - 20
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return share * (_HEIGHT - 20)

    width = (_WIDTH - _LEFT) / len(tops)
    bars = [
        {
            "x": _LEFT + index * width,
            "y": _HEIGHT - 10 - height(top),
            "width": max(width - 0.5, 0.5),
            "height": height(top),
        }
        for index, top in enumerate(tops)
    ]
    grid = [
        {"y": _HEIGHT - 10 - height(10.0**power), "label": f"1e{power}"}
        for power in range(low, high + 1, max(1, (high - low) // 6))
    ]
    return bars, grid
