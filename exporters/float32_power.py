"""Powers in float32 as PyTorch computes them on vector units, bit for bit.

A correctly rounded power is another number in 9 % of cases, and at position 131,071 the last bit of
a frequency is an angle of up to 0.01. PyTorch calls Sleef's ``powf8_u10`` (its error stays below
1 ulp), which is x^y = exp(y log x) with logarithm and product as sums of two floats, the second of
which is the rounding error of the first (``sleefsimdsp.c`` of Sleef 3: ``logkf``, ``expkf``).
"""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
# A value, and what its rounding left out.
Pair = tuple[Float, Float]

_LOG_TERMS = (0.240320354700088500976562, 0.285112679004669189453125, 0.400007992982864379882812)
_TWO_THIRDS = (0.66666662693023681640625, 3.69183861259614332084311e-09)
_LN_2 = (0.69314718246459960938, -1.904654323148236017e-09)
_EXP_TERMS = (
    0.00136324646882712841033936, 0.00836596917361021041870117, 0.0416710823774337768554688,
    0.166665524244308471679688, 0.499999850988388061523438,
)  # fmt: skip
# ln 2 in a part of few digits, whose multiples are exact, and the rest.
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693145751953125), np.float32(1.428606765330187045e-06)


def float32_power(base: float, exponents: Float) -> Float:
    """The base, above 0, to each exponent: float32 of the same shape, none subnormal."""
    logarithm = _log(np.full_like(exponents, base))
    return _exp(_times_float(logarithm, exponents))


def _log(x: Float) -> Pair:
    exponent = np.frexp(x * np.float32(1 / 0.75))[1] - 1
    mantissa = np.ldexp(x, -exponent)
    one = np.ones_like(x)
    quotient = _divide(_two_sum(mantissa, -one), _two_sum(mantissa, one))
    square = _square(quotient)
    series = _polynomial(_LOG_TERMS, square[0])
    cubed = _add_near(_times_float(square, series), _constant(_TWO_THIRDS, x))
    total = _times_float(_constant(_LN_2, x), exponent.astype(np.float32))
    total = _add(total, (quotient[0] * np.float32(2), quotient[1] * np.float32(2)))
    return _add(total, _times(_times(square, quotient), cubed))


def _exp(x: Pair) -> Float:
    halvings = np.rint((x[0] + x[1]) * np.float32(1 / np.log(2)))
    rest = _add_float(x, halvings * -_LN_2_HIGH)
    rest = _add_float(rest, halvings * -_LN_2_LOW)
    total = rest[0] + rest[1]
    rest = total, rest[0] - total + rest[1]
    series = _polynomial(_EXP_TERMS, rest[0])
    power = _add(rest, _times_float(_square(rest), series))
    high, low = _add((np.ones_like(total), np.zeros_like(total)), power)
    scaled: Float = np.ldexp(high + low, halvings.astype(np.int32))
    return scaled


def _polynomial(terms: tuple[float, ...], x: Float) -> Float:
    """Horner's scheme, the highest power first."""
    first, *rest = (np.full_like(x, term) for term in terms)
    return reduce(lambda total, term: _multiply_add(total, x, term), rest, first)


def _constant(parts: tuple[float, float], like: Float) -> Pair:
    return np.full_like(like, parts[0]), np.full_like(like, parts[1])


def _multiply_add(x: Float, y: Float, z: Float) -> Float:
    """X times y plus z, rounded once: the product of two float32 is exact in float64."""
    exact = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)
    return exact.astype(np.float32)


def _two_sum(x: Float, y: Float) -> Pair:
    total = x + y
    share = total - x
    return total, (x - (total - share)) + (y - share)


def _add_float(x: Pair, y: Float) -> Pair:
    total, error = _two_sum(x[0], y)
    return total, error + x[1]


def _add_near(x: Pair, y: Pair) -> Pair:
    """The sum of pairs of any size."""
    total, error = _two_sum(x[0], y[0])
    return total, error + (x[1] + y[1])


def _add(x: Pair, y: Pair) -> Pair:
    """The sum of pairs of which the first is the larger one."""
    total = x[0] + y[0]
    return total, x[0] - total + y[0] + x[1] + y[1]


def _times_float(x: Pair, y: Float) -> Pair:
    product = x[0] * y
    return product, _multiply_add(x[1], y, _multiply_add(x[0], y, -product))


def _times(x: Pair, y: Pair) -> Pair:
    product = x[0] * y[0]
    error = _multiply_add(x[0], y[0], -product)
    return product, _multiply_add(x[0], y[1], _multiply_add(x[1], y[0], error))


def _square(x: Pair) -> Pair:
    product = x[0] * x[0]
    return product, _multiply_add(x[0] + x[0], x[1], _multiply_add(x[0], x[0], -product))


def _divide(x: Pair, y: Pair) -> Pair:
    one = np.ones_like(x[0])
    inverse = one / y[0]
    quotient = x[0] * inverse
    error = _multiply_add(-y[1], inverse, _multiply_add(-y[0], inverse, one))
    rest = _multiply_add(x[1], inverse, _multiply_add(inverse, x[0], -quotient))
    return quotient, _multiply_add(quotient, error, rest)
