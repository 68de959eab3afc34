from __future__ import annotations

import math
import re
from typing import Any

import pytest

from qwen2x.exporters.quality_section import (
    CLOSING,
    OPENING,
    is_measured,
    quality_section,
    replace_section,
)

FIGURES = {
    "kl_mean": 0.01234, "kl_p99": 0.2, "kl_max": 1.5, "top1_agreement": 0.9375,
    "perplexity": 12.5, "perplexity_reference": 12.25,
}  # fmt: skip
MEASURED = {
    **FIGURES,
    "verdict": "pass",
    "backend": "onnx", "device": "cpu", "dtype": "float32", "cache_dtype": "float16",
    "text": {"name": "built-in", "tokens": 1024, "window": 512, "sha256": "0123456789abcdef" * 4},
    "reference": {"name": "org/name", "backend": "torch"},
    "date": "2026-01-02T03:04:05+00:00", "qwen2x": "0.1.0",
}  # fmt: skip


def manifest(**quality: Any) -> dict[str, Any]:
    return {
        "source": {"id": "org/name"},
        "scheme": "int4-g32",
        "method": "gptq",
        "bits_per_weight": 5.25,
        "files": {"one": {"bytes": 1_000_000}, "two": {"bytes": 500_000}},
        "quality": quality,
    }


def rows(section: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE))


def test_measured_figures_are_a_table() -> None:
    section = quality_section(manifest(**MEASURED))
    assert section.startswith(OPENING)
    assert section.endswith(CLOSING)
    assert rows(section) == {
        "verdict": "pass",
        "KL divergence, nats": "0.0123 mean, 0.2 99th percentile, 1.5 largest",
        "same likeliest token": "93.75%",
        "perplexity": "12.5000, the original's 12.2500",
        "bits per weight": "5.25 (int4-g32, by gptq)",
        "size": "1.5 MB",
        "text": "built-in, 1,024 tokens in windows of 512 (sha256 of their ids 0123456789ab)",
        "ran on": "onnx on cpu, float32, cache in float16",
        "compared with": "PyTorch, float32",
        "measured": "2026-01-02T03:04:05+00:00, by qwen2x 0.1.0",
    }


def test_estimated_figures_say_that_they_are() -> None:
    estimate = {**FIGURES, "positions": 900, "text": "calibration", "by": "gptq's forward pass"}
    section = quality_section(manifest(estimate=estimate))
    assert "Estimated while exporting" in section
    assert rows(section)["KL divergence, nats"].startswith("0.0123 mean")
    assert rows(section)["text"] == "calibration, 900 positions"
    assert rows(section)["estimated by"] == "gptq's forward pass"
    both = quality_section(manifest(**MEASURED, estimate=estimate))
    assert both == quality_section(manifest(**MEASURED))
    assert is_measured(MEASURED)
    assert not is_measured({"estimate": estimate})


def test_without_figures_it_says_what_measures_them() -> None:
    section = quality_section(manifest())
    assert "`qwen2x validate . --against org/name`" in section
    assert rows(section) == {}


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.1"])
def test_what_is_no_number_is_said(value: Any) -> None:
    section = quality_section(manifest(**MEASURED | {"kl_mean": value, "perplexity": value}))
    assert rows(section)["KL divergence, nats"].startswith("not finite mean")
    assert rows(section)["perplexity"] == "not finite, the original's 12.2500"


def test_a_record_from_before_texts_were_recorded_is_shown_too() -> None:
    old = {key: MEASURED[key] for key in (*FIGURES, "verdict", "backend", "device", "dtype")}
    section = quality_section(manifest(**old, positions=1024))
    assert rows(section)["text"] == "1024 positions"
    assert "measured" not in rows(section)


def test_a_name_can_end_neither_its_cell_nor_the_part() -> None:
    text = MEASURED["text"] | {"name": f"a|b\n{CLOSING}"}  # type: ignore[operator]
    section = quality_section(manifest(**MEASURED | {"text": text}))
    assert section.count(CLOSING) == 1
    assert r"a\|b &lt;!-- /qwen2x:quality --&gt;" in section


def test_only_the_part_between_the_comments_is_replaced() -> None:
    old = quality_section(manifest()).encode()
    card = b"caf\xe9 before\n" + old + b"\nafter \xff"
    new = replace_section(card, manifest(**MEASURED))
    assert new == b"caf\xe9 before\n" + quality_section(manifest(**MEASURED)).encode() + (
        b"\nafter \xff"
    )
    assert replace_section(new, manifest()) == card


def test_line_ends_stay_those_of_the_card() -> None:
    card = quality_section(manifest()).replace("\n", "\r\n").encode()
    new = replace_section(card, manifest(**MEASURED))
    assert b"0.0123 mean" in new
    assert new.count(b"\n") == new.count(b"\r\n") > 5


@pytest.mark.parametrize(
    "card",
    [
        "",
        "mine alone",
        OPENING,
        CLOSING,
        CLOSING + OPENING,
        OPENING + OPENING + CLOSING,
        (OPENING + CLOSING) * 2,
    ],
)
def test_a_card_without_exactly_one_part_is_left_alone(card: str) -> None:
    assert replace_section(card.encode(), manifest(**MEASURED)) == card.encode()
