"""Names beside points, placed so that they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2x.cli.plot import BOTTOM, LEFT, LETTER, RIGHT, TOP, Dot, Label

_LONGEST = 22
_LINE = 15
_RADIUS = 7
# Lines sideways of the point, then above and below, and farther sideways there.
_STEPS = (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5)
_NEAR, _FAR = 10, 26

Box = tuple[float, float, float, float]


def place_labels(dots: Sequence[Dot], names: Sequence[str]) -> list[Label]:
    """A label per point, at the first free place beside it; none where all are taken."""
    taken = [(dot.x - _RADIUS, dot.y - _RADIUS, dot.x + _RADIUS, dot.y + _RADIUS) for dot in dots]
    labels = []
    for dot, name in zip(dots, names, strict=True):
        for label in _places(dot, shorten(name)):
            box = box_of(label)
            if _is_inside(box) and not any(_overlap(box, other) for other in taken):
                labels.append(label)
                taken.append(box)
                break
    return labels


def shorten(name: str) -> str:
    """The end of long names is what tells them apart."""
    return name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]


def box_of(label: Label) -> Box:
    """About the place that a label takes: left, top, right, bottom."""
    width = LETTER * len(label.text)
    left = label.x if label.anchor == "start" else label.x - width
    return left, label.y - 12, left + width, label.y + 3


def _places(dot: Dot, text: str) -> list[Label]:
    return [_label(dot, text, step, side) for step in _STEPS for side in (1, -1)]


def _label(dot: Dot, text: str, step: int, side: int) -> Label:
    """At so many lines below the point's own, on its right (1) or left (-1)."""
    is_moved = abs(step) > 1
    x = round(dot.x + side * (_FAR if is_moved else _NEAR), 1)
    y = round(dot.y + 4.5 + step * _LINE, 1)
    return Label(
        kind=dot.kind,
        x=x,
        y=y,
        text=text,
        anchor="start" if side > 0 else "end",
        leader=[(dot.x, dot.y), (round(x - side * 3, 1), round(y - 4.5, 1))] if is_moved else (),
    )


def _is_inside(box: Box) -> bool:
    left, top, right, bottom = box
    return left >= LEFT and right <= RIGHT + 10 and top >= TOP - 12 and bottom <= BOTTOM - 1


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
