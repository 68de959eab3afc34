"""What each unit costs, against transformers with that unit alone rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from qwen2x.exporters.calibration import Calibration
from qwen2x.exporters.checkpoint import open_checkpoint
from qwen2x.exporters.config import read_config
from qwen2x.exporters.measuring import Measurement, measure, probed_tokens
from qwen2x.quantize.errors import CheckpointError
from qwen2x.quantize.groups import dequantize, quantize
from qwen2x.quantize.plan import EMBEDDING, HEAD, LAYER_UNITS, units_of
from qwen2x.quantize.scheme import Scheme
from qwen2x.quantize.sensitivity import probing_scheme
from tests.exporters.judge import load_judge
from tests.tiny_checkpoint import write_tiny_checkpoint

LAYERS = 3
SCHEMES = [Scheme(bits=4, group_size=size) for size in (32, 64)] + [Scheme(bits=8, group_size=32)]
# KL of 1e-4 to 0.1 out of float32 sums over three layers.
CLOSE = {"rel": 0.02, "abs": 2e-6}
# Random windows: both halves of the text are as good as each other.
WINDOWS = np.random.default_rng(5).integers(0, 2000, (4, 32))


def ignore(stage: str, done: int, total: int) -> None:
    pass


def calibration_of(windows: np.ndarray) -> Calibration:
    return Calibration(windows=windows, held_out=windows[:0], name="drawn")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measuring") / "source"
    return write_tiny_checkpoint(
        folder, num_hidden_layers=LAYERS, is_tied=request.param, dtype="float32"
    )


@pytest.fixture(scope="module")
def measured(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    with open_checkpoint(source) as checkpoint:
        staging, kept_in = tmp_path_factory.mktemp("staging"), tmp_path_factory.mktemp("kept")
        return measure(checkpoint, calibration_of(WINDOWS), SCHEMES, staging, kept_in, ignore)


def modules_of(unit: str) -> list[str]:
    for path, modules in LAYER_UNITS.items():
        if unit.endswith(path):
            return [unit.removesuffix(path) + module for module in modules]
    return [unit]


def judged_loss(source: Path, unit: str) -> float:
    """KL of transformers' model with a unit rounded, at the positions that ours looks at."""
    exact, own = load_judge(source), load_judge(source)
    state = own.state_dict()
    for module in modules_of(unit):
        weights = exact.state_dict()[f"{module}.weight"].numpy()
        rounded = dequantize(quantize(weights, probing_scheme(weights.shape[1])))
        if exact.config.tie_word_embeddings and unit in (EMBEDDING, HEAD):
            # A copy of its own for the use that is not rounded.
            kept = own.lm_head if unit == EMBEDDING else own.model.embed_tokens
            kept.weight = torch.nn.Parameter(kept.weight.detach().clone())
            own.get_submodule(module).weight = torch.nn.Parameter(torch.from_numpy(rounded))
        else:
            state[f"{module}.weight"].copy_(torch.from_numpy(rounded))
    tokens = torch.from_numpy(WINDOWS)
    with torch.inference_mode():
        one, other = (
            torch.log_softmax(model(tokens).logits.double().reshape(-1, 2048)[::4], -1)
            for model in (exact, own)
        )
    return float((one.exp() * (one - other)).sum(-1).mean())


def test_every_units_loss_is_that_of_transformers_with_it_alone_rounded(
    source: Path, measured: Measurement
) -> None:
    with open_checkpoint(source) as checkpoint:
        is_tied = checkpoint.config.is_tied
    units = [*units_of(LAYERS, is_tied=is_tied), *([HEAD] if is_tied else [])]
    assert set(measured.losses) == set(units)
    found = {unit: measured.losses[unit][SCHEMES[1]] for unit in units}
    expected = {unit: judged_loss(source, unit) for unit in units}
    assert min(expected.values()) > 1e-5
    assert found == pytest.approx(expected, **CLOSE)


