"""An 8-bit cache against the floats that it stands for. transformers judges those."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen2x.quantize.errors import BackendError
from qwen2x.runtimes.compare import kl_divergence
from qwen2x.runtimes.generate import generate
from qwen2x.runtimes.runtime import Logits, Runtime, open_runtime
from qwen2x.runtimes.sampler import Sampling
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

# 8 bits of keys and values: a hundredth of what 8 bits of weights cost.
INT8_CACHE_KL = 1e-4
FLOAT32_SELF = 2e-5
FLOAT32_LOGITS = 5e-5
PROMPT = np.random.default_rng(0).integers(0, 2016, 120).tolist()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture(scope="module")
def biased_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key biases as in Qwen2: one column in eight is a hundred times what is added to it."""
    folder = write_tiny_checkpoint(
        tmp_path_factory.mktemp("biased") / "source",
        dtype="float32",
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_scaling=YARN,
        head_dim=64,
    )
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("k_proj.bias"):
            # The slowest pairs: their share of a score is nearly the same at every position.
            values.reshape(-1, 2, 32)[:, :, 28:] *= 200
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def opened(make_bundle: MakeBundle, biased_checkpoint: Path) -> Iterator[Runtime]:
    bundle = make_bundle(biased_checkpoint, target="mlx", dtype="float32")
    with open_runtime(bundle, kv_bits=8, prefill_chunk=32) as runtime:
        yield runtime


@pytest.fixture
def runtime(opened: Runtime) -> Runtime:
    opened.reset()
    return opened


@pytest.fixture(scope="module")
def floats(make_bundle: MakeBundle, biased_checkpoint: Path) -> Iterator[Runtime]:
    with open_runtime(make_bundle(biased_checkpoint, target="mlx", dtype="float32")) as runtime:
        yield runtime


def divergence(reference: Logits, candidate: Logits) -> float:
    return float(kl_divergence(reference, candidate).mean())


PLACES = {"near": None, "far": [*range(40), 32767, *range(131072 - 79, 131072)]}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_logits_are_nearly_those_of_floats_at_any_position(
    runtime: Runtime, floats: Runtime, places: Any
) -> None:
    ids = np.array([PROMPT])
    found = runtime.logits(ids, positions=places)[0]
    assert divergence(floats.logits(ids, positions=places)[0], found) < INT8_CACHE_KL


def test_the_share_of_the_bias_is_exact(
    runtime: Any, floats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With nothing rounded, only the bias's share of the scores is another computation.
    def exact(x: Any, parts: Any, *, transpose: bool) -> Any:
        return x @ (parts[0].swapaxes(-1, -2) if transpose else parts[0])

    def keep(self: Any, index: int, new: Any) -> Any:
        store = self.__dict__.setdefault("kept", {})
        old = store.get(index)
        store[index] = new if old is None else mx.concatenate([old, new], axis=2)
        return [store[index]]

    monkeypatch.setattr("qwen2x.runtimes.mlx_int8_cache._product", exact)
    monkeypatch.setattr("qwen2x.runtimes.mlx_int8_cache.Int8Cache._write", keep)
    monkeypatch.setattr(runtime, "prefill_chunk", 512)
    ids = np.array([PROMPT, PROMPT[::-1]])
    for places in PLACES.values():
        found, wanted = runtime.logits(ids, positions=places), floats.logits(ids, positions=places)
        # Scores of size 1000, summed in another order.
        np.testing.assert_allclose(found, wanted, atol=20 * FLOAT32_LOGITS, rtol=0)


def test_keys_with_their_bias_would_be_spoilt(
    make_bundle: MakeBundle,
    biased_checkpoint: Path,
    runtime: Runtime,
    floats: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(model: Any) -> Any:
        return [mx.zeros((2, 1, 64)) for _ in model.model.layers]

    bundle = make_bundle(biased_checkpoint, target="mlx", dtype="float32")
    monkeypatch.setattr("qwen2x.runtimes.mlx_runtime.take_key_biases", none)
    ids = np.array([PROMPT])
    wanted = floats.logits(ids)[0]
    with open_runtime(bundle, kv_bits=8) as plain:
        spoilt = divergence(wanted, plain.logits(ids)[0])
    assert spoilt > 20 * divergence(wanted, runtime.logits(ids)[0])


def test_steps_chunks_batches_and_truncation_give_the_same(runtime: Runtime) -> None:
    whole = runtime.logits(np.array([PROMPT]))[0]

    def near(found: Logits, wanted: Logits) -> None:
        np.testing.assert_allclose(found, wanted, atol=FLOAT32_SELF, rtol=0)

    near(np.stack([runtime.decode(token) for token in PROMPT[:50]]), whole[:50])
    runtime.append([5, 6, 7] * 9)
    runtime.truncate(41)
    near(runtime.append(PROMPT[41:], keep=79), whole[41:])
    padded = np.zeros((2, 120), np.int64)
    padded[0], padded[1, :33] = PROMPT, PROMPT[:33]
    batch = runtime.logits(padded, lengths=[120, 33])
    near(batch[0], whole)
    near(batch[1, :33], whole[:33])


def test_the_cache_grows_with_its_table(runtime: Any, floats: Runtime) -> None:
    tokens = (PROMPT * 5)[:600]
    rows = runtime.append(tokens[:250], keep=250)
    rows = np.concatenate([rows, [runtime.decode(token) for token in tokens[250:270]]])
    rows = np.concatenate([rows, runtime.append(tokens[270:], keep=330)])
    whole = runtime.logits(np.array([tokens]))[0]
    np.testing.assert_allclose(rows, whole, atol=FLOAT32_SELF, rtol=0)
    assert runtime._buffers.capacity == 768
    assert divergence(floats.logits(np.array([tokens]))[0], whole) < INT8_CACHE_KL


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_models_have_it_too(
    make_bundle: MakeBundle, random_checkpoint: Path, dtype: str
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", dtype=dtype)
    ids = np.array([PROMPT])
    with open_runtime(bundle) as floats, open_runtime(bundle, kv_bits=8) as runtime:
        assert divergence(floats.logits(ids)[0], runtime.logits(ids)[0]) < 3e-3
        float_bytes = floats._buffers.layout.bytes_per_position  # type: ignore[attr-defined]
        # A head of 32 columns has a scale and a bias of its own; one of 128 takes 9 bits of 16.
        assert runtime._buffers.layout.bytes_per_position < 0.7 * float_bytes  # type: ignore[attr-defined]


def test_answers_are_those_of_floats(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(EXAMPLE, target="mlx", dtype="float32")
    with open_runtime(bundle) as floats, open_runtime(bundle, kv_bits=8) as runtime:
        wanted = generate(floats, "Who are you?", max_tokens=20, sampling=Sampling()).run()
        found = generate(runtime, "Who are you?", max_tokens=20, sampling=Sampling()).run()
        assert found.text == wanted.text


@pytest.mark.parametrize("bits", [4, 16, 0, True])
def test_other_widths_are_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, bits: int
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", dtype="float32")
    with pytest.raises(BackendError, match=f"kv_bits must be 8, got {bits}"):
        open_runtime(bundle, kv_bits=bits)


def test_other_backends_are_refused(random_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match="is there for onnx and mlx, not for torch"):
        open_runtime(random_checkpoint, kv_bits=8)


def test_a_head_size_without_groups_is_refused(tmp_path: Path, make_bundle: MakeBundle) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", head_dim=24, dtype="float32")
    bundle = make_bundle(source, target="mlx", dtype="float32")
    with pytest.raises(BackendError, match="multiple of 32, got 24; leave out --kv-bits"):
        open_runtime(bundle, kv_bits=8)
