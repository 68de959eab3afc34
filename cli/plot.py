"""One plot as an inline SVG: axes, and marks whose colours are the page's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment
from markupsafe import Markup

from qwen2x.cli.scale import Scale

# Drawn for the width of a phone: a wider plot would have unreadable letters there.
WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 466, 30, 250
# About the width of a letter of the page's font.
LETTER = 7.6
_SVG = """\
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" \
aria-labelledby="{{ plot.key }}-title {{ plot.key }}-desc">
<title id="{{ plot.key }}-title">{{ plot.title }}</title>
<desc id="{{ plot.key }}-desc">{{ plot.description }}</desc>
{% for at, label in plot.y.ticks() %}\
<line class="grid" x1="{{ left }}" x2="{{ right }}" y1="{{ at }}" y2="{{ at }}"/>\
<text x="{{ left - 6 }}" y="{{ at + 4.5 }}" text-anchor="end">{{ label }}</text>
{% endfor %}{% for at, label in plot.x.ticks() %}\
<line class="tick" x1="{{ at }}" x2="{{ at }}" y1="{{ bottom }}" y2="{{ bottom + 5 }}"/>\
<text x="{{ inside(at, label) }}" y="{{ bottom + 20 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}\
<line class="tick" x1="{{ left }}" x2="{{ right }}" y1="{{ bottom }}" y2="{{ bottom }}"/>
<text class="name" x="2" y="14">{{ plot.y_name }}</text>
<text class="name" x="{{ right }}" y="{{ bottom + 42 }}" text-anchor="end">{{ plot.x_name }}</text>
{% for bar in plot.bars %}\
<rect class="bar" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" \
height="{{ bar.height }}"/>
{% endfor %}{% if plot.cloud %}\
<path class="cloud" d="{% for x, y in plot.cloud %}M{{ x }} {{ y }}h0{% endfor %}"/>
{% endif %}{% for line in plot.lines %}\
<polyline class="{{ line.kind }}" \
points="{% for x, y in line.points %}{{ x }},{{ y }} {% endfor %}"/>
{% endfor %}{% for dot in plot.dots %}\
<circle class="{{ dot.kind }}" cx="{{ dot.x }}" cy="{{ dot.y }}" r="5">\
<title>{{ dot.title }}</title></circle>
{% endfor %}{% for label in plot.labels %}\
{% if label.leader %}<polyline class="leader" points="\
{% for x, y in label.leader %}{{ x }},{{ y }} {% endfor %}"/>{% endif %}\
<text class="label {{ label.kind }}" x="{{ label.x }}" y="{{ label.y }}" \
text-anchor="{{ label.anchor }}">{{ label.text }}</text>
{% endfor %}</svg>"""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points that are joined; ``kind`` is the class that the page's style knows."""

    kind: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point that says what it is when it is pointed at."""

    kind: str
    x: float
    y: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Label:
    """Text beside a point; ``leader`` leads to it where it had to move away."""

    kind: str
    x: float
    y: float
    text: str
    anchor: str
    leader: Sequence[Point] = ()


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Axes and marks. ``key`` tells plots of a page apart, ``description`` is for who sees none."""

    key: str
    title: str
    description: str
    x: Scale
    y: Scale
    x_name: str
    y_name: str
    bars: Sequence[Bar] = ()
    cloud: Sequence[Point] = ()
    lines: Sequence[Line] = ()
    dots: Sequence[Dot] = ()
    labels: Sequence[Label] = ()

    def to_svg(self) -> Markup:
        """The element, for a page that has the style."""
        template = Environment(autoescape=True).from_string(_SVG)
        size = {"width": WIDTH, "height": HEIGHT}
        edges = {"left": LEFT, "right": RIGHT, "bottom": BOTTOM}
        return Markup(template.render(plot=self, inside=_inside, **size, **edges))


def _inside(middle: float, label: str) -> float:
    """A little to the left where a label would leave the picture."""
    return min(middle, WIDTH - LETTER / 2 * len(label))
