"""A layer's matrices, rounded so that what they give for real text stays what it was.

Two streams of hidden states run through the model side by side: one through the float weights, one
through those that are already rounded. A matrix is fitted to give for the second stream's inputs
what it gave for the first one's, so that it also makes up for what was lost before it
(https://arxiv.org/abs/2504.09629); then it is rounded with compensation (``gptq``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from qwen2x.quantize.decoder import Shape, activate, attend, norm
from qwen2x.quantize.gptq import damping_for, gather_moments, round_compensated
from qwen2x.quantize.groups import Float, QuantizedMatrix, dequantize
from qwen2x.quantize.scheme import Scheme

# Share of the earlier loss that a matrix is fitted to make up for. All of it would fit the few
# calibration tokens rather than the language.
MAKE_UP = 0.5
_WINDOWS_AT_ONCE = 4
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

Tensor = Callable[[str], Float]
SchemeOf = Callable[[str], Scheme | None]


@dataclass
class Streams:
    """Hidden states float32 [windows, tokens, hidden]: through float weights, and rounded ones.

    Nothing is fitted to the last ``held_out`` windows.
    """

    exact: Float
    rounded: Float
    held_out: int = 0


# What overflows is met, and refused, in the moments.
@np.errstate(over="ignore", invalid="ignore")
def calibrate_layer(
    prefix: str, tensor: Tensor, scheme_of: SchemeOf, shape: Shape, streams: Streams
) -> dict[str, QuantizedMatrix]:
    """Rounds one layer and moves the streams behind it.

    Args:
        prefix: of the layer's names, such as ``model.layers.0.``.
        tensor: gives a tensor of the checkpoint by its name.
        scheme_of: gives a matrix's scheme by its module path; None leaves it float.
        shape: of the layer.
        streams: before the layer; changed.

    Returns:
        Codes and scales by tensor name, of the matrices that have a scheme.

    Raises:
        CheckpointError: activations that are not finite.
        SchemeError: weights that are too large to be weights.
    """
    layer = _Layer(prefix=prefix, tensor=tensor, scheme_of=scheme_of)
    inputs = _normed(streams, tensor(f"{prefix}input_layernorm.weight"), shape)
    exact, rounded = layer.run(_QKV, inputs, has_bias=True)
    mixed = replace(streams, exact=attend(exact, shape), rounded=attend(rounded, shape))
    del inputs, exact, rounded
    _add(streams, layer.run(("self_attn.o_proj",), mixed))
    del mixed
    inputs = _normed(streams, tensor(f"{prefix}post_attention_layernorm.weight"), shape)
    inner = layer.run_gate_up(inputs)
    del inputs
    _add(streams, layer.run(("mlp.down_proj",), inner))
    return layer.matrices


def _normed(streams: Streams, weight: Float, shape: Shape) -> Streams:
    epsilon = shape.rms_norm_eps
    return replace(
        streams,
        exact=norm(streams.exact, weight, epsilon),
        rounded=norm(streams.rounded, weight, epsilon),
    )


def _add(streams: Streams, outputs: tuple[list[Float], list[Float]]) -> None:
    (exact,), (rounded,) = outputs
    streams.exact += exact
    streams.rounded += rounded


@dataclass
class _Layer:
    prefix: str
    tensor: Tensor
    scheme_of: SchemeOf
    matrices: dict[str, QuantizedMatrix] = field(default_factory=dict)

    def run(
        self, modules: Sequence[str], inputs: Streams, has_bias: bool = False
    ) -> tuple[list[Float], list[Float]]:
        """Rounds matrices that share their inputs; gives what they make of both streams."""
        exact, rounded = [], []
        for module, (weights, kept) in zip(modules, self._round(modules, inputs), strict=True):
            bias = self.tensor(f"{self.prefix}{module}.bias") if has_bias else np.float32(0)
            exact.append(inputs.exact @ weights.T + bias)
            rounded.append(inputs.rounded @ kept.T + bias)
        return exact, rounded

    def run_gate_up(self, inputs: Streams) -> Streams:
        """Rounds both; gives silu(gate) * up, a few windows at once, as it is wide."""
        (gate, kept_gate), (up, kept_up) = self._round(_GATE_UP, inputs)

        def inner(x: Float, gate: Float, up: Float) -> Float:
            given = np.empty((*x.shape[:-1], len(gate)), np.float32)
            for start in range(0, len(x), _WINDOWS_AT_ONCE):
                some = slice(start, start + _WINDOWS_AT_ONCE)
                given[some] = activate(x[some] @ gate.T, x[some] @ up.T)
            return given

        return replace(
            inputs,
            exact=inner(inputs.exact, gate, up),
            rounded=inner(inputs.rounded, kept_gate, kept_up),
        )

    def _round(self, modules: Sequence[str], inputs: Streams) -> list[tuple[Float, Float]]:
        """The float weights of matrices that share their inputs, and what is kept of them."""
        schemes = [self.scheme_of(self.prefix + module) for module in modules]
        fit = _Fit(inputs) if any(scheme is not None for scheme in schemes) else None
        matrices = []
        for module, scheme in zip(modules, schemes, strict=True):
            name = f"{self.prefix}{module}.weight"
            weights = kept = self.tensor(name)
            if scheme is not None and fit is not None:
                target = weights + fit.moments.solve(fit.lost(weights))
                self.matrices[name] = round_compensated(target, fit.moments, scheme)
                kept = dequantize(self.matrices[name])
            matrices.append((weights, kept))
        return matrices


class _Fit:
    """What a stage's inputs say, with x of the exact stream and y of the rounded one.

    W x is nearest to (W + W lost moments^-1) y, where lost is the sum of (x - y) y^T and moments
    that of y y^T. Of lost only a share is made up for. Windows are taken one by one, since a copy
    of all inputs would be large.
    """

    def __init__(self, inputs: Streams) -> None:
        fitted = len(inputs.rounded) - inputs.held_out
        self._exact, self._rounded = inputs.exact[:fitted], inputs.rounded[:fitted]
        columns = inputs.rounded.shape[-1]
        flat = self._rounded.reshape(-1, columns)
        self.moments = gather_moments(flat.T @ flat, damping_for(columns, len(flat)))

    def lost(self, weights: Float) -> Float:
        """W lost, for W [rows, columns], as far as it is to be made up for."""
        rows, columns = weights.shape
        if 2 * rows >= columns:
            return weights @ self._lost
        # Few rows: cheaper by way of what they give.
        lost = np.zeros_like(weights)
        for x, y in zip(self._exact, self._rounded, strict=True):
            lost += ((x - y) @ weights.T).T @ y
        lost *= MAKE_UP
        return lost

    @cached_property
    def _lost(self) -> Float:
        columns = self._rounded.shape[-1]
        lost = np.zeros((columns, columns), np.float32)
        for x, y in zip(self._exact, self._rounded, strict=True):
            lost += (x - y).T @ y
        lost *= MAKE_UP
        return lost
