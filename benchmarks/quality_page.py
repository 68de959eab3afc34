"""The table and the plot of ``benchmarks.quality``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment

from benchmarks.measure import RESULTS

Variants = Mapping[str, Mapping[str, Any]]

_COLORS = {
    "qwen2x": "#c4461f",
    "llama.cpp": "#3465a4",
    "mlx-lm": "#4d8f3a",
    "onnxruntime-genai": "#7a5195",
}
_HEAD = """\
| variant | bytes | bits per weight | KL prose, mean | p99 | KL code, mean | p99 \
| top-1 prose | top-1 code | KL / line, prose | code |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""
_INTRODUCTION = """\
# Size against KL divergence

Written by `python -m benchmarks.quality`: {tokens} tokens of prose and of code in windows of
{window}, against transformers in float32. KL divergence is in nats per position, mean and 99th
percentile; top-1 is how often the likeliest token is the same. Bytes are those of the files that
hold weights, bits per weight those bytes over {parameters:,} parameters.

KL / line is the mean divergence over that of the straight line (logarithm of KL against bytes)
fitted to llama.cpp's points; below 1 lies below the line. MLX folders, ours and mlx-lm's, are
measured by their weights alone, in float32; the others run on their own CPU kernels, which round
activations to 8 bits.

"""
_PLOT_WIDTH, _PLOT_HEIGHT, _LEFT, _TOP, _GAP = 900, 460, 70, 60, 70
_MEGA = 1e6
_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" \
font-family="system-ui, sans-serif" font-size="12" role="img" \
aria-label="Size against KL divergence">
<rect width="{{ width }}" height="{{ height }}" fill="#fff"/>
{% for family in families %}<circle cx="{{ family.x }}" cy="16" r="5" fill="{{ family.color }}"/>
<text x="{{ family.x + 10 }}" y="20">{{ family.name }}</text>
{% endfor %}{% for plot in plots %}
<text x="{{ left }}" y="{{ plot.top - 8 }}" font-weight="600">\
KL divergence on {{ plot.text }}, mean, in nats</text>
{% for tick in plot.rows %}<line x1="{{ left }}" x2="{{ right }}" y1="{{ tick.at }}" \
y2="{{ tick.at }}" stroke="#ddd"/>
<text x="{{ left - 6 }}" y="{{ tick.at + 4 }}" text-anchor="end">{{ tick.label }}</text>
{% endfor %}{% for tick in plot.columns %}<line x1="{{ tick.at }}" x2="{{ tick.at }}" \
y1="{{ plot.top }}" y2="{{ plot.bottom }}" stroke="#eee"/>
<text x="{{ tick.at }}" y="{{ plot.bottom + 16 }}" text-anchor="middle">{{ tick.label }}</text>
{% endfor %}<text x="{{ right }}" y="{{ plot.bottom + 32 }}" text-anchor="end">\
MB of weights (bits per weight)</text>
{% if plot.line %}<line x1="{{ plot.line[0] }}" y1="{{ plot.line[1] }}" \
x2="{{ plot.line[2] }}" y2="{{ plot.line[3] }}" stroke="{{ line_color }}" \
stroke-dasharray="6 4"/>
{% endif %}{% for point in plot.points %}<circle cx="{{ point.x }}" cy="{{ point.y }}" r="5" \
fill="{{ point.color }}"><title>{{ point.name }}</title></circle>
<path d="M{{ point.x }} {{ point.y }}L{{ point.label_x }} {{ point.label_y }}" \
stroke="{{ point.color }}" stroke-width="0.6"/>
<text x="{{ point.label_x }}" y="{{ point.label_y + 4 }}" fill="{{ point.color }}" \
font-size="{{ 12 if point.is_ours else 10 }}" \
text-anchor="{{ 'start' if point.is_ours else 'end' }}" \
stroke="#fff" stroke-width="3" paint-order="stroke" \
font-weight="{{ 600 if point.is_ours else 400 }}">{{ point.label }}</text>
{% endfor %}{% endfor %}
</svg>
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """log10 of the mean KL divergence as a linear function of megabytes."""

    slope: float
    intercept: float

    def kl_at(self, size: int) -> float:
        """Nats at so many bytes."""
        return math.pow(10, self.intercept + self.slope * size / _MEGA)

    def compare(self, variant: Mapping[str, Any], text: str) -> dict[str, Any]:
        """A variant's divergence over the line's at its size."""
        ratio = variant[text]["kl_mean"] / self.kl_at(variant["bytes"])
        return {"kl_ratio": ratio, "is_below": ratio < 1}


def line_through(variants: Sequence[Mapping[str, Any]], text: str) -> Line:
    """The line of least squares in log10 of KL."""
    sizes = [variant["bytes"] / _MEGA for variant in variants]
    logarithms = [math.log10(variant[text]["kl_mean"]) for variant in variants]
    slope, intercept = np.polyfit(sizes, logarithms, 1)
    return Line(slope=float(slope), intercept=float(intercept))


def write_pages(variants: Variants, lines: Mapping[str, Line], setting: Mapping[str, Any]) -> None:
    """Writes ``quality.md`` and ``quality.svg`` beside the other results."""
    rows = [markdown_row(name, variant) for name, variant in variants.items()]
    table = _INTRODUCTION.format(**setting) + _HEAD + "\n".join(rows) + "\n"
    table += "\n![Size against KL divergence](quality.svg)\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality.md").write_text(table, encoding="utf-8")
    (RESULTS / "quality.svg").write_text(_draw(variants, lines), encoding="utf-8")


