"""Which matrix gets which scheme.

Matrices that an ONNX graph multiplies at once (q, k and v; gate and up) are one unit with one
scheme, and so is a tied embedding with its head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qwen2x.quantize.errors import SchemeError
from qwen2x.quantize.scheme import Scheme

# Unit to modules, by their paths within a layer.
LAYER_UNITS: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_UNIT_OF = {module: unit for unit, modules in LAYER_UNITS.items() for module in modules}


def unit_of(module: str) -> str:
    """The unit's path: ``model.layers.3.mlp.gate_up_proj`` for ``model.layers.3.mlp.up_proj``."""
    for path, unit in _UNIT_OF.items():
        if module.endswith(path):
            return module.removesuffix(path) + unit
    return module


@dataclass(frozen=True, kw_only=True)
class BitPlan:
    """A scheme for every unit.

    Attributes:
        schemes: by unit path; None is float. A tied head goes with ``model.embed_tokens``.
        is_mixed: whether units of one kind may differ, as measurements said.
    """

    schemes: Mapping[str, Scheme | None]
    is_mixed: bool = False

    def scheme_of(self, module: str) -> Scheme | None:
        """Of a matrix, by its module path or its unit's."""
        return self.schemes[unit_of(module)]

    @property
    def layers(self) -> Scheme | None:
        """The scheme of most units within layers that are not float; None where all are."""
        inner = [scheme for unit, scheme in self.schemes.items() if ".layers." in unit and scheme]
        return Counter(inner).most_common(1)[0][0] if inner else None

    @property
    def name(self) -> str:
        """``float``, ``int4-g32``, or ``int4-g32-mixed``: most of those with the fewest bits."""
        layers = self.layers
        if layers is None:
            return "float"
        if not self.is_mixed:
            return layers.name
        found = [scheme for scheme in self.schemes.values() if scheme is not None]
        fewest = min(scheme.bits for scheme in found)
        lowest = Counter(scheme for scheme in found if scheme.bits == fewest)
        return f"{lowest.most_common(1)[0][0].name}-mixed"

    def to_json(self) -> dict[str, str]:
        """Scheme names by unit path."""
        return {unit: scheme.name if scheme else "float" for unit, scheme in self.schemes.items()}

    def summary(self) -> dict[str, str]:
        """Scheme names by kind of unit, and in how many layers, where they differ."""
        kinds: dict[str, Counter[str]] = {}
        for unit, name in self.to_json().items():
            kinds.setdefault(unit.rsplit(".", 1)[-1], Counter())[name] += 1
        return {kind: _counted(names) for kind, names in kinds.items()}


def _counted(names: Counter[str]) -> str:
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{name} x {count}" for name, count in names.most_common())


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A scheme for a unit, the bytes that it takes, and the loss that it brings."""

    scheme: Scheme
    bytes: float
    loss: float


def spend(offers: Mapping[str, Sequence[Offer]], budget: float) -> dict[str, Scheme]:
    """The scheme of each unit, for a small sum of losses in at most ``budget`` bytes.

    Every unit begins with its smallest offer. Bytes then go where one of them saves the most loss,
    as far as they reach. A step of the largest unit, a head, may be too large for what the others
    left of the budget: so all this is done for each of its offers, and the best is taken.

    Args:
        offers: by unit, one or more.
        budget: in bytes.

    Raises:
        SchemeError: the smallest offers are together larger.
    """
    largest = max(offers, key=lambda unit: _size_and_stake(offers[unit]))
    rest = {unit: _ladder(of_unit) for unit, of_unit in offers.items() if unit != largest}
    least = sum(ladder[0].bytes for ladder in rest.values())
    fitting = [offer for offer in offers[largest] if least + offer.bytes <= budget]
    if not fitting:
        least += min(offer.bytes for offer in offers[largest])
        raise SchemeError(f"expected at least {least:.0f} bytes, got {budget:.0f}")
    chosen = min(
        (_spend(rest, budget - offer.bytes) | {largest: offer} for offer in fitting),
        key=lambda plan: (
            sum(offer.loss for offer in plan.values()),
            sum(offer.bytes for offer in plan.values()),
        ),
    )
    return {unit: chosen[unit].scheme for unit in offers}


def _size_and_stake(offers: Sequence[Offer]) -> tuple[float, float]:
    """The bytes of a unit at least, and what there is to lose by it."""
    losses = [offer.loss for offer in offers]
    return min(offer.bytes for offer in offers), max(losses) - min(losses)


def _spend(ladders: Mapping[str, list[Offer]], budget: float) -> dict[str, Offer]:
    chosen = {unit: ladder[0] for unit, ladder in ladders.items()}
    spent = sum(offer.bytes for offer in chosen.values())
    steps = [
        (_saved_per_byte(low, high), unit, low, high)
        for unit, ladder in ladders.items()
        for low, high in pairwise(ladder)
    ]
    for _, unit, low, high in sorted(steps, key=lambda step: -step[0]):
        more = high.bytes - low.bytes
        if chosen[unit] is low and spent + more <= budget:
            chosen[unit] = high
            spent += more
    return chosen


def _ladder(offers: Sequence[Offer]) -> list[Offer]:
    """Offers by rising bytes, each step of which saves less per byte than the one before."""
    ladder: list[Offer] = []
    for offer in sorted(offers, key=lambda item: (item.bytes, item.loss)):
        if ladder and offer.loss >= ladder[-1].loss:
            continue
        while len(ladder) > 1 and (
            _saved_per_byte(ladder[-1], offer) >= _saved_per_byte(ladder[-2], ladder[-1])
        ):
            ladder.pop()
        ladder.append(offer)
    return ladder


def _saved_per_byte(low: Offer, high: Offer) -> float:
    return (low.loss - high.loss) / (high.bytes - low.bytes)


def units_of(layers: int, *, is_tied: bool) -> list[str]:
    """Unit paths of a model, in the order of its forward pass."""
    inner = [f"model.layers.{layer}.{unit}" for layer in range(layers) for unit in LAYER_UNITS]
    return [EMBEDDING, *inner, *([] if is_tied else [HEAD])]
