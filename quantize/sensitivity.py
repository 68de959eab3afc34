"""What a model loses when one unit alone is rounded.

The exact hidden states of some text run through the model, and beside them those of every model
in which one unit has 4 bits: behind a layer each of its units adds a line of hidden states, so that
the weights are read once. At the end, KL divergence says what each of them cost. For other schemes
the cost is scaled by what they change of the unit's output, which the layer alone can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen2x.quantize.decoder import Shape, norm, run_layer
from qwen2x.quantize.divergence import Divergence, Head, normalize, probabilities_of
from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import Float, dequantize, quantize
from qwen2x.quantize.plan import EMBEDDING, HEAD, LAYER_UNITS
from qwen2x.quantize.scheme import Scheme

Tensor = Callable[[str], Float]
# By unit and scheme: KL divergence in nats.
Losses = dict[str, dict[Scheme, float]]

# Rows of a matrix that tell what a scheme changes of all.
_SAMPLED_ROWS = 256
_BIASES = tuple(f"{module}.bias" for module in LAYER_UNITS["self_attn.qkv_proj"])
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
# Which inputs a unit's matrices are multiplied with.
_INPUTS = dict(zip(LAYER_UNITS, ("normed", "mixed", "normed_again", "inner"), strict=True))


@dataclass
class Probes:
    """Hidden states, and what is known so far.

    Attributes:
        exact: float32 [windows, tokens, hidden].
        rounded: by unit, float32 [probed windows, probed tokens, hidden]: of the exact states'
            first windows and tokens.
        errors: by unit and scheme, the squared change of the unit's output; the scheme that the
            unit was probed with is the first.
    """

    exact: Float
    windows: int
    tokens: int
    rounded: dict[str, Float] = field(default_factory=dict)
    errors: Losses = field(default_factory=dict)

    @property
    def probed(self) -> Float:
        """The exact states of the text that is probed."""
        return self.exact[: self.windows, : self.tokens]


def probe_embedding(rows: Float, places: np.ndarray, probes: Probes) -> None:
    """Begins with a rounded embedding.

    Args:
        rows: float32 [used tokens, hidden].
        places: int64 [windows, tokens], which of the rows a token has.
        probes: changed.
    """
    rounded = dequantize(quantize(rows, probing_scheme(rows.shape[1])))
    probes.rounded[EMBEDDING] = rounded[places[: probes.windows, : probes.tokens]]


# What overflows is refused at the end.
@np.errstate(over="ignore", invalid="ignore")
def probe_layer(
    prefix: str, tensor: Tensor, schemes: Sequence[Scheme], shape: Shape, probes: Probes
) -> None:
    """Moves all states behind a layer, and adds those with one of its units rounded.

    Args:
        prefix: of the layer's names, such as ``model.layers.0.``.
        tensor: gives a tensor of the checkpoint by its name.
        schemes: between which a plan will choose.
        shape: of the layer.
        probes: before the layer; changed.
    """
    matrices = [f"{module}.weight" for modules in LAYER_UNITS.values() for module in modules]
    layer = {name: tensor(prefix + name) for name in (*matrices, *_BIASES, *_NORMS)}
    before = probes.probed.copy()
    for unit, states in probes.rounded.items():
        probes.rounded[unit], _ = run_layer(states, layer, shape)
    probes.exact, _ = run_layer(probes.exact, layer, shape)
    _, inputs = run_layer(before, layer, shape)
    for unit, modules in LAYER_UNITS.items():
        met = getattr(inputs, _INPUTS[unit])
        met = met.reshape(-1, met.shape[-1])
        names = [f"{module}.weight" for module in modules]
        probed = probing_scheme(met.shape[1])
        probes.errors[prefix + unit] = {
            scheme: sum(_change(layer[name], met, scheme) for name in names)
            for scheme in _tried(probed, schemes, met.shape[1])
        }
        rounded = {name: dequantize(quantize(layer[name], probed)) for name in names}
        probes.rounded[prefix + unit], _ = run_layer(before, layer | rounded, shape)


def probing_scheme(columns: int) -> Scheme:
    """What a matrix is rounded to for a look at what it costs."""
    return Scheme(bits=4, group_size=64 if columns % 64 == 0 else 32)


def fitting(schemes: Sequence[Scheme], columns: int) -> list[Scheme]:
    """Those whose groups tile an input dimension."""
    return [scheme for scheme in schemes if columns % scheme.group_size == 0]


def _tried(probed: Scheme, schemes: Sequence[Scheme], columns: int) -> list[Scheme]:
    return list(dict.fromkeys([probed, *fitting(schemes, columns)]))


def _change(weights: Float, inputs: Float | None, scheme: Scheme) -> float:
    """The squared change of inputs [tokens, columns] times weights [rows, columns], by a sample."""
    step = -(-len(weights) // _SAMPLED_ROWS)
    sample = weights[::step]
    change = sample - dequantize(quantize(sample, scheme))
    if inputs is not None:
        change = inputs @ change.T
    return float(np.einsum("ij,ij->", change, change)) * len(weights) / len(sample)


def measure_losses(
    probes: Probes, final_norm: Float, head: Head, schemes: Sequence[Scheme], epsilon: float
) -> Losses:
    """What every unit costs with every scheme; the head's part stands under ``lm_head``.

    Args:
        probes: behind the last layer.
        final_norm: weight of the last norm.
        head: of the model, or its embedding where they are tied.
        schemes: between which a plan will choose.
        epsilon: of the norm.

    Raises:
        CheckpointError: the text met activations that are not finite.
    """
    exact = norm(probes.probed, final_norm, epsilon).reshape(-1, probes.exact.shape[-1])
    inputs = {
        unit: norm(states, final_norm, epsilon).reshape(exact.shape)
        for unit, states in probes.rounded.items()
    }
    # A quarter of the positions ranks the units as all would, and the head is much of the work.
    exact, inputs = exact[::4], {unit: states[::4] for unit, states in inputs.items()}
    if not np.isfinite(exact).all():
        raise CheckpointError(
            "calibration met activations that are not finite; use --method rtn, or another text"
        )
    divergences, changes = _diverge(exact, inputs, head, schemes)
    losses: Losses = {}
    for unit, errors in {**changes, **probes.errors}.items():
        loss = float(divergences[unit].each().mean())
        probed = next(iter(errors.values()))
        losses[unit] = {
            scheme: loss * error / probed if probed else 0.0 for scheme, error in errors.items()
        }
    return losses


def _diverge(
    exact: Float, inputs: Mapping[str, Float], head: Head, schemes: Sequence[Scheme]
) -> tuple[dict[str, Divergence], Losses]:
    """Divergences of all rounded units, and the changes of embedding and head by scheme."""
    normalizers = normalize(exact, head)
    divergences = {unit: Divergence(normalizers) for unit in (*inputs, HEAD)}
    columns = exact.shape[1]
    probed = probing_scheme(columns)
    tried = _tried(probed, schemes, columns)
    changes: Losses = {unit: dict.fromkeys(tried, 0.0) for unit in (EMBEDDING, HEAD)}
    for _, rows in head.parts():
        logits = exact @ rows.T
        probabilities = probabilities_of(logits, normalizers)
        for unit, states in inputs.items():
            divergences[unit].add(probabilities, logits, states @ rows.T)
        divergences[HEAD].add(probabilities, logits, exact @ dequantize(quantize(rows, probed)).T)
        for scheme in tried:
            changes[HEAD][scheme] += _change(rows, exact, scheme)
            changes[EMBEDDING][scheme] += _change(rows, None, scheme)
    return divergences, changes
