"""What an export of a GPTQ or AWQ checkpoint writes: the integers that it holds, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.options import Options
from qwen2x.exporters.packed_matrices import Order
from qwen2x.exporters.stored_quantization import StoredQuantization
from qwen2x.exporters.weights import FLOAT_TYPES
from qwen2x.quantize.errors import SchemeError
from qwen2x.quantize.plan import BitPlan, unit_of, units_of
from qwen2x.quantize.scheme import Scheme

# Of the widest codes, whose zero points times a scale a 16-bit float cannot hold.
_WIDE_BITS = 8


def claimed_schemes(config: Qwen2Config, quantization: StoredQuantization) -> dict[str, Scheme]:
    """By unit, as ``config.json`` has it; the tensors may say otherwise."""
    dtype = config.raw.get("torch_dtype") or config.raw.get("dtype")
    scale_type = dtype if isinstance(dtype, str) and dtype in FLOAT_TYPES else "float16"
    columns = {
        unit_of(module): shape[1]
        for name, shape in config.expected_tensors().items()
        if quantization.packs(module := name.removesuffix(".weight")) and len(shape) == 2
    }
    return {
        unit: quantization.scheme(count, scale_type, is_symmetric=quantization.is_symmetric)
        for unit, count in columns.items()
    }


def imported_bit_plan(
    config: Qwen2Config,
    quantization: StoredQuantization,
    options: Options,
    schemes: Mapping[str, Scheme],
) -> BitPlan:
    """The scheme of every unit. ``--bits 8`` is for embedding and head, which are stored as floats.

    Raises:
        SchemeError: options that would quantize again.
    """
    is_plain = options.bits == 8 and options.method != "gptq"
    if options.scheme is not None and not is_plain:
        bits = f"--bits {options.bits}" if options.bits else "a budget of bits"
        method = "" if options.method == "auto" else f" --method {options.method}"
        raise SchemeError(
            f"the checkpoint is already quantized ({quantization.name}) and its integers are kept, "
            f"got {bits}{method}; leave it out (--bits 8 alone is for embedding and head, which "
            "are float)"
        )
    found = {
        unit: schemes.get(unit) if ".layers." in unit else options.scheme
        for unit in units_of(config.num_hidden_layers, is_tied=config.is_tied)
    }
    inner = {scheme for unit, scheme in found.items() if ".layers." in unit}
    return BitPlan(schemes=found, is_mixed=len(inner) > 1)


def imported_options(options: Options, bit_plan: BitPlan, orders: Mapping[str, Order]) -> Options:
    """With a float type that holds the checkpoint's scales without rounding them.

    Raises:
        SchemeError: a float type that does not, or an order of inputs that the target cannot have.
    """
    scheme = bit_plan.layers
    assert scheme is not None
    if options.target == "mlx":
        _require_plain_order(orders)
        return replace(options, dtype=_mlx_dtype(options, bit_plan, scheme))
    if options.device != "cuda":
        # float32 throughout, which holds them all.
        return options
    return replace(options, dtype=_holding_dtype(options, scheme))


def _mlx_dtype(options: Options, bit_plan: BitPlan, scheme: Scheme) -> str:
    """MLX stores minus zero point times scale, in the type of the scales."""
    is_wide = any(
        other is not None and other.bits == _WIDE_BITS and not other.is_symmetric
        for other in bit_plan.schemes.values()
    )
    if is_wide and options.dtype not in (None, "float32"):
        raise SchemeError(
            f"--dtype {options.dtype} would round the biases of 8-bit zero points in an MLX folder "
            "by an eighth of a code or more; leave it out, which takes float32"
        )
    return "float32" if is_wide else _holding_dtype(options, scheme)


def _holding_dtype(options: Options, scheme: Scheme) -> str:
    if options.dtype not in (None, "float32", scheme.scale_type):
        raise SchemeError(
            f"--dtype {options.dtype} would round the checkpoint's scales, which are "
            f"{scheme.scale_type}; leave it out, or choose --dtype float32"
        )
    return options.dtype or scheme.scale_type


def _require_plain_order(orders: Mapping[str, Order]) -> None:
    if orders:
        first = next(iter(orders))
        raise SchemeError(
            f"the groups of {first} and {len(orders) - 1} others are of scattered inputs "
            "(desc_act, g_idx), which an MLX folder cannot say; use --to onnx"
        )