def test_finer_groups_cost_less_and_eight_bits_hardly_anything(measured: Measurement) -> None:
    for losses in measured.losses.values():
        fine, coarse, eight = (losses[scheme] for scheme in SCHEMES)
        assert eight < 0.02 * coarse
        assert fine < coarse


def test_an_interrupted_measurement_goes_on_and_finds_the_same(
    source: Path, measured: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2x.exporters.measuring._SECONDS_BETWEEN_SAVES", 0)
    calls: list[tuple[str, int, int]] = []

    def stop(stage: str, done: int, total: int) -> None:
        calls.append((stage, done, total))
        if done == 2:
            raise KeyboardInterrupt

    with open_checkpoint(source) as checkpoint:
        arguments = checkpoint, calibration_of(WINDOWS), SCHEMES, tmp_path, tmp_path / "kept"
        with pytest.raises(KeyboardInterrupt):
            measure(*arguments, stop)
        calls.clear()
        again = measure(*arguments, lambda *call: calls.append(call))
        assert calls == [("measured", 2, 3), ("measured", 3, 3)]
        calls.clear()
        once_more = measure(*arguments, lambda *call: calls.append(call))
    assert calls == [("measured", 3, 3)]
    for found in (again, once_more):
        assert found.losses == measured.losses
        np.testing.assert_array_equal(found.head_products, measured.head_products)


def test_a_measurement_is_kept_for_its_source_text_and_schemes_alone(
    source: Path, tmp_path: Path
) -> None:
    other = write_tiny_checkpoint(
        tmp_path / "other", num_hidden_layers=LAYERS, is_tied=read_config(source).is_tied, seed=9,
        dtype="float32",
    )  # fmt: skip
    kept_in = tmp_path / "kept"
    cases = [
        (source, WINDOWS, SCHEMES), (source, WINDOWS[:3], SCHEMES), (source, WINDOWS, SCHEMES[:2]),
        (other, WINDOWS, SCHEMES),
    ]  # fmt: skip
    for count, (folder, windows, schemes) in enumerate(cases, 1):
        for is_known in (False, True):
            calls: list[int] = []
            with open_checkpoint(folder) as checkpoint:
                measure(
                    checkpoint, calibration_of(windows), schemes, tmp_path, kept_in,
                    lambda stage, done, total, calls=calls: calls.append(done),
                )  # fmt: skip
            assert calls == ([3] if is_known else [0, 1, 2, 3])
        assert len(list(kept_in.iterdir())) == count


def test_a_damaged_result_is_measured_again(
    source: Path, measured: Measurement, tmp_path: Path
) -> None:
    with open_checkpoint(source) as checkpoint:
        arguments = checkpoint, calibration_of(WINDOWS), SCHEMES, tmp_path, tmp_path / "kept"
        measure(*arguments, ignore)
        (path,) = (tmp_path / "kept").iterdir()
        path.write_bytes(path.read_bytes()[:100])
        assert measure(*arguments, ignore).losses == measured.losses


def test_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype="float32")
    path = source / "model.safetensors"
    tensors = load_file(path)
    # Of two layers, so that the second one meets infinity.
    tensors["model.layers.0.post_attention_layernorm.weight"] *= np.float32(1e25)
    save_file(tensors, path, metadata={"format": "pt"})
    with open_checkpoint(source) as checkpoint, pytest.raises(CheckpointError, match="not finite"):
        measure(checkpoint, calibration_of(WINDOWS), SCHEMES, tmp_path, tmp_path, ignore)


def test_of_larger_models_fewer_tokens_are_probed(source: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        config = checkpoint.config
    large = replace(config, num_hidden_layers=80, hidden_size=8192)
    assert probed_tokens(config, 512) == 256
    assert probed_tokens(config, 32) == 32
    assert 0 < 4 * probed_tokens(large, 512) * 8192 * 4 * 321 <= 2 << 30
