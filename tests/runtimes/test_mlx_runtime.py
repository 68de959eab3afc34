"""Caches, devices and weights of the MLX runtime. The judge is transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.runtime import Logits, Runtime, open_runtime
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

# Against transformers: other orders of summing, over logits of size 5.
FLOAT32_LOGITS = 5e-5
# float16 keeps 11 bits, bfloat16 8; two layers of them, against transformers in float32.
HALF_LOGITS = {"float16": 0.05, "bfloat16": 0.4}
# Between two ways through one graph: rows of a matrix product are summed alike or nearly.
FLOAT32_SELF = 2e-5
PROMPT = np.random.default_rng(0).integers(0, 2016, 120).tolist()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture(scope="module")
def opened(make_bundle: MakeBundle, random_checkpoint: Path) -> Iterator[Runtime]:
    bundle = make_bundle(random_checkpoint, target="mlx", dtype="float32")
    with open_runtime(bundle, prefill_chunk=32) as runtime:
        yield runtime


@pytest.fixture
def runtime(opened: Runtime) -> Runtime:
    opened.reset()
    return opened


@pytest.fixture(scope="module")
def expected(random_torch: Runtime) -> Logits:
    """Transformers' logits of the prompt [S, V]."""
    rows: Logits = random_torch.logits(np.array([PROMPT]))[0]
    return rows


def near(found: Logits, wanted: Logits, atol: float = FLOAT32_LOGITS) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=0)


def test_whole_rows_are_those_of_transformers(runtime: Runtime, expected: Logits) -> None:
    near(runtime.logits(np.array([PROMPT]))[0], expected)
    assert runtime.cache_length == 0


def test_token_by_token_equals_the_whole_while_the_cache_grows(
    runtime: Runtime, random_torch: Runtime
) -> None:
    tokens = (PROMPT * 3)[:300]
    rows = np.stack([runtime.decode(token) for token in tokens])
    near(rows, random_torch.logits(np.array([tokens]))[0])
    assert runtime._buffers.capacity == 512  # type: ignore[attr-defined]


def test_a_prompt_in_chunks_equals_the_whole(runtime: Runtime, expected: Logits) -> None:
    near(runtime.prefill(PROMPT[:100]), expected[99])
    near(runtime.append(PROMPT[100:], keep=20), expected[100:])
    assert runtime.cached_ids == PROMPT


@pytest.mark.parametrize("keep", [1, 2, 31, 32, 33, 65, 120])
def test_append_keeps_the_last_rows_across_chunks(
    runtime: Runtime, expected: Logits, keep: int
) -> None:
    rows = runtime.append(PROMPT, keep=keep)
    assert rows.shape == (keep, 2048)
    near(rows, expected[-keep:])


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(
    runtime: Runtime, expected: Logits
) -> None:
    runtime.prefill(PROMPT[:70])
    runtime.append([5, 6, 7, 8] * 10)
    for length in (50, 31, 1):
        runtime.truncate(length)
    near(runtime.decode(PROMPT[1]), expected[1])
    near(runtime.append(PROMPT[2:], keep=118), expected[2:])
    runtime.reset()
    assert runtime._buffers.capacity == 0  # type: ignore[attr-defined]
    near(runtime.prefill(PROMPT[:3]), expected[2])


def test_rows_of_a_batch_equal_each_row_alone_whatever_the_padding(
    runtime: Runtime, expected: Logits
) -> None:
    lengths = [40, 17, 1]
    padded = np.full((3, 40), 2015)
    for row, length in enumerate(lengths):
        padded[row, :length] = PROMPT[:length]
    found = runtime.logits(padded, lengths=lengths)
    for row, length in enumerate(lengths):
        near(found[row, :length], expected[:length])


