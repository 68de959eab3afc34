"""The plots of a page: divergence along a text and its distribution, layers, size against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen2x.cli.figures import Figures, frontier
from qwen2x.cli.labels import place_labels
from qwen2x.cli.output import figure_text, size_text
from qwen2x.cli.plot import BOTTOM, LEFT, RIGHT, TOP, Bar, Dot, Line, Plot, Point
from qwen2x.cli.scale import Scale, log_scale

if TYPE_CHECKING:
    from qwen2x.runtimes.layers import LayerDifference

_MOST_POINTS = 1500
_MOST_SMOOTHED = 240
_SMOOTHED_SHARE, _LEAST_SMOOTHED = 32, 5
_BINS_PER_DECADE = 4
# Plots of one page have one scale within this ratio; beyond, each would be a thin stripe.
_ALIKE = 1e7
_MEGA = 1e6
_KL = "KL divergence, nats"


def kl_range(kl: Sequence[float], all_kl: Sequence[float]) -> list[float]:
    """What the axis of divergences reaches over: of everything on the page, if that is alike.

    The lowest hundredth, which tells nothing and reaches far down, is left out.
    """
    own, everything = _middle(kl), _middle(all_kl)
    return everything if everything[0] * _ALIKE > everything[1] else own


def _middle(kl: Sequence[float]) -> list[float]:
    finite = sorted(value for value in kl if 0 < value < math.inf) or [1e-12]
    return [finite[len(finite) // 100], finite[-1]]


def smoothing_span(count: int) -> int:
    """How many neighbouring positions the smoothed line averages."""
    return max(_LEAST_SMOOTHED, count // _SMOOTHED_SHARE)


def kl_along_positions(key: str, kl: Sequence[float], reach: Sequence[float]) -> Plot:
    """A point per position, or the largest of neighbours where there are many; mean and p99.

    Args:
        key: see ``Plot``.
        kl: nats per position.
        reach: see ``kl_range``.
    """
    x = Scale(low=0, high=max(len(kl), 2), start=LEFT, end=RIGHT)
    y = log_scale(reach, BOTTOM, TOP)
    step = math.ceil(len(kl) / _MOST_POINTS)
    cloud = [
        (x.at(start), y.at(_largest(kl[start : start + step]))) for start in range(0, len(kl), step)
    ]
    p99 = percentile(kl, 0.99)
    limit = Line(kind="limit", points=[(LEFT, y.at(p99)), (RIGHT, y.at(p99))])
    return Plot(
        key=key,
        title="KL divergence along the text",
        description=(
            f"{len(kl)} positions, mean {figure_text(_mean(kl))}, 99th percentile "
            f"{figure_text(p99)}, largest {figure_text(_largest(kl))} nats, on a logarithmic scale."
        ),
        x=x,
        y=y,
        x_name="position in the text, tokens",
        y_name=_KL,
        cloud=cloud,
        lines=[Line(kind="mean", points=_smoothed(kl, x, y)), limit],
    )


def kl_histogram(key: str, kl: Sequence[float], reach: Sequence[float]) -> Plot:
    """Share of positions per quarter of a decade; mean and p99. What is smaller is at the left."""
    x = log_scale(reach, LEFT, RIGHT)
    bins = _BINS_PER_DECADE * round(math.log10(x.high / x.low))
    width = (RIGHT - LEFT) / bins
    counts = [0] * bins
    for value in kl:
        counts[min(int((x.at(value) - LEFT) / width), bins - 1)] += 1
    shares = [100 * count / len(kl) for count in counts]
    y = Scale(low=0, high=5 * math.ceil(max(shares) / 5), start=BOTTOM, end=TOP)
    bars = [
        Bar(
            x=round(LEFT + index * width + 0.5, 1),
            y=y.at(share),
            width=round(width - 1, 1),
            height=round(BOTTOM - y.at(share), 1),
        )
        for index, share in enumerate(shares)
        if share
    ]
    marks = (("mean", _mean(kl)), ("limit", percentile(kl, 0.99)))
    peak = x.low * math.pow(10, shares.index(max(shares)) / _BINS_PER_DECADE)
    return Plot(
        key=key,
        title="How often which KL divergence occurs",
        description=f"Most positions, {max(shares):.0f} %, lie just above {peak:.2g} nats.",
        x=x,
        y=y,
        x_name=_KL,
        y_name="% of positions",
        bars=bars,
        lines=[
            Line(kind=kind, points=[(x.at(value), BOTTOM), (x.at(value), TOP)])
            for kind, value in marks
        ],
    )


def layer_errors(key: str, layers: Sequence[LayerDifference], limit: float) -> Plot:
    """Relative error of the residual stream behind the embedding (at -1) and every layer."""
    errors = [layer.relative_error for layer in layers]
    x = Scale(low=-1, high=max(len(layers) - 2, 0), start=LEFT, end=RIGHT)
    y = log_scale([*errors, limit], BOTTOM, TOP)
    points = [(x.at(index - 1), y.at(error)) for index, error in enumerate(errors)]
    dots = [
        Dot(
            kind="own",
            x=at[0],
            y=at[1],
            title=f"{layer.layer}: {figure_text(layer.relative_error)}",
        )
        for at, layer in zip(points, layers, strict=True)
    ]
    return Plot(
        key=key,
        title="Error of hidden states, layer by layer",
        description=(
            f"From {figure_text(errors[0])} behind the embedding to {figure_text(errors[-1])} "
            f"behind the last layer, relative to their length; the limit is {limit:g}."
        ),
        x=x,
        y=y,
        x_name="layer (-1: embedding)",
        y_name="relative error",
        lines=[
            Line(kind="mean", points=points),
            Line(kind="limit", points=[(LEFT, y.at(limit)), (RIGHT, y.at(limit))]),
        ],
        dots=dots,
    )


def size_against_kl(key: str, own: Sequence[Figures], beside: Sequence[Figures]) -> Plot:
    """A point per variant; the line joins those that no other is smaller and closer than."""
    variants = sorted([*own, *beside], key=lambda one: (one.bytes, one.distance))
    sizes = [one.bytes / _MEGA for one in variants]
    margin = max((max(sizes) - min(sizes)) * 0.08, max(sizes) * 0.02)
    x = Scale(low=min(sizes) - margin, high=max(sizes) + margin, start=LEFT, end=RIGHT)
    y = log_scale([one.kl_mean for one in variants], BOTTOM, TOP)

    def place(one: Figures) -> Point:
        return x.at(one.bytes / _MEGA), y.at(one.kl_mean)

    dots = [
        Dot(
            kind="own" if one in own else "beside",
            x=place(one)[0],
            y=place(one)[1],
            title=f"{one.folder.name}: {size_text(one.bytes)}, KL {figure_text(one.kl_mean)}",
        )
        for one in variants
    ]
    best = frontier(variants)
    return Plot(
        key=key,
        title="Size against KL divergence",
        description="; ".join(dot.title for dot in dots)
        + ". None is smaller and closer than "
        + ", ".join(one.folder.name for one in best)
        + ".",
        x=x,
        y=y,
        x_name="size on disk, MB",
        y_name="mean KL divergence, nats",
        lines=[Line(kind="frontier", points=[place(one) for one in best])],
        dots=dots,
        labels=place_labels(dots, [one.folder.name for one in variants]),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """As ``compare`` has it; what is no number counts as infinite."""
    import numpy as np

    if not all(map(math.isfinite, values)):
        return sorted(map(_or_infinite, values))[math.ceil(share * (len(values) - 1))]
    return float(np.quantile(values, share))


def _smoothed(values: Sequence[float], x: Scale, y: Scale) -> list[Point]:
    """Means of neighbours, of as many as there are at both ends."""
    import numpy as np

    span = min(smoothing_span(len(values)), len(values))
    finite = np.array(list(map(_or_infinite, values)))
    sums = np.convolve(finite, np.ones(span), mode="same")
    counts = np.convolve(np.ones(len(values)), np.ones(span), mode="same")
    means = (sums / counts).tolist()
    step = math.ceil(len(means) / _MOST_SMOOTHED)
    return [(x.at(index), y.at(means[index])) for index in range(0, len(means), step)]


def _mean(values: Sequence[float]) -> float:
    return sum(map(_or_infinite, values)) / len(values)


def _largest(values: Sequence[float]) -> float:
    return max(map(_or_infinite, values))


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
