from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qwen2x.quantize.groups import dequantize, quantize
from qwen2x.quantize.scheme import Scheme
from qwen2x.quantize.search import search_grid

Floats = NDArray[np.float32]
# 18 trials against every zero point and 60 spans: all groups together lose this much at most.
FEW_TRIALS = 1.05
# A scale is rounded to bfloat16, which may cost a group a little of what its zero point gains.
ROUNDED_SCALE = 1.03


def drawn(kind: str, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    shape = (48, 256)
    values = {
        "normal": random.standard_normal(shape),
        "heavy tails": random.standard_t(3, shape),
        "one sided": np.abs(random.standard_normal(shape)),
        "skewed": random.exponential(1, shape) - 0.5,
    }[kind]
    return values.astype(np.float32)


KINDS = ["normal", "heavy tails", "one sided", "skewed"]
ZERO_POINTS = [Scheme(bits=4, group_size=size, is_symmetric=False) for size in (32, 64, 128)]


def lost(values: Floats, restored: Floats, importance: Floats) -> float:
    return float((importance * np.square(values.astype(np.float64) - restored)).sum())


def by_brute_force(values: Floats, scheme: Scheme) -> float:
    """Squared error of the best zero point and span of each group."""
    groups = values.reshape(-1, scheme.group_size).astype(np.float64)
    low = np.minimum(groups.min(axis=1), 0)[:, None]
    high = np.maximum(groups.max(axis=1), 0)[:, None]
    best = np.full(len(groups), np.inf)
    for zero_point in range(scheme.max_code + 1):
        for span in np.linspace(0.6, 1.1, 60):
            step = (high - low) * span / scheme.max_code
            codes = np.clip(np.rint(groups / step), -zero_point, scheme.max_code - zero_point)
            square = np.square(codes).sum(axis=1)
            scale = (groups * codes).sum(axis=1) / np.where(square == 0, 1, square)
            error = np.square(groups - codes * scale[:, None]).sum(axis=1)
            best = np.minimum(best, error)
    return float(best.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ZERO_POINTS, ids=lambda scheme: scheme.name)
def test_zero_points_are_nearly_those_of_a_brute_force_search(scheme: Scheme, kind: str) -> None:
    values = drawn(kind)[:12]
    ones = np.ones(values.shape[1], np.float32)
    ours = lost(values, dequantize(quantize(values, scheme)), ones)
    assert ours <= FEW_TRIALS * by_brute_force(values, scheme)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ZERO_POINTS, ids=lambda scheme: scheme.name)
def test_a_zero_point_of_its_own_loses_no_more_than_the_common_one(
    scheme: Scheme, kind: str
) -> None:
    values = drawn(kind)
    ones = np.ones(values.shape[1], np.float32)
    common = Scheme(bits=4, group_size=scheme.group_size)
    own = lost(values, dequantize(quantize(values, scheme)), ones)
    assert own <= ROUNDED_SCALE * lost(values, dequantize(quantize(values, common)), ones)
    if kind in ("one sided", "skewed"):
        assert own < 0.6 * lost(values, dequantize(quantize(values, common)), ones)


def test_scales_are_bfloat16_numbers_and_zero_points_codes() -> None:
    grid = search_grid(drawn("skewed"), np.ones(256, np.float32), ZERO_POINTS[0])
    assert grid.zero_points is not None
    np.testing.assert_array_equal(grid.scales, grid.scales.astype(bfloat16).astype(np.float32))
    np.testing.assert_array_equal(grid.zero_points, np.rint(grid.zero_points))
    assert 0 <= grid.zero_points.min() <= grid.zero_points.max() <= 15


def test_zeros_stay_zeros_beside_any_zero_point() -> None:
    values = drawn("skewed")
    values[:, ::3] = 0
    values[5] = 0
    matrix = quantize(values, ZERO_POINTS[0])
    assert (dequantize(matrix)[values == 0] == 0).all()


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_what_is_important_is_met_better(is_symmetric: bool) -> None:
    scheme = Scheme(bits=4, group_size=64, is_symmetric=is_symmetric)
    values = drawn("normal", 3)
    importance = np.ones(256, np.float32)
    importance[::8] = 100

    def weighted(weights: Floats) -> float:
        grid = search_grid(values, weights, scheme)
        grouped = values.reshape(*grid.scales.shape, 64)
        zero_points = 8 if grid.zero_points is None else grid.zero_points[:, :, None]
        codes = np.rint(grouped / grid.scales[:, :, None]) + zero_points
        restored = (np.clip(codes, 0, 15) - zero_points) * grid.scales[:, :, None]
        return lost(values, restored.reshape(values.shape), importance)

    assert weighted(importance) < 0.97 * weighted(np.ones(256, np.float32))