def test_a_jump_of_positions_needs_no_single_row(runtime: Runtime, random_torch: Runtime) -> None:
    ids = np.array([PROMPT[:60], PROMPT[60:]])
    end = runtime.max_context
    jump = [*range(8), *range(end - 52, end)]
    near(runtime.logits(ids, positions=jump), random_torch.logits(ids, positions=jump))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"truncate": False}},
        {"rope_scaling": YARN | {"attention_factor": 1.5}, "head_dim": 64, "is_tied": False},
    ],
    ids=["plain", "yarn", "yarn without truncate", "attention factor, head size, own head"],
)
def test_far_positions_are_those_of_transformers(
    tmp_path: Path, make_bundle: MakeBundle, changes: dict[str, Any]
) -> None:
    native = 32768 if "rope_scaling" in changes else 131072
    source = write_tiny_checkpoint(
        tmp_path / "far", dtype="float32", max_position_embeddings=native, rope_theta=1e6, **changes
    )
    ids = np.array([PROMPT])
    places = [*range(40), 32767, 32768, 65535, *range(131072 - 77, 131072)]
    bundle = make_bundle(source, target="mlx", dtype="float32")
    with open_runtime(bundle) as ours, open_runtime(source, backend="torch") as theirs:
        assert ours.max_context == 131072
        near(ours.logits(ids, positions=places), theirs.logits(ids, positions=places))


@pytest.mark.parametrize("dtype", HALF_LOGITS)
def test_sixteen_bit_models_stay_near_and_agree_with_themselves(
    make_bundle: MakeBundle, random_checkpoint: Path, expected: Logits, dtype: str
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", dtype=dtype)
    with open_runtime(bundle, prefill_chunk=50) as runtime:
        whole = runtime.logits(np.array([PROMPT]))[0]
        near(whole, expected, HALF_LOGITS[dtype])
        near(runtime.append(PROMPT, keep=len(PROMPT)), whole, HALF_LOGITS[dtype] / 4)


@pytest.mark.parametrize(
    "options", [{"bits": 4, "method": "rtn"}, {"bits": 8, "dtype": "float32"}], ids=str
)
def test_quantized_models_equal_transformers_with_their_weights(
    tmp_path: Path, make_bundle: MakeBundle, random_checkpoint: Path, options: dict[str, Any]
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", **options)
    source = dequantized_checkpoint(bundle, random_checkpoint, tmp_path / "source")
    with open_runtime(bundle) as ours, open_runtime(source, backend="torch") as theirs:
        found, wanted = ours.logits(np.array([PROMPT])), theirs.logits(np.array([PROMPT]))
        near(found, wanted, HALF_LOGITS.get(ours.dtype, FLOAT32_LOGITS))
        stepped = np.stack([ours.decode(token) for token in PROMPT[:40]])
        near(stepped, found[0, :40], 0.1 if ours.dtype == "bfloat16" else FLOAT32_SELF)


def dequantized_checkpoint(bundle: Path, source: Path, folder: Path) -> Path:
    """A Hugging Face folder with the floats that a bundle's codes stand for."""
    shutil.copytree(source, folder)
    settings = json.loads((bundle / "config.json").read_text("utf-8"))["quantization"]
    tensors: dict[str, Any] = mx.load(str(bundle / "model.safetensors"))
    floats = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        own = settings.get(path, settings)
        if part == "weight" and f"{path}.scales" in tensors:
            scales, biases = tensors[f"{path}.scales"], tensors[f"{path}.biases"]
            tensor = mx.dequantize(tensor, scales, biases, own["group_size"], own["bits"])
        if part not in ("scales", "biases"):
            floats[name] = tensor.astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), floats, {"format": "pt"})
    return folder


def test_the_last_position_of_the_context_is_the_last(runtime: Runtime) -> None:
    runtime.prefill((PROMPT * 5)[:512])
    with pytest.raises(RequestError, match="513 positions are needed, the context has 512"):
        runtime.decode(1)
    runtime.truncate(511)
    assert np.isfinite(runtime.decode(1)).all()


def test_a_refused_call_leaves_the_cache_as_it_was(runtime: Runtime, expected: Logits) -> None:
    runtime.prefill(PROMPT[:10])
    for call in (
        lambda: runtime.prefill([]),
        lambda: runtime.decode(2048),
        lambda: runtime.append([1, 2], keep=3),
        lambda: runtime.truncate(11),
    ):
        with pytest.raises(RequestError):
            call()
    near(runtime.decode(PROMPT[10]), expected[10])


