"""A budget of bytes, spent on the matrices where it saves the most loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwen2x.exporters.bundle import PREFILL_DATA_FILE, PREFILL_FILE
from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.export_plan import Plan, planned_files
from qwen2x.exporters.options import Options
from qwen2x.exporters.weights import bits_per_weight
from qwen2x.quantize.errors import SchemeError
from qwen2x.quantize.plan import EMBEDDING, HEAD, BitPlan, Offer, spend, unit_of
from qwen2x.quantize.scheme import GROUP_SIZES, Scheme
from qwen2x.quantize.sensitivity import Losses, fitting

MakePlan = Callable[[BitPlan], Plan]
# Bits per weight of --bits 4: what llama.cpp's Q4_0 takes. It gives a head more than layers, and
# still more where its blocks of 256 do not fit.
_PRESET_LAYERS, _PRESET_HEAD, _PRESET_NARROW_HEAD = 4.5, 6.5, 8.3
# The same with --prefer speed, of all weights.
_FAST_PRESET = 5.0
# What compensated rounding leaves of the loss of plain rounding to 4 bits in groups of 32, on the
# 0.5B checkpoint and text that nothing was fitted to. An embedding is not compensated. In larger
# groups more of the loss is made up for.
_COMPENSATED = {
    "qkv_proj": 0.45, "o_proj": 0.3, "gate_up_proj": 0.63, "down_proj": 0.7, "lm_head": 0.45,
}  # fmt: skip
_COMPENSATED_IN_GROUPS = {32: 1.0, 64: 0.9, 128: 0.8}
# CPU kernels round activations to 8 bits too, in groups as large as the weights': what that costs
# in groups of 32, relative to the loss of weights in 8 bits and such groups (the 0.5B checkpoint).
# It grows with the size.
_ROUNDED_ACTIVATIONS = {
    "qkv_proj": 3.0, "o_proj": 0.5, "gate_up_proj": 0.5, "down_proj": 2.2, "lm_head": 19.0,
}  # fmt: skip
_FINEST = Scheme(bits=8, group_size=32)
# KL divergence per weight of units in 4 bits, relative to an untied head's: the 0.5B checkpoint.
_TYPICAL = {
    "embed_tokens": 0.15, "qkv_proj": 10.0, "o_proj": 3.5, "gate_up_proj": 1.5, "down_proj": 1.3,
    "lm_head": 1.0,
}  # fmt: skip
# A target may store more than codes and scales: what fits is sought by halving.
_ATTEMPTS = 10


# Between which plans may choose; of 8 bits, whose groups gain little, two sizes.
SCHEMES = (
    *(Scheme(bits=4, group_size=size) for size in GROUP_SIZES),
    *(Scheme(bits=4, group_size=size, is_symmetric=False) for size in GROUP_SIZES),
    *(Scheme(bits=6, group_size=size) for size in GROUP_SIZES),
    *(Scheme(bits=8, group_size=size) for size in (32, 128)),
)


def plan_within_budget(
    config: Qwen2Config, options: Options, losses: Losses, make_plan: MakePlan
) -> Plan:
    """The plan of least loss that is no larger than the options allow.

    Args:
        config: of the model.
        options: with a budget, or those of a preset.
        losses: of every unit with every scheme.
        make_plan: gives an export's plan for schemes.

    Raises:
        SchemeError: the budget is less than the smallest schemes take.
    """
    budget = _Budget(config=config, options=options, make_plan=make_plan)
    offers = _offers(config, losses, options)
    least = {unit: min(of_unit, key=lambda offer: offer.bytes) for unit, of_unit in offers.items()}
    smallest = budget.plan({unit: offer.scheme for unit, offer in least.items()})
    budget.require_possible(smallest)
    low, high = sum(offer.bytes for offer in least.values()), budget.bytes
    best = smallest
    for attempt in range(_ATTEMPTS):
        middle = high if attempt == 0 else (low + high) / 2
        if middle < low:
            break
        plan = budget.plan(spend(offers, middle))
        if budget.excess(plan) > 0:
            high = middle
            continue
        best, low = plan, middle
        if attempt == 0:
            break
    return best


def typical_losses(config: Qwen2Config, schemes: Sequence[Scheme]) -> Losses:
    """What is to be expected before anything is measured: which budgets can be met, and how."""
    losses: Losses = {}
    parameters = parameters_of_units(config)
    columns = {unit: _columns(config, unit) for unit in parameters}
    if config.is_tied:
        parameters[HEAD], columns[HEAD] = parameters[EMBEDDING], columns[EMBEDDING]
    for unit, count in parameters.items():
        kind = unit.rsplit(".", 1)[-1]
        losses[unit] = {
            scheme: _TYPICAL[kind] * count * _typical_error(scheme)
            for scheme in fitting(schemes, columns[unit])
        }
    return losses


def _columns(config: Qwen2Config, unit: str) -> int:
    if unit.endswith("down_proj"):
        return config.intermediate_size
    return config.query_size if unit.endswith("o_proj") else config.hidden_size


def _typical_error(scheme: Scheme) -> float:
    """Of a unit's output, relative to that of 4 bits in groups of 64."""
    if scheme.bits == 8:
        return 0.002
    # Two bits more are a quarter of each weight's error.
    share = 1 if scheme.bits == 4 else 1 / 16
    error = share * {32: 0.75, 64: 1.0, 128: 1.33}[scheme.group_size]
    return error if scheme.is_symmetric else 0.9 * error


