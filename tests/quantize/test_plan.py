from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2x.quantize.errors import SchemeError
from qwen2x.quantize.plan import BitPlan, Offer, spend, unit_of, units_of
from qwen2x.quantize.scheme import Scheme

SCHEMES = [
    *(Scheme(bits=4, group_size=size) for size in (128, 64, 32)),
    Scheme(bits=8, group_size=128),
]
# A step that does not fit any more is left out: no more bytes than this stay unspent.
LARGEST_STEP = 8


def offers(*pairs: tuple[float, float]) -> list[Offer]:
    return [
        Offer(scheme=scheme, bytes=size, loss=loss)
        for scheme, (size, loss) in zip(SCHEMES, pairs, strict=False)
    ]


def total(all_offers: dict[str, list[Offer]], chosen: dict[str, Scheme]) -> tuple[float, float]:
    """Bytes and loss."""
    found = [
        next(offer for offer in all_offers[unit] if offer.scheme == scheme)
        for unit, scheme in chosen.items()
    ]
    return sum(offer.bytes for offer in found), sum(offer.loss for offer in found)


def best_of_all(all_offers: dict[str, list[Offer]], budget: float) -> float:
    """The least loss within the budget, by trying everything."""
    choices = product(*all_offers.values())
    return min(
        sum(offer.loss for offer in choice)
        for choice in choices
        if sum(offer.bytes for offer in choice) <= budget
    )


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(*(st.floats(0, 1) for _ in range(4)), st.floats(1, 5)), min_size=1, max_size=5
    ),
    st.floats(0, 1),
)
def test_a_plan_is_within_its_budget_and_as_good_as_one_with_a_step_less(
    units: list[tuple[float, ...]], share: float
) -> None:
    all_offers = {
        str(number): offers(*zip((4, 5, 6, 12), (size * loss for loss in losses), strict=True))
        for number, (*losses, size) in enumerate(units)
    }
    least, most = 4.0 * len(units), 12.0 * len(units)
    budget = least + share * (most - least)
    spent, loss = total(all_offers, spend(all_offers, budget))
    assert spent <= budget
    if budget - LARGEST_STEP >= least:
        assert loss <= best_of_all(all_offers, budget - LARGEST_STEP) + 1e-9


def test_bytes_go_where_they_save_the_most() -> None:
    all_offers = {
        "sensitive": offers((10, 5.0), (12, 4.0), (14, 3.5), (20, 0.1)),
        "robust": offers((10, 0.5), (12, 0.4), (14, 0.3), (20, 0.0)),
    }
    chosen = spend(all_offers, 30)
    assert chosen == {"sensitive": SCHEMES[3], "robust": SCHEMES[0]}


def test_a_head_is_paid_for_where_that_is_better_than_many_small_steps() -> None:
    small = {f"layer {number}": offers((10, 2.0), (12, 1.0)) for number in range(3)}
    head = offers((20, 5.0), (30, 0.5))
    # Each byte saves more in the layers, but what they leave does not reach for the head.
    chosen = spend({**small, "head": head}, 60)
    assert chosen == dict.fromkeys(small, SCHEMES[0]) | {"head": SCHEMES[1]}


def test_of_two_tables_of_one_size_that_is_weighed_which_loses_more() -> None:
    small = {f"layer {number}": offers((10, 2.0), (12, 1.0)) for number in range(3)}
    tables = {"embedding": offers((20, 0.2), (30, 0.1)), "head": offers((20, 5.0), (30, 0.5))}
    chosen = spend({**tables, **small}, 80)
    assert chosen["head"] == SCHEMES[1]
    assert chosen["embedding"] == SCHEMES[0]


def test_an_offer_that_is_larger_and_no_better_is_never_taken() -> None:
    chosen = spend({"unit": offers((10, 1.0), (12, 1.0), (14, 2.0), (20, 1.0))}, 100)
    assert chosen == {"unit": SCHEMES[0]}


def test_a_budget_below_the_smallest_offers_is_refused() -> None:
    with pytest.raises(SchemeError, match="at least 20 bytes, got 19"):
        spend({"one": offers((10, 1.0)), "other": offers((10, 1.0))}, 19)


@pytest.mark.parametrize(
    ("module", "unit"),
    [
        ("model.layers.3.self_attn.k_proj", "model.layers.3.self_attn.qkv_proj"),
        ("model.layers.13.mlp.up_proj", "model.layers.13.mlp.gate_up_proj"),
        ("model.layers.3.mlp.down_proj", "model.layers.3.mlp.down_proj"),
        ("model.layers.3.mlp.gate_up_proj", "model.layers.3.mlp.gate_up_proj"),
        ("model.embed_tokens", "model.embed_tokens"),
        ("lm_head", "lm_head"),
    ],
)
def test_matrices_that_are_multiplied_at_once_are_one_unit(module: str, unit: str) -> None:
    assert unit_of(module) == unit


def test_a_model_has_four_units_a_layer_and_one_or_two_tables() -> None:
    assert len(units_of(3, is_tied=True)) == 13
    assert units_of(3, is_tied=False)[-1] == "lm_head"


def test_a_mixed_plan_is_named_after_most_of_those_with_the_fewest_bits() -> None:
    units = units_of(2, is_tied=True)
    plan = BitPlan(schemes=dict.fromkeys(units, SCHEMES[3]), is_mixed=True)
    assert plan.name == "int8-g128-mixed"
    some = dict(zip(units[:3], (SCHEMES[2], SCHEMES[0], SCHEMES[2]), strict=True))
    plan = BitPlan(schemes=plan.schemes | some, is_mixed=True)
    assert plan.name == "int4-g32-mixed"
    assert plan.summary()["gate_up_proj"] == "int8-g128"
    assert plan.summary()["qkv_proj"] == "int4-g128 x 1, int8-g128 x 1"