def test_ctrl_c_between_two_layers_leaves_the_cache_as_it_was(
    runtime: Runtime, expected: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.prefill(PROMPT[:10])
    layer: Any = runtime._model.model.layers[1]  # type: ignore[attr-defined]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(layer.mlp), "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runtime.append([7] * 20)
    assert runtime.cached_ids == PROMPT[:10]
    near(runtime.decode(PROMPT[10]), expected[10])


def test_a_cache_beyond_the_memory_is_refused_before_it_is_made(
    runtime: Runtime, expected: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.prefill(PROMPT[:10])
    with monkeypatch.context() as patch:
        patch.setattr("qwen2x.runtimes.mlx_cache.free_bytes", lambda: 1000)
        with pytest.raises(RequestError, match=r"cache for 512 .*0\.00 GB are free") as caught:
            runtime.prefill(PROMPT * 3)
    assert "\n" not in str(caught.value)
    assert runtime.cached_ids == PROMPT[:10]
    near(runtime.decode(PROMPT[10]), expected[10])


def test_a_step_does_not_copy_the_cache(make_bundle: MakeBundle, random_checkpoint: Path) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", dtype="float32")
    with open_runtime(bundle) as runtime:
        runtime.prefill((PROMPT * 2)[:240])
        cache: Any = runtime._buffers  # type: ignore[attr-defined]

        def peak_of(tokens: list[int]) -> int:
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            for token in tokens:
                runtime.decode(token)
            return int(mx.get_peak_memory() - before)

        size = cache.capacity * cache.layout.bytes_per_position
        # Over 256 tokens the cache doubles; its four buffers are copied one after the other.
        assert peak_of(PROMPT[:20]) < 1.6 * size
        assert cache.capacity * cache.layout.bytes_per_position == 2 * size
        # Without growth, scores and logits are all; a copy of a buffer would be half of size.
        assert peak_of((PROMPT * 2)[:236]) < size / 4
        held = list(cache.arrays)
        assert peak_of(PROMPT[:1]) < size / 4
        held = [array[:, :, :1] for array in held]
        mx.eval(held)
        assert peak_of(PROMPT[:1]) > size / 2, "the figures above would not show a copy"


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_the_step_as_a_pure_function_is_the_eager_one(
    make_bundle: MakeBundle,
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    kv_bits: int | None,
) -> None:
    # What is compiled on Metal; the compiler itself is left out, the next test has it.
    monkeypatch.setattr(mx, "compile", lambda function: function)
    bundle = make_bundle(random_checkpoint, target="mlx", dtype="float32")
    tokens = (PROMPT * 3)[:270]
    with open_runtime(bundle, kv_bits=kv_bits) as runtime:
        whole = runtime.logits(np.array([tokens]))[0]
        monkeypatch.setattr(runtime, "_is_compiled", True)
        runtime.prefill(tokens[:200])
        near(np.stack([runtime.decode(token) for token in tokens[200:]]), whole[200:], FLOAT32_SELF)
        runtime.truncate(150)
        near(np.stack([runtime.decode(token) for token in tokens[150:160]]), whole[150:160])
        runtime.reset()
        near(np.stack([runtime.decode(token) for token in tokens[:10]]), whole[:10], FLOAT32_SELF)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
def test_the_compiled_step_is_the_eager_one_and_copies_nothing(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", dtype="float32", num_hidden_layers=1)
    with open_runtime(make_bundle(source, target="mlx", dtype="float32")) as runtime:
        whole = runtime.logits(np.array([PROMPT]))[0]
        monkeypatch.setattr(runtime, "_is_compiled", True)
        near(np.stack([runtime.decode(token) for token in PROMPT[:60]]), whole[:60], FLOAT32_SELF)
        cache: Any = runtime._buffers  # type: ignore[attr-defined]
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        near(np.stack([runtime.decode(token) for token in PROMPT[60:]]), whole[60:], FLOAT32_SELF)
        # There are two buffers.
        size = cache.capacity * cache.layout.bytes_per_position
        assert mx.get_peak_memory() - before < size / 2


def test_facts_are_those_of_the_bundle(make_bundle: MakeBundle, random_checkpoint: Path) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", bits=4, method="rtn")
    with open_runtime(bundle) as runtime:
        assert runtime.backend == "mlx"
        assert runtime.device in ("cpu", "metal", "cuda")
        assert (runtime.vocab_size, runtime.max_context) == (2048, 512)
        assert runtime.folder == bundle
        assert 4 < runtime.bits_per_weight < 9
        runtime.prefill([1, 2, 3])
    runtime.close()


def test_the_trained_model_is_that_of_transformers(
    make_bundle: MakeBundle, example_torch: Runtime
) -> None:
    with open_runtime(make_bundle(EXAMPLE, target="mlx", dtype="float32")) as runtime:
        ids = np.array([PROMPT])
        near(runtime.logits(ids), example_torch.logits(ids))
