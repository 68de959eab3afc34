from __future__ import annotations

from typing import Any

import pytest

from qwen2x.quantize.errors import InputError, SchemeError
from qwen2x.quantize.scheme import Scheme


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 5, 7, 16, -4])
def test_unknown_bits_are_refused_with_the_choices(bits: int) -> None:
    with pytest.raises(SchemeError, match=rf"bits must be one of 4, 6, 8, got {bits}"):
        Scheme(bits=bits, group_size=32)


@pytest.mark.parametrize("group_size", [0, 16, 33, 256, -32])
def test_unknown_group_sizes_are_refused_with_the_choices(group_size: int) -> None:
    with pytest.raises(SchemeError, match=rf"one of 32, 64, 128, got {group_size}"):
        Scheme(bits=4, group_size=group_size)


@pytest.mark.parametrize(
    ("columns", "group_size", "advice"),
    [
        (896, 64, ""),
        (896, 128, ""),
        (4864, 128, ""),
        (224, 64, "choose 32"),
        (192, 128, "32 or 64"),
    ],
)
def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(
    columns: int, group_size: int, advice: str
) -> None:
    scheme = Scheme(bits=4, group_size=group_size)
    if not advice:
        scheme.require_divides(columns, "down_proj")
        return
    with pytest.raises(SchemeError, match=advice) as caught:
        scheme.require_divides(columns, "down_proj")
    assert f"{group_size} does not divide the {columns} columns of down_proj" in str(caught.value)


def test_columns_that_no_group_size_divides_are_sent_to_a_float_export() -> None:
    with pytest.raises(SchemeError, match="without --bits"):
        Scheme(bits=8, group_size=32).require_divides(100, "o_proj")


@pytest.mark.parametrize(("bits", "zero", "top"), [(4, 8, 15), (8, 128, 255)])
def test_codes_lie_around_the_zero_point(bits: int, zero: int, top: int) -> None:
    scheme = Scheme(bits=bits, group_size=64)
    assert (scheme.zero_point, scheme.max_code, scheme.name) == (zero, top, f"int{bits}-g64")


def test_scheme_errors_are_input_errors_and_value_errors() -> None:
    assert issubclass(SchemeError, InputError)
    assert issubclass(SchemeError, ValueError)


def test_schemes_are_values() -> None:
    changed: Any = Scheme(bits=4, group_size=32)
    with pytest.raises(AttributeError):
        changed.bits = 8
    assert changed == Scheme(bits=4, group_size=32)
