from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from qwen2x.cli.figures import Figures
from qwen2x.cli.labels import box_of, place_labels, shorten
from qwen2x.cli.plot import BOTTOM, LEFT, RIGHT, TOP, Dot
from qwen2x.cli.plots import (
    kl_along_positions,
    kl_histogram,
    kl_range,
    layer_errors,
    percentile,
    size_against_kl,
)
from qwen2x.runtimes.layers import LayerDifference
from tests.cli.svg import points_of, require_within


def some_kl(count: int = 700, mean: float = -3.5) -> list[float]:
    values: list[float] = np.random.default_rng(0).lognormal(mean, 1.2, count).tolist()
    return values


def figures(name: str, megabytes: float, kl_mean: float) -> Figures:
    return Figures(
        folder=Path(name),
        scheme="int4-g32",
        method="rtn",
        ran_on="onnx cpu",
        bits_per_weight=4.5,
        bytes=int(megabytes * 1e6),
        kl_mean=kl_mean,
        kl_p99=kl_mean * 5,
        kl_max=kl_mean * 50,
        top1_agreement=0.9,
        perplexity=12.0,
        perplexity_reference=11.5,
    )


def layer(name: str, error: float) -> LayerDifference:
    return LayerDifference(
        layer=name, relative_error=error, worst=error, worst_position=0, cosine=1.0
    )


def shapes(svg: ElementTree.Element, tag: str, kind: str) -> list[ElementTree.Element]:
    return [element for element in svg if (element.tag, element.get("class")) == (tag, kind)]


# Along the text, and how often


@pytest.mark.parametrize("count", [2, 5, 700, 5000])
def test_every_position_is_a_point_at_its_place(count: int) -> None:
    kl = some_kl(count)
    plot = kl_along_positions("a", kl, kl_range(kl, kl))
    svg = require_within(plot)
    (cloud,) = shapes(svg, "path", "cloud")
    points = points_of(cloud)
    assert len(points) == min(count, 1250 if count == 5000 else count)
    worst = int(np.argmax(kl))
    assert (plot.x.at(worst - worst % math.ceil(count / 1500)), plot.y.at(kl[worst])) in points
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in points)
    (limit,) = shapes(svg, "polyline", "limit")
    assert points_of(limit)[0][1] == plot.y.at(float(np.quantile(kl, 0.99)))


def test_the_smoothed_line_is_the_mean_of_neighbours() -> None:
    kl = some_kl(320)
    plot = kl_along_positions("a", kl, kl)
    line = points_of(shapes(require_within(plot), "polyline", "mean")[0])
    for index in (10, 100, 300):
        # Ten neighbours, five of them before.
        mean = float(np.mean(kl[index - 5 : index + 5]))
        at = min(line, key=lambda point: abs(point[0] - plot.x.at(index)))
        if at[0] == plot.x.at(index):
            assert at[1] == pytest.approx(plot.y.at(mean), abs=0.11)


def test_the_histogram_counts_every_position_once() -> None:
    kl = [1e-9, 0.0, *[0.02] * 50, *[0.3] * 48]
    plot = kl_histogram("h", kl, kl_range(kl, kl))
    bars = [
        (float(bar.attrib["x"]), (BOTTOM - float(bar.attrib["y"])) / (BOTTOM - TOP) * plot.y.high)
        for bar in require_within(plot).iter("rect")
    ]
    assert sum(share for _, share in bars) == pytest.approx(100, abs=0.6)
    assert len(bars) == 3, "what lies below the axis is at its left end"
    assert max(share for _, share in bars) == pytest.approx(50, abs=0.3)
    assert sorted(bars)[0][0] < LEFT + 1


def test_figures_that_are_no_numbers_lie_at_the_top() -> None:
    kl = [0.0, 1e-9, math.inf, math.nan, 0.5]
    plot = kl_along_positions("a", kl, kl_range(kl, kl))
    points = points_of(shapes(require_within(plot), "path", "cloud")[0])
    assert [y for _, y in points[2:4]] == [TOP, TOP]
    require_within(kl_histogram("h", kl, kl_range(kl, kl)))
    assert percentile(kl, 0.99) == math.inf
    require_within(kl_along_positions("a", [0.0] * 9, kl_range([0.0] * 9, [0.0] * 9)))
    require_within(kl_histogram("h", [math.nan] * 9, kl_range([math.nan] * 9, [0.1])))


