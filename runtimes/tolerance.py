"""What counts as the same model, per scheme, with the reason for each limit."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits of ``validate``. A figure beyond its limit fails it.

    Attributes:
        kl_mean: nats per position against PyTorch in float32.
        top1_agreement: least share of positions with the same likeliest token.
        max_abs_diff: of logits against PyTorch; None where a quantized model has no useful bound.
        self_kl: nats per position between two ways through the same bundle: cache, chunks, batch.
        greedy_against: whose greedy text must come out: ``transformers`` or the ``bundle`` itself,
            read whole instead of step by step.
        layer_error: of the residual stream behind a layer, relative to its length.
    """

    kl_mean: float
    top1_agreement: float
    max_abs_diff: float | None
    self_kl: float
    greedy_against: str
    layer_error: float


# float32: two orders of summing the same products. Measured on the 0.5B checkpoint: KL 4e-9,
#   largest difference 1e-4.
# float16, bfloat16: rounding of activations and weights to 11 and 8 bits. llama.cpp reports
#   KL 2.5e-5 between the two; attention and 24 to 80 layers multiply it.
# int8: scales of least error per group, and int8 activations on the CPU.
#   Measured on the 0.5B checkpoint: KL 0.0005 on code, 0.0013 on prose, top-1 98 to 99 %.
# int4: measured on the 0.5B checkpoint, on code and on prose: KL 0.03 and 0.07 with groups of 32,
#   0.05 and 0.11 with 64, 0.06 and 0.15 with 128. Larger models lose less. Beyond not quite twice
#   that, something is broken rather than rounded.
# self_kl: float32 differs in the order of summing alone. Quantized graphs round activations to
#   int8 per block, by kernels that differ between one row and many; a rounding that falls the other
#   way moves the logits about as far as the rounding of activations itself. A wrong mask, position
#   or cache entry gives 0.1 and more.
# layer_error: behind the last layer of the 0.5B checkpoint 3e-6 at most for float32, 0.03 for int8
#   and 0.3 for int4, at the worst position; the limits are for the mean over positions.
# An 8-bit cache on top: KL 0.0005 added over 4,096 tokens of the 0.5B checkpoint, 0.001 where half
#   of them lie at the end of the context; hidden states 0.011, in float32. The kernel computes with
#   codes whichever way tokens came, so ways differ by roundings that fall the other way.
# Bits that only folders of other programs have lie between: a bit less doubles the error of every
#   weight, which multiplies KL by about four.
INT8_CACHE_KL = 0.002
_FLOAT32 = Tolerance(
    kl_mean=1e-5,
    top1_agreement=0.995,
    max_abs_diff=5e-3,
    self_kl=1e-6,
    greedy_against="transformers",
    layer_error=1e-4,
)
_HALF = Tolerance(
    kl_mean=5e-3,
    top1_agreement=0.95,
    max_abs_diff=None,
    self_kl=5e-3,
    greedy_against="bundle",
    layer_error=0.05,
)
_INT8 = Tolerance(
    kl_mean=3e-3,
    top1_agreement=0.95,
    max_abs_diff=None,
    self_kl=5e-3,
    greedy_against="bundle",
    layer_error=0.06,
)
_INT4 = {
    group_size: Tolerance(
        kl_mean=kl_mean,
        top1_agreement=top1_agreement,
        max_abs_diff=None,
        self_kl=0.03,
        greedy_against="bundle",
        layer_error=0.4,
    )
    for group_size, kl_mean, top1_agreement in (
        (32, 0.12, 0.75),
        (64, 0.18, 0.7),
        (128, 0.25, 0.65),
    )
}


_OTHER_BITS = {
    2: replace(_INT4[32], kl_mean=3.0, top1_agreement=0.2, layer_error=1.0),
    3: replace(_INT4[32], kl_mean=0.8, top1_agreement=0.45, layer_error=0.8),
    5: replace(_INT4[32], kl_mean=0.05, top1_agreement=0.85, layer_error=0.2),
    6: replace(_INT4[32], kl_mean=0.015, top1_agreement=0.9, layer_error=0.1),
}


def tolerance_for(scheme: str, dtype: str) -> Tolerance:
    """The limits for a bundle's scheme (``float``, ``int8-g32``, ...) and float type.

    A mixed scheme is named after the least of its schemes, whose limits hold.
    """
    quantized = re.fullmatch(r"int(\d)-g(\d+)(-zp)?(-mixed)?", scheme)
    if quantized is None:
        return _FLOAT32 if dtype == "float32" else _HALF
    bits, group_size = int(quantized[1]), int(quantized[2])
    if bits == 4:
        return _INT4[group_size]
    return _INT8 if bits == 8 else _OTHER_BITS[bits]


def with_int8_cache(limits: Tolerance) -> Tolerance:
    """The limits where a KV cache in 8 bits comes on top; whole prompts are read through it too."""
    return replace(
        limits,
        kl_mean=limits.kl_mean + INT8_CACHE_KL,
        top1_agreement=limits.top1_agreement - 0.03,
        max_abs_diff=None,
        self_kl=max(limits.self_kl, 1e-4),
        greedy_against="bundle",
        layer_error=limits.layer_error + 0.05,
    )


def tolerance_between(
    one: tuple[str, str], other: tuple[str, str], *, same_integers: bool = True
) -> Tolerance:
    """The limits for two bundles of one checkpoint, each given as (scheme, dtype).

    With one scheme they hold the same integers, and differ by the rounding of activations alone.
    With two, each is as far from the checkpoint as it may be, in directions of its own; so they are
    with ``same_integers`` false, where another program has rounded one of them.
    """
    looser, stricter = sorted(
        (tolerance_for(*one), tolerance_for(*other)), key=lambda limits: -limits.kl_mean
    )
    limits = replace(looser, greedy_against="bundle")
    if one[0] == other[0] == "float":
        return limits
    if one[0] == other[0] and same_integers:
        return replace(limits, kl_mean=looser.self_kl, top1_agreement=0.9, layer_error=0.1)
    return replace(limits, kl_mean=2 * (looser.kl_mean + stricter.kl_mean))
