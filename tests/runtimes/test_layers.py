"""Hidden states of every runtime, and the figures made of them. The judge is transformers."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.layers import Hidden, LayerDifference, compare_layers, first_beyond
from qwen2x.runtimes.runtime import Runtime, TokenIds, open_runtime
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import write_weights

# Relative to the length of a hidden state: float32 sums in other orders.
FLOAT32_ERROR = 1e-5
# A tiny model of random weights; int8 activations in ONNX Runtime, bfloat16 ones in MLX.
INT4_ERROR = 0.25
PROMPT = np.random.default_rng(4).integers(0, 2016, (1, 40))

needs_mlx = pytest.mark.skipif(
    importlib.util.find_spec("mlx") is None, reason="mlx is not installed"
)


class Shows:
    """A runtime of which nothing is known but its hidden states."""

    def __init__(self, states: Any) -> None:
        self._states = np.array(states, np.float32)

    def hidden_states(self, token_ids: TokenIds) -> Hidden:
        return self._states


def states_of(runtime: Runtime) -> Hidden:
    found: Hidden = runtime.hidden_states(PROMPT)  # type: ignore[attr-defined]
    assert found.dtype == np.float32
    return found


def errors_of(found: Hidden, wanted: Hidden) -> list[float]:
    """The largest relative error of each layer."""
    assert found.shape == wanted.shape
    lengths = np.linalg.norm(wanted, axis=-1)
    relative: list[float] = (np.linalg.norm(found - wanted, axis=-1) / lengths).max(-1).tolist()
    return relative


@pytest.fixture(scope="module")
def expected(random_torch: Runtime) -> Hidden:
    return states_of(random_torch)


def test_pytorch_shows_what_transformers_lists_but_the_last_without_its_norm(
    random_torch: Runtime, expected: Hidden, random_checkpoint: Path
) -> None:
    import torch
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(input_ids=torch.from_numpy(PROMPT), output_hidden_states=True)
        normed = model.model.norm(torch.from_numpy(expected[-1]))
    listed = [part[0].numpy() for part in output.hidden_states]
    assert len(listed) == len(expected) == 3
    for found, wanted in zip([*expected[:-1], normed.numpy()], listed, strict=True):
        assert errors_of(found[None], wanted[None])[0] < FLOAT32_ERROR
    assert np.array_equal(expected[0], load_file(random_checkpoint / "model.safetensors")[
        "model.embed_tokens.weight"
    ][PROMPT[0]])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device": "cuda", "dtype": "float32"},
        pytest.param({"target": "mlx", "dtype": "float32"}, marks=needs_mlx),
    ],
    ids=["onnx", "onnx graph for cuda", "mlx"],
)
def test_runtimes_in_float32_show_what_transformers_computes(
    options: dict[str, Any], make_bundle: MakeBundle, random_checkpoint: Path, expected: Hidden
) -> None:
    with open_runtime(make_bundle(random_checkpoint, **options), device="cpu") as runtime:
        runtime.prefill([1, 2, 3])
        for error in errors_of(states_of(runtime), expected):
            assert error < FLOAT32_ERROR
        # Beside the cache, and as often as one likes.
        assert runtime.cached_ids == [1, 2, 3]
        np.testing.assert_array_equal(states_of(runtime), states_of(runtime))


@pytest.mark.parametrize(
    "target", ["onnx", pytest.param("mlx", marks=needs_mlx)]
)  # fmt: skip
def test_int4_is_near_in_every_layer_and_exact_in_none(
    target: str, make_bundle: MakeBundle, random_checkpoint: Path, expected: Hidden
) -> None:
    with open_runtime(
        make_bundle(random_checkpoint, target=target, bits=4, method="rtn")
    ) as runtime:
        for error in errors_of(states_of(runtime), expected):
            assert FLOAT32_ERROR < error < INT4_ERROR


@needs_mlx
def test_an_8_bit_cache_shows_layers_too(
    make_bundle: MakeBundle, random_checkpoint: Path, expected: Hidden
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", dtype="float32")
    with open_runtime(bundle, kv_bits=8) as runtime:
        first, *others = errors_of(states_of(runtime), expected)
    assert first == 0
    assert all(FLOAT32_ERROR < error < 0.01 for error in others)


@pytest.mark.parametrize("length", [1, 2, 512])
def test_one_token_and_the_whole_context_are_shown(
    length: int, make_bundle: MakeBundle, random_checkpoint: Path, random_torch: Runtime
) -> None:
    ids = np.resize(PROMPT, (1, length))
    targets = ["onnx", *(["mlx"] if importlib.util.find_spec("mlx") else [])]
    wanted = random_torch.hidden_states(ids)  # type: ignore[attr-defined]
    for target in targets:
        bundle = make_bundle(random_checkpoint, target=target, dtype="float32")
        with open_runtime(bundle) as runtime:
            found = runtime.hidden_states(ids)  # type: ignore[attr-defined]
            assert max(errors_of(found, wanted)) < 2 * FLOAT32_ERROR
            with pytest.raises(RequestError, match="the context has"):
                runtime.hidden_states(np.resize(PROMPT, (1, 513)))  # type: ignore[attr-defined]


def test_a_changed_layer_is_the_first_beyond(
    make_bundle: MakeBundle, random_checkpoint: Path, random_torch: Runtime, tmp_path: Path
) -> None:
    tampered = shutil.copytree(random_checkpoint, tmp_path / "tampered")
    tensors = load_file(tampered / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.5
    write_weights(tampered, tensors)
    with open_runtime(make_bundle(tampered)) as runtime:
        found = compare_layers(random_torch, runtime, PROMPT)  # type: ignore[arg-type]
    assert [item.layer for item in found] == ["embed_tokens", "layers.0", "layers.1"]
    beyond = first_beyond(found, 1e-4)
    assert beyond is found[2]
    assert first_beyond(found, 10.0) is None


def test_figures_are_of_the_difference_and_the_reference() -> None:
    # Lengths 5 and 10; the second row is half of itself, the first is turned by 90 degrees.
    reference = Shows([[[3, 4], [6, 8]]])
    candidate = Shows([[[-4, 3], [3, 4]]])
    (found,) = compare_layers(reference, candidate, PROMPT)
    assert found == LayerDifference(
        layer="embed_tokens",
        relative_error=pytest.approx((math.sqrt(2) + 0.5) / 2),
        worst=pytest.approx(math.sqrt(2)),
        worst_position=0,
        cosine=pytest.approx(0.5),
    )


def test_the_reference_against_itself_is_exact() -> None:
    states = np.random.default_rng(0).standard_normal((4, 9, 16))
    found = compare_layers(Shows(states), Shows(states), PROMPT)
    assert [item.layer for item in found] == ["embed_tokens", "layers.0", "layers.1", "layers.2"]
    assert all(item.relative_error == item.worst == 0 for item in found)
    assert all(item.cosine == pytest.approx(1, abs=1e-12) for item in found)
    assert first_beyond(found, 0.0) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_beyond_every_limit(value: float) -> None:
    states = np.ones((3, 5, 4))
    spoiled = states.copy()
    spoiled[1, 3, 2] = value
    found = compare_layers(Shows(states), Shows(spoiled), PROMPT)
    beyond = first_beyond(found, 1e9)
    assert beyond is not None
    assert (beyond.layer, beyond.worst_position) == ("layers.0", 3)
    assert not math.isfinite(beyond.worst)


def test_large_float16_states_do_not_overflow_in_the_figures() -> None:
    states = np.full((1, 2, 4), 3e38)
    (found,) = compare_layers(Shows(states), Shows(states * 0.5), PROMPT)
    assert found.relative_error == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(3, 5, 8), (4, 5, 4), (3, 6, 4)])
def test_models_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"\(3, 5, 4\) and .*: not the same model"):
        compare_layers(Shows(np.ones((3, 5, 4))), Shows(np.ones(shape)), PROMPT)