def markdown_row(name: str, variant: Mapping[str, Any]) -> str:
    """One line of the table."""
    prose, code = variant["prose"], variant["code"]
    against = variant.get("against_line") or {}
    ratios = [f"{against[text]['kl_ratio']:.2f}" if against else "" for text in ("prose", "code")]
    cells = [
        name,
        f"{variant['bytes']:,}",
        f"{variant['bits_per_weight']:.2f}",
        *(f"{text[key]:.3g}" for text in (prose, code) for key in ("kl_mean", "kl_p99")),
        *(f"{100 * text['top1_agreement']:.1f} %" for text in (prose, code)),
        *ratios,
    ]
    return f"| {' | '.join(cells)} |"


def _draw(variants: Variants, lines: Mapping[str, Line]) -> str:
    families = [
        {"name": name, "color": color, "x": _LEFT + 150 * index}
        for index, (name, color) in enumerate(_COLORS.items())
    ]
    plots = [
        _plot(variants, text, lines.get(text), _TOP + index * (_PLOT_HEIGHT + _GAP))
        for index, text in enumerate(("prose", "code"))
    ]
    page = Environment(autoescape=True).from_string(_SVG)
    return page.render(
        plots=plots,
        families=families,
        line_color=_COLORS["llama.cpp"],
        left=_LEFT,
        right=_PLOT_WIDTH,
        width=_PLOT_WIDTH + 40,
        height=_TOP + 2 * (_PLOT_HEIGHT + _GAP),
    )


def _plot(variants: Variants, text: str, line: Line | None, top: float) -> dict[str, Any]:
    """Coordinates of one text's plot."""
    sizes: list[float] = [variant["bytes"] / _MEGA for variant in variants.values()]
    first, last = 50 * math.floor(min(sizes) / 50), 50 * math.ceil(max(sizes) / 50) + 50
    values = [math.log10(variant[text]["kl_mean"]) for variant in variants.values()]
    low, high = math.floor(min(values)), math.ceil(max(values))

    some = next(iter(variants.values()))
    bits_per_byte: float = some["bits_per_weight"] / some["bytes"]

    def x_of(megabytes: float) -> float:
        return round(_LEFT + (megabytes - first) / (last - first) * (_PLOT_WIDTH - _LEFT), 1)

    def y_of(logarithm: float) -> float:
        share = (high - logarithm) / (high - low)
        return round(top + share * _PLOT_HEIGHT, 1)

    def bits_at(megabytes: float) -> float:
        return float(bits_per_byte * megabytes * _MEGA)

    points = [
        _point(name, x_of(size), y_of(value))
        for name, size, value in zip(variants, sizes, values, strict=True)
    ]
    _part_labels(points)
    return {
        "text": text,
        "top": top,
        "bottom": top + _PLOT_HEIGHT,
        "rows": [
            {"at": y_of(power + math.log10(step)), "label": f"{step * math.pow(10, power):g}"}
            for power in range(low, high)
            for step in (1, 2, 5)
        ]
        + [{"at": y_of(high), "label": f"{math.pow(10, high):g}"}],
        "columns": [
            {"at": x_of(size), "label": f"{size} ({bits_at(size):.1f})"}
            for size in range(first, last + 1, 50)
        ],
        "line": _clipped(line, (first, last), (low, high), x_of, y_of) if line else None,
        "points": points,
    }


def _point(name: str, x: float, y: float) -> dict[str, Any]:
    """Our labels are on the right of their points, the others' on the left."""
    family, label = name.split(maxsplit=1)
    is_ours = family == "qwen2x"
    width = (7.2 if is_ours else 5.6) * len(label)
    label_x = x + 24 if is_ours else x - 14
    return {
        "name": name,
        "label": label,
        "color": _COLORS[family],
        "is_ours": is_ours,
        "x": x,
        "y": y,
        "label_x": label_x,
        "label_y": y,
        "ends": (label_x, label_x + width) if is_ours else (label_x - width, label_x),
    }


def _part_labels(points: list[dict[str, Any]]) -> None:
    """Moves each label to the nearest height where it covers no point and no other label."""
    taken = [(point["x"] - 6, point["x"] + 6, point["y"], 10) for point in points]
    for point in sorted(points, key=lambda point: (point["y"], point["x"])):
        left, right = point["ends"]
        for step in range(_PLOT_HEIGHT):
            y = round(point["y"] + (step // 2) * (-1) ** step, 1)
            if all(
                right < start or left > end or abs(y - other) >= distance
                for start, end, other, distance in taken
            ):
                break
        point["label_y"] = y
        taken.append((left, right, y, 13))


def _clipped(
    line: Line, columns: tuple[int, int], rows: tuple[int, int], x_of: Any, y_of: Any
) -> list[float]:
    """The ends of a falling line within the plot."""
    at = [(limit - line.intercept) / line.slope for limit in reversed(rows)]
    first, last = max(columns[0], min(at)), min(columns[1], max(at))
    ends = [(size, line.intercept + line.slope * size) for size in (first, last)]
    return [value for size, logarithm in ends for value in (x_of(size), y_of(logarithm))]
