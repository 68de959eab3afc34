"""How an export's matrices become integers: measured, planned and fitted to a text, or plainly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2x.exporters.bit_budget import SCHEMES, MakePlan, plan_within_budget
from qwen2x.exporters.cache_folder import cache_folder
from qwen2x.exporters.calibration import (
    CalibratedMatrices,
    Calibration,
    OnLayer,
    RoundedRows,
    calibrate,
    rows_of,
    save_table,
)
from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.export_plan import Plan
from qwen2x.exporters.measuring import Measurement, head_of, measure
from qwen2x.exporters.weight_writer import Quantizer, plain_quantizer
from qwen2x.quantize.calibrate import Streams
from qwen2x.quantize.decoder import norm
from qwen2x.quantize.divergence import Head
from qwen2x.quantize.estimate import estimate_loss
from qwen2x.quantize.gptq import gather_moments, round_compensated
from qwen2x.quantize.groups import Float, QuantizedMatrix, dequantize, quantize
from qwen2x.quantize.plan import EMBEDDING, HEAD, BitPlan
from qwen2x.quantize.scheme import Scheme

# More than within layers: a tied table is read by rows as well, and 0.5 serves both best.
_HEAD_DAMPING = 0.5


@dataclass(frozen=True, kw_only=True)
class Quantizing:
    """What is known before weights are written.

    Attributes:
        plan: of the export, with the schemes that were chosen.
        quantizer: gives rows of a matrix as codes and scales.
        estimate: what the rounded weights lose on text that nothing was fitted to, if known.
    """

    plan: Plan
    quantizer: Quantizer
    estimate: dict[str, Any] | None = None


def prepare_quantizing(
    checkpoint: Checkpoint,
    plan: Plan,
    make_plan: MakePlan,
    calibration: Calibration | None,
    staging: Path,
    on_layer: OnLayer,
) -> Quantizing:
    """Measures and rounds what must be known before the first byte is written.

    Args:
        checkpoint: the float weights.
        plan: of the export, with schemes that no measurement chose.
        make_plan: the same with others.
        calibration: the text; without it matrices are rounded plainly.
        staging: where results are kept until the bundle is whole.
        on_layer: told of layers that are done.

    Raises:
        SchemeError: a budget that is too small.
        CheckpointError: activations that are not finite.
    """
    plain = plain_quantizer(checkpoint)
    if calibration is None:
        return Quantizing(plan=plan, quantizer=plain)
    measurement = None
    if plan.options.is_planned:
        kept_in = cache_folder() / "measurements"
        measurement = measure(checkpoint, calibration, SCHEMES, staging, kept_in, on_layer)
        plan = plan_within_budget(plan.config, plan.options, measurement.losses, make_plan)
    if not plan.options.is_calibrated:
        return Quantizing(plan=plan, quantizer=plain)
    _round_head(checkpoint, measurement, plan.bit_plan, staging)
    matrices, streams = calibrate(
        checkpoint,
        calibration,
        plan.bit_plan.scheme_of,
        _rounded_rows(checkpoint, plan.bit_plan, CalibratedMatrices(staging)),
        staging,
        on_layer,
    )

    def quantizer(name: str, start: int, stop: int, scheme: Scheme) -> QuantizedMatrix:
        rows = matrices.rows if name in matrices else plain
        return rows(name, start, stop, scheme)

    estimate = _estimate(checkpoint, calibration, streams, plan, quantizer)
    return Quantizing(plan=plan, quantizer=quantizer, estimate=estimate)


def _round_head(
    checkpoint: Checkpoint, measurement: Measurement | None, bit_plan: BitPlan, staging: Path
) -> None:
    """Fits a head of 4 bits to its inputs, unless an interrupted run did; others need no fit."""
    module = EMBEDDING if checkpoint.config.is_tied else HEAD
    name, scheme = f"{module}.weight", bit_plan.scheme_of(module)
    if measurement is None or scheme is None or scheme.bits != 4:
        return
    if name in CalibratedMatrices(staging):
        return
    moments = gather_moments(measurement.head_products, _HEAD_DAMPING)
    parts = [round_compensated(rows, moments, scheme) for _, rows in head_of(checkpoint).parts()]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    whole = QuantizedMatrix(
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        scheme=scheme,
        zero_points=np.concatenate(zero_points) if zero_points else None,
    )
    save_table(staging, name, whole)


def _rounded_rows(
    checkpoint: Checkpoint, bit_plan: BitPlan, matrices: CalibratedMatrices
) -> RoundedRows:
    """Rows of the embedding as they will be stored."""
    name, scheme = f"{EMBEDDING}.weight", bit_plan.scheme_of(EMBEDDING)

    def rounded(tokens: NDArray[np.int64]) -> Float:
        if scheme is None:
            return rows_of(checkpoint, tokens)
        if name not in matrices:
            return dequantize(quantize(rows_of(checkpoint, tokens), scheme))
        whole = matrices.rows(name, 0, checkpoint.config.vocab_size, scheme)
        of_rows = whole.zero_points
        return dequantize(
            replace(
                whole,
                codes=whole.codes[tokens],
                scales=whole.scales[tokens],
                zero_points=None if of_rows is None else of_rows[tokens],
            )
        )

    return rounded


def _estimate(
    checkpoint: Checkpoint,
    calibration: Calibration,
    streams: Streams,
    plan: Plan,
    quantizer: Quantizer,
) -> dict[str, Any] | None:
    """The loss on the windows that were held out, of which each position but the last counts."""
    count = streams.held_out
    if not count:
        return None
    config = checkpoint.config
    final_norm = checkpoint.rows("model.norm.weight")

    def normed(states: Float) -> Float:
        kept = states[-count:, :-1]
        return norm(kept, final_norm, config.rms_norm_eps).reshape(-1, config.hidden_size)

    exact_head = head_of(checkpoint)
    name = f"{EMBEDDING if config.is_tied else HEAD}.weight"
    scheme = plan.bit_plan.scheme_of(name.removesuffix(".weight"))
    read: Callable[[int, int], Float] = exact_head.read
    if scheme is not None:
        read = lambda start, stop: dequantize(quantizer(name, start, stop, scheme))  # noqa: E731
    found = estimate_loss(
        normed(streams.exact),
        normed(streams.rounded),
        calibration.held_out[:, 1:].reshape(-1).astype(np.int64),
        (exact_head, Head(vocab_size=config.vocab_size, read=read)),
    )
    text = f"{calibration.name}, {calibration.held_out.size} tokens that nothing was fitted to"
    return found | {"text": text, "by": "qwen2x export, weights alone, in NumPy"}
