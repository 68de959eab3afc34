"""What a quantized matrix is made of, as a value."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen2x.quantize.errors import SchemeError

BITS = (4, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Integer codes that share one scale per group along the input dimension.

    A weight is ``scale * (code - zero_point)`` with codes in ``0 .. 2**bits - 1``. The zero point
    is ``2**(bits - 1)`` for all groups, or where ``is_symmetric`` is false a code of each group's
    own. Scales are numbers of ``scale_type``, whatever type a target stores them in, so that no
    target rounds them and all targets hold the same integers: bfloat16, unless another program
    chose them.
    """

    bits: int
    group_size: int
    is_symmetric: bool = True
    scale_type: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SchemeError(f"bits must be one of {_words(BITS)}, got {self.bits}")
        if self.group_size not in GROUP_SIZES:
            raise SchemeError(
                f"group size must be one of {_words(GROUP_SIZES)}, got {self.group_size}"
            )

    @property
    def zero_point(self) -> int:
        """The code that stands for 0 in symmetric groups."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def name(self) -> str:
        """For example ``int4-g32``, or ``int4-g32-zp`` with a zero point for each group."""
        return f"int{self.bits}-g{self.group_size}" + ("" if self.is_symmetric else "-zp")

    @property
    def bits_per_weight(self) -> float:
        """Of codes, 16-bit scales and zero points."""
        own = 16 if self.is_symmetric else 16 + self.bits
        return self.bits + own / self.group_size

    def require_divides(self, columns: int, matrix: str) -> None:
        """Raises SchemeError when the groups do not tile the matrix's input dimension."""
        if columns % self.group_size == 0:
            return
        fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
        advice = f"choose {' or '.join(fitting)}" if fitting else "export it without --bits"
        raise SchemeError(
            f"group size {self.group_size} does not divide the {columns} columns of {matrix}; "
            f"{advice}"
        )


def parse_scheme(name: str) -> Scheme:
    """The inverse of ``Scheme.name``.

    Raises:
        SchemeError: no such name.
    """
    found = re.fullmatch(r"int(\d+)-g(\d+)(-zp)?", name)
    if found is None:
        raise SchemeError(f"expected a scheme such as int4-g32 or int4-g32-zp, got {name!r}")
    return Scheme(bits=int(found[1]), group_size=int(found[2]), is_symmetric=found[3] is None)


def _words(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)