def parameters_of_units(config: Qwen2Config) -> dict[str, int]:
    """The number of weights of each unit."""
    parameters: dict[str, int] = {}
    for name, shape in config.expected_tensors().items():
        if len(shape) == 2:
            unit = unit_of(name.removesuffix(".weight"))
            parameters[unit] = parameters.get(unit, 0) + math.prod(shape)
    return parameters


def _offers(config: Qwen2Config, losses: Losses, options: Options) -> dict[str, list[Offer]]:
    offers: dict[str, list[Offer]] = {}
    for unit, parameters in parameters_of_units(config).items():
        of_unit: list[Offer] = []
        if not losses[unit]:
            Scheme(bits=4, group_size=GROUP_SIZES[0]).require_divides(_columns(config, unit), unit)
        parts = (EMBEDDING, HEAD) if unit == EMBEDDING and config.is_tied else (unit,)
        offered = [scheme for scheme in losses[unit] if _is_offered(unit, scheme, options)]
        if options.prefer == "speed":
            offered = _fastest(offered)
        for scheme in offered:
            loss = sum(
                losses[part][scheme] * _kept(part, scheme, options)
                + _loss_of_activations(part, scheme, losses)
                for part in parts
            )
            size = scheme.bits_per_weight * parameters / 8
            of_unit.append(Offer(scheme=scheme, bytes=size, loss=loss))
        offers[unit] = of_unit
    return offers


def _is_offered(unit: str, scheme: Scheme, options: Options) -> bool:
    """6 bits are no table's, whose rows GatherBlockQuantized looks up, and have no CUDA kernel."""
    if scheme.bits == 6:
        return unit not in (EMBEDDING, HEAD) and options.device != "cuda"
    return scheme.is_symmetric or options.asymmetric


def _fastest(schemes: Sequence[Scheme]) -> list[Scheme]:
    """Those of a kind in the largest groups that the columns allow; no 6 bits, two products.

    In groups of 64 products take an eighth longer than in groups of 128, for 3 % of the bytes
    (``benchmarks/machine_limits.py``).
    """
    largest: dict[tuple[int, bool], Scheme] = {}
    for scheme in sorted(schemes, key=lambda scheme: scheme.group_size):
        if scheme.bits != 6:
            largest[scheme.bits, scheme.is_symmetric] = scheme
    return list(largest.values())


def _loss_of_activations(unit: str, scheme: Scheme, losses: Losses) -> float:
    """The same for every target, so that all get one plan."""
    if unit == EMBEDDING or _FINEST not in losses[unit]:
        return 0.0
    factor = _ROUNDED_ACTIVATIONS[unit.rsplit(".", 1)[-1]]
    return factor * losses[unit][_FINEST] * scheme.group_size / _FINEST.group_size


def _kept(unit: str, scheme: Scheme, options: Options) -> float:
    """What a method leaves of the loss of plain rounding."""
    if scheme.bits == 8 or not options.is_calibrated:
        return 1.0
    if unit == EMBEDDING:
        return 1.0
    return _COMPENSATED[unit.rsplit(".", 1)[-1]] * _COMPENSATED_IN_GROUPS[scheme.group_size]


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """What ``--max-bytes``, ``--bits-per-weight`` or the preset allow."""

    config: Qwen2Config
    options: Options
    make_plan: MakePlan

    def plan(self, schemes: Mapping[str, Scheme]) -> Plan:
        return self.make_plan(BitPlan(schemes=schemes, is_mixed=True))

    @property
    def bytes(self) -> float:
        """Of codes and scales at most; what else a file holds is in ``excess``."""
        if self.options.max_bytes is not None:
            return self.options.max_bytes
        parameters = parameters_of_units(self.config)
        if self.options.bits_per_weight is not None:
            return self.options.bits_per_weight * sum(parameters.values()) / 8
        if self.options.prefer == "speed":
            return _FAST_PRESET * sum(parameters.values()) / 8
        last = EMBEDDING if self.config.is_tied else HEAD
        rest = sum(count for unit, count in parameters.items() if unit != last)
        head = _PRESET_HEAD if self.config.hidden_size % 256 == 0 else _PRESET_NARROW_HEAD
        return (_PRESET_LAYERS * rest + head * parameters[last]) / 8

    def excess(self, plan: Plan) -> float:
        """Bytes that a plan has too many. A preset is the same whatever a target stores."""
        if self.options.max_bytes is not None:
            return _model_bytes(plan) - self.options.max_bytes
        if self.options.bits_per_weight is not None:
            parameters = sum(parameters_of_units(self.config).values())
            return (bits_per_weight(plan.weights) - self.options.bits_per_weight) * parameters / 8
        return 0.0

    def require_possible(self, smallest: Plan) -> None:
        if self.excess(smallest) <= 0:
            return
        if self.options.max_bytes is not None:
            least = f"--max-bytes {_model_bytes(smallest)}"
            given = f"--max-bytes {self.options.max_bytes}"
        else:
            least = f"--bits-per-weight {math.ceil(100 * bits_per_weight(smallest.weights)) / 100}"
            given = f"--bits-per-weight {self.options.bits_per_weight}"
        raise SchemeError(f"{given} cannot be met; this model needs {least} or more")


def _model_bytes(plan: Plan) -> int:
    """Of weights and graph. A copy that reads prompts is not in a budget of the model's."""
    copy = (PREFILL_FILE, PREFILL_DATA_FILE)
    return sum(size for name, size in planned_files(plan).items() if name not in copy)
