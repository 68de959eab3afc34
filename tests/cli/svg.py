"""Reads a plot back: whether everything lies within it."""

from __future__ import annotations

from xml.etree import ElementTree

from qwen2x.cli.plot import HEIGHT, WIDTH, Plot

# A letter of the page's font at its size; see cli/page_style.py.
_LETTER, _ASCENT, _DESCENT = 7.6, 11.0, 3.5

Box = tuple[float, float, float, float]


def parse(plot: Plot) -> ElementTree.Element:
    return ElementTree.fromstring(str(plot.to_svg()))


def box_of_text(element: ElementTree.Element) -> Box:
    """About its left, top, right, bottom."""
    x, y = float(element.attrib["x"]), float(element.attrib["y"])
    width = _LETTER * len(element.text or "")
    share = {"start": 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor", "start")]
    left = x - share * width
    return left, y - _ASCENT, left + width, y + _DESCENT


def points_of(element: ElementTree.Element) -> list[tuple[float, float]]:
    """Where a shape is."""
    kind, values = element.tag, element.attrib
    if kind == "polyline":
        pairs = [pair.split(",") for pair in values["points"].split()]
        return [(float(x), float(y)) for x, y in pairs]
    if kind == "line":
        return [(float(values[f"x{end}"]), float(values[f"y{end}"])) for end in "12"]
    if kind == "circle":
        return [(float(values["cx"]), float(values["cy"]))]
    if kind == "path":
        moves = [move.removesuffix("h0").split() for move in values["d"].split("M")[1:]]
        return [(float(x), float(y)) for x, y in moves]
    x, y = float(values["x"]), float(values["y"])
    return [(x, y), (x + float(values["width"]), y + float(values["height"]))]


def require_within(plot: Plot) -> ElementTree.Element:
    """Asserts that no mark and no text leaves the picture; gives it."""
    svg = parse(plot)
    for element in svg:
        if element.tag in ("title", "desc"):
            assert element.text
        elif element.tag == "text":
            left, top, right, bottom = box_of_text(element)
            inside = left >= 0 and top >= 0 and right <= WIDTH and bottom <= HEIGHT
            assert inside, ElementTree.tostring(element)
        else:
            for x, y in points_of(element):
                assert 0 <= x <= WIDTH, ElementTree.tostring(element)
                assert 0 <= y <= HEIGHT, ElementTree.tostring(element)
    return svg
