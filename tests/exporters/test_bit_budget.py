"""Plans within a budget: what is promised, what is written, what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters.bit_budget import (
    SCHEMES,
    parameters_of_units,
    plan_within_budget,
    typical_losses,
)
from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.config import parse_config, read_config
from qwen2x.exporters.export_plan import planned_files
from qwen2x.exporters.exporter import export, plan_export
from qwen2x.exporters.options import Options
from qwen2x.exporters.weights import bits_per_weight
from qwen2x.quantize.errors import SchemeError
from qwen2x.quantize.plan import units_of
from qwen2x.quantize.scheme import Scheme
from tests.exporters.children import run_child
from tests.exporters.test_staging import hashes
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

KILLED = -signal.SIGKILL
SAMPLE = EXAMPLE.parent / "sample.txt"
SEVEN_B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
HALF_B = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def config_of(sizes: dict[str, Any]) -> Any:
    common = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "torch_dtype": "bfloat16", "eos_token_id": 151645,
    }  # fmt: skip
    return parse_config(common | sizes, {})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("budget") / "source", dtype="float32")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "bundles"
    folder.mkdir()
    return folder / "bundle"


# What is promised


@pytest.mark.parametrize("target", ["onnx", "mlx"])
@pytest.mark.parametrize("wanted", [4.6, 5.5, 7.0])
def test_a_plan_stays_within_bits_per_weight_and_uses_them(target: str, wanted: float) -> None:
    plan = plan_export(config_of(HALF_B), Options(target=target, bits_per_weight=wanted))
    assert wanted - 0.15 < bits_per_weight(plan.weights) <= wanted


@pytest.mark.parametrize("target", ["onnx", "mlx"])
@pytest.mark.parametrize("wanted", [300_000_000, 400_000_000])
def test_a_plan_stays_within_bytes_and_uses_them(target: str, wanted: int) -> None:
    plan = plan_export(config_of(HALF_B), Options(target=target, max_bytes=wanted))
    assert wanted - 10_000_000 < sum(planned_files(plan).values()) <= wanted


@pytest.mark.parametrize("sizes", [HALF_B, SEVEN_B], ids=["0.5B", "7B"])
def test_the_preset_takes_no_more_than_llama_cpps_q4_0(sizes: dict[str, Any]) -> None:
    config = config_of(sizes)
    plan = plan_export(config, Options(bits=4))
    parameters = parameters_of_units(config)
    head = parameters["model.embed_tokens" if config.is_tied else "lm_head"]
    # llama.cpp's Q4_0 without its vocabulary: 4.5 bits, and for the head Q6_K, or Q8_0 where
    # blocks of 256 do not fit.
    bits_of_head = 6.5625 if config.hidden_size % 256 == 0 else 8.5
    theirs = (4.5 * (sum(parameters.values()) - head) + bits_of_head * head) / 8
    assert 0.97 * theirs < sum(planned_files(plan).values()) <= theirs


@pytest.mark.parametrize("sizes", [HALF_B, SEVEN_B], ids=["0.5B", "7B"])
def test_eight_bits_take_no_more_than_llama_cpps_q8_0(sizes: dict[str, Any]) -> None:
    config = config_of(sizes)
    # Its codes of 8 bits and float16 scales for 32 weights each.
    theirs = 8.5 * sum(parameters_of_units(config).values()) / 8
    plan = plan_export(config, Options(bits=8))
    assert 0.97 * theirs < sum(planned_files(plan).values()) <= theirs


@pytest.mark.parametrize("budget", [{"bits": 4}, {"max_bytes": 300_000_000}])
def test_for_speed_nothing_slow_is_chosen(budget: dict[str, Any]) -> None:
    config = config_of(HALF_B)
    plan = plan_export(config, Options(prefer="speed", **budget))
    chosen = set(plan.bit_plan.schemes.values())
    assert {(scheme.bits, scheme.is_symmetric) for scheme in chosen if scheme} == {
        (4, True),
        (8, True),
    }
    assert {scheme.group_size for scheme in chosen if scheme} == {128}
    if "bits" in budget:
        assert 4.9 < bits_per_weight(plan.weights) <= 5.05


def test_for_speed_narrow_columns_have_the_groups_that_fit() -> None:
    narrow = config_of(HALF_B | {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16})
    plan = plan_export(narrow, Options(bits=4, prefer="speed"))
    head = plan.bit_plan.scheme_of("model.embed_tokens")
    assert head is not None
    assert (head.group_size, head.is_symmetric) == (32, True)


def test_for_speed_zero_points_may_be_asked_for() -> None:
    options = Options(max_bytes=300_000_000, prefer="speed", asymmetric=True)
    chosen = set(plan_export(config_of(HALF_B), options).bit_plan.schemes.values())
    assert {(4, False), (8, True)} <= {(s.bits, s.is_symmetric) for s in chosen if s}
    assert {scheme.group_size for scheme in chosen if scheme} == {128}


def test_eight_bits_for_speed_have_large_groups() -> None:
    plan = Options(bits=8, prefer="speed").bit_plan(config_of(HALF_B))
    assert set(plan.summary().values()) == {"int8-g128"}


def test_eight_bits_have_the_groups_that_were_asked_for() -> None:
    config = config_of(HALF_B)
    preset, asked = (
        Options(bits=8, group_size=size).bit_plan(config).summary() for size in (None, 32)
    )
    assert set(asked.values()) == {"int8-g32"}
    assert preset == asked | {"gate_up_proj": "int8-g64"}
    narrow = config_of(HALF_B | {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16})
    assert set(Options(bits=8).bit_plan(narrow).summary().values()) == {"int8-g32"}


def test_the_preset_is_the_same_plan_for_both_targets() -> None:
    config = config_of(HALF_B)
    onnx, mlx = (plan_export(config, Options(target=name, bits=4)) for name in ("onnx", "mlx"))
    assert onnx.bit_plan == mlx.bit_plan
    assert onnx.bit_plan.is_mixed


def test_what_loses_most_by_it_is_not_in_four_bits() -> None:
    config = config_of(HALF_B)
    options = Options(bits_per_weight=5.0)
    losses = typical_losses(config, SCHEMES)
    for losses_of_unit in losses.values():
        for scheme in losses_of_unit:
            losses_of_unit[scheme] *= 1e-3
    fragile = ["model.layers.0.mlp.down_proj", "model.layers.23.mlp.gate_up_proj"]
    for unit in fragile:
        losses[unit] = {scheme: loss * 1e5 for scheme, loss in losses[unit].items()}
    plan = plan_within_budget(
        config, options, losses, lambda bit_plan: plan_export(config, options, bit_plan)
    )
    for unit in fragile:
        scheme = plan.bit_plan.schemes[unit]
        assert scheme is not None
        assert scheme.bits == 8


def test_zero_points_are_offered_when_asked_for() -> None:
    config = config_of(HALF_B)
    plan = plan_export(config, Options(bits=4, asymmetric=True))
    found = {scheme.is_symmetric for scheme in plan.bit_plan.schemes.values() if scheme}
    assert False in found
    plan = plan_export(config, Options(bits=4))
    assert {scheme.is_symmetric for scheme in plan.bit_plan.schemes.values() if scheme} == {True}


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_per_weight": 4.0}, "--bits-per-weight 4.0 cannot be met; this model needs "
                                   "--bits-per-weight 4.13 or more"),
        ({"max_bytes": 200_000_000}, "--max-bytes 200000000 cannot be met; this model needs "
                                     "--max-bytes 25"),
        ({"max_bytes": 1}, "cannot be met"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_met_says_the_least_that_can(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchemeError) as caught:
        plan_export(config_of(HALF_B), Options(**options))
    assert message in str(caught.value)


def test_the_least_that_can_be_met_can_be_met() -> None:
    plan = plan_export(config_of(HALF_B), Options(bits_per_weight=4.13))
    assert plan.bit_plan.layers == Scheme(bits=4, group_size=128)
    assert bits_per_weight(plan.weights) <= 4.13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_per_weight": 5.0, "max_bytes": 10**9}, "are two budgets; give one of them"),
        ({"bits_per_weight": -1.0}, "--bits-per-weight must be above 0, got -1.0"),
        ({"bits_per_weight": float("nan")}, "--bits-per-weight must be above 0, got nan"),
        ({"max_bytes": 0}, "--max-bytes must be above 0, got 0"),
        ({"bits": 8, "max_bytes": 10**9}, "leave out --bits 8"),
        ({"group_size": 64, "bits_per_weight": 5.0}, "leave out --group-size 64"),
        ({"bits": 4, "group_size": 32, "asymmetric": True}, "--asymmetric is for"),
        ({"bits": 8, "asymmetric": True}, "--asymmetric is for"),
        ({"bits": 8, "asymmetric": True, "prefer": "speed"}, "--asymmetric is for --bits 4"),
        ({"bits": 4, "group_size": 32, "prefer": "speed"}, "--prefer speed is for"),
        ({"bits": 4, "method": "rtn", "prefer": "speed"}, "--prefer speed is for"),
        ({"prefer": "speed"}, "--prefer speed is for"),
        ({"prefer": "size"}, "prefer must be quality or speed, got 'size'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchemeError) as caught:
        Options(**options)
    assert message in str(caught.value)


# What is written


@pytest.mark.parametrize("target", ["onnx", "mlx"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_bundle_says_which_matrix_has_which_scheme(
    target: str, method: str, source: Path, out: Path
) -> None:
    done = export(
        source, target, out=out, bits_per_weight=7.0, method=method, calibration=str(SAMPLE)
    )
    manifest = done.manifest
    assert manifest["bits_per_weight"] <= 7.0
    assert manifest["method"] == method
    assert set(manifest["bit_plan"]) == set(units_of(2, is_tied=read_config(source).is_tied))
    assert len(set(manifest["bit_plan"].values())) > 1
    assert manifest["scheme"].endswith("-mixed")
    assert open_bundle(out, verify=True).scheme == manifest["scheme"]
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    estimate = manifest["quality"].get("estimate")
    assert (estimate is not None) == (method == "gptq")
    if estimate is not None:
        assert 0 < estimate["kl_mean"] < 0.2
        assert 0 < estimate["top1_agreement"] <= 1


def test_an_export_that_was_killed_while_measuring_gives_the_same_bundle(
    source: Path, out: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"bits": 4, "calibration": str(SAMPLE)}
    export(source, out=tmp_path / "undisturbed", **options)
    program = "run(on_layer=lambda stage, done, total: die() if done == total else None)"
    assert run_child(program, source, out, **options).returncode == KILLED
    export(source, out=out, **options)
    assert hashes(out) == hashes(tmp_path / "undisturbed")
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_without_a_tokenizer_four_bits_are_rounded_plainly(source: Path, tmp_path: Path) -> None:
    own = write_tiny_checkpoint(tmp_path / "own")
    (own / "tokenizer.json").unlink()
    manifest = export(own, out=tmp_path / "bundle", bits=4).manifest
    assert (manifest["method"], manifest["scheme"]) == ("rtn", "int4-g32")


def test_the_estimate_is_of_text_that_was_held_out(source: Path, out: Path) -> None:
    manifest = export(source, out=out, bits=4, group_size=32, calibration=str(SAMPLE)).manifest
    estimate = manifest["quality"]["estimate"]
    text = json.loads((out / "qwen2x.json").read_text("utf-8"))["calibration"]
    assert "nothing was fitted to" in estimate["text"]
    assert estimate["positions"] < text["tokens"]
    assert np.isfinite(estimate["perplexity"])