def test_plots_have_one_scale_unless_it_would_hide_them() -> None:
    near, nearer, exact = some_kl(), some_kl(mean=-7), some_kl(mean=-27)
    alike = [*near, *nearer]
    assert kl_range(near, alike) == kl_range(nearer, alike)
    everything = [*alike, *exact]
    assert kl_range(exact, everything) == kl_range(exact, exact)
    assert kl_range(near, everything) == kl_range(near, near)


# Layers


def test_layers_are_points_and_the_limit_a_line() -> None:
    layers = [
        layer("embed_tokens", 0.0),
        *(layer(f"layers.{i}", 0.01 * (i + 1)) for i in range(24)),
    ]
    plot = layer_errors("l", layers, 0.4)
    svg = require_within(plot)
    dots = shapes(svg, "circle", "own")
    assert len(dots) == 25
    assert [dot[0].text for dot in dots][-1] == "layers.23: 0.24"
    heights = [float(dot.attrib["cy"]) for dot in dots]
    assert heights[0] == BOTTOM
    assert heights == sorted(heights, reverse=True)
    assert points_of(shapes(svg, "polyline", "limit")[0])[0][1] == plot.y.at(0.4)
    require_within(layer_errors("l", [layer("embed_tokens", 0.1)], 0.4))
    require_within(layer_errors("l", [layer("embed_tokens", math.nan), layer("layers.0", 1)], 0.4))


# Size


def test_variants_lie_where_they_should_and_the_frontier_joins_the_best() -> None:
    own = [figures("mine", 350, 0.03)]
    beside = [figures("larger", 500, 0.001), figures("worse", 360, 0.08), figures("tiny", 300, 0.1)]
    plot = size_against_kl("s", own, beside)
    svg = require_within(plot)
    (dot,) = shapes(svg, "circle", "own")
    assert len(shapes(svg, "circle", "beside")) == 3
    assert points_of(dot) == [(plot.x.at(350), plot.y.at(0.03))]
    (line,) = shapes(svg, "polyline", "frontier")
    places = [(300, 0.1), (350, 0.03), (500, 0.001)]
    assert points_of(line) == [(plot.x.at(size), plot.y.at(kl)) for size, kl in places]
    assert "None is smaller and closer than tiny, mine, larger." in plot.description
    assert {text.text for text in svg.iter("text")} >= {"mine", "larger", "worse", "tiny"}


@pytest.mark.parametrize("kl", [0.0, math.nan, 1e-12, 5.0])
def test_one_size_or_a_kl_that_has_no_logarithm_can_be_shown(kl: float) -> None:
    require_within(size_against_kl("s", [figures("a", 1, kl)], [figures("b", 1, 0.01)]))


def test_labels_overlap_neither_each_other_nor_points() -> None:
    random = np.random.default_rng(3)
    dots = [
        Dot(kind="own", x=float(x), y=float(y), title="t")
        for x, y in zip(random.uniform(LEFT, RIGHT, 9), random.uniform(TOP, BOTTOM, 9), strict=True)
    ]
    dots += [Dot(kind="own", x=dots[0].x + 2, y=dots[0].y, title="t")]
    labels = place_labels(dots, [f"variant-{index}" for index in range(10)])
    assert len(labels) == 10
    boxes = [box_of(label) for label in labels]
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert (
                one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            )
        for dot in dots:
            assert not (one[0] < dot.x < one[2] and one[1] < dot.y < one[3])
    # What had to move away is led back to its own point.
    for label in labels:
        near = [dot for dot in dots if abs(dot.x - label.x) < 11 and abs(dot.y - label.y) < 25]
        assert label.leader or near
        if label.leader:
            assert label.leader[0] in [(dot.x, dot.y) for dot in dots]


def test_a_crowd_leaves_labels_out_rather_than_on_top_of_each_other() -> None:
    dots = [Dot(kind="own", x=200.0, y=100.0, title="t")] * 60
    labels = place_labels(dots, ["name"] * 60)
    assert 5 < len(labels) < 60


def test_long_names_keep_the_end_that_tells_them_apart() -> None:
    assert shorten("int4") == "int4"
    short = shorten("Qwen2.5-0.5B-Instruct-onnx-int4-g32")
    assert short == "…nstruct-onnx-int4-g32"
    assert len(short) <= 22
