"""Caches and sessions. The judges are transformers, and the graph read whole in one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qwen2x.exporters.bundle import MANIFEST, describe_files, write_manifest
from qwen2x.quantize.errors import BackendError, BundleError, RequestError
from qwen2x.runtimes import onnx_cache
from qwen2x.runtimes.runtime import Logits, Runtime, open_runtime
from tests.runtimes.conftest import MakeBundle

# Against transformers: other orders of summing, over logits of size 5.
FLOAT32_LOGITS = 2e-4
# Between two ways through one float32 graph: rows of a matrix product are summed alike or nearly.
FLOAT32_SELF = 1e-4
# float16 keeps 11 bits; two layers of it, against transformers in float32.
FLOAT16_LOGITS = 0.05
# Layouts of the cache, by the options of the bundle that has them.
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"device": "cpu"},
    "concatenated": {"device": "cuda", "dtype": "float32"},
    "shared float16": {"device": "cuda", "dtype": "float16"},
}
TOLERANCES = {
    "shared": FLOAT32_LOGITS,
    "concatenated": FLOAT32_LOGITS,
    "shared float16": FLOAT16_LOGITS,
}
PROMPT = np.random.default_rng(0).integers(0, 2016, 120).tolist()


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def opened(layout: str, make_bundle: MakeBundle, random_checkpoint: Path) -> Iterator[Runtime]:
    bundle = make_bundle(random_checkpoint, **LAYOUTS[layout])
    with open_runtime(bundle, device="cpu", threads=1, prefill_chunk=32) as runtime:
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


@pytest.fixture
def near(layout: str) -> Any:
    def check(found: Logits, wanted: Logits) -> None:
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=TOLERANCES[layout], rtol=0)

    return check


def test_whole_rows_are_those_of_transformers(
    runtime: Runtime, near: Any, expected: Logits
) -> None:
    near(runtime.logits(np.array([PROMPT]))[0], expected)
    assert runtime.cache_length == 0


def test_token_by_token_equals_the_whole_while_the_cache_grows(
    runtime: Runtime, near: Any, expected: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_cache, "STEP", 16)
    for position, token in enumerate(PROMPT):
        near(runtime.decode(token), expected[position])
        assert runtime.cache_length == position + 1
    if isinstance(cache := runtime._cache, onnx_cache.SharedCache):  # type: ignore[attr-defined]
        assert 120 <= cache.capacity < 160


def test_a_prompt_in_chunks_equals_the_whole(runtime: Runtime, near: Any, expected: Logits) -> None:
    near(runtime.prefill(PROMPT[:100]), expected[99])
    near(runtime.append(PROMPT[100:], keep=20), expected[100:])
    assert runtime.cached_ids == PROMPT


@pytest.mark.parametrize("keep", [1, 2, 31, 32, 33, 65, 120])
def test_append_keeps_the_last_rows_across_chunks(
    runtime: Runtime, near: Any, expected: Logits, keep: int
) -> None:
    rows = runtime.append(PROMPT, keep=keep)
    assert rows.shape == (keep, 2048)
    near(rows, expected[-keep:])


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(
    runtime: Runtime, near: Any, expected: Logits
) -> None:
    runtime.prefill(PROMPT[:70])
    runtime.append([5, 6, 7, 8] * 10)
    for length in (50, 50, 31, 1):
        runtime.truncate(length)
        assert runtime.cached_ids == (PROMPT[:70] + [5, 6, 7, 8] * 10)[:length]
    near(runtime.decode(PROMPT[1]), expected[1])
    near(runtime.append(PROMPT[2:], keep=118), expected[2:])
    runtime.reset()
    assert runtime.cache_length == 0
    near(runtime.prefill(PROMPT[:3]), expected[2])


def test_logits_that_were_given_do_not_change_later(
    runtime: Runtime, near: Any, expected: Logits
) -> None:
    # One fixed output buffer would make all of them the last one's.
    rows = [runtime.prefill(PROMPT[:4]), runtime.decode(PROMPT[4]), runtime.decode(PROMPT[5])]
    near(np.stack(rows), expected[3:6])


def test_rows_of_a_batch_equal_each_row_alone_whatever_the_padding(
    runtime: Runtime, near: Any, expected: Logits
) -> None:
    lengths = [40, 17, 1]
    padded = np.full((3, 40), 2015)
    for row, length in enumerate(lengths):
        padded[row, :length] = PROMPT[:length]
    found = runtime.logits(padded, lengths=lengths)
    for row, length in enumerate(lengths):
        near(found[row, :length], expected[:length])


def test_far_positions_are_those_of_transformers(
    runtime: Runtime, near: Any, random_torch: Runtime
) -> None:
    ids = np.array([PROMPT[:20]])
    end = runtime.max_context
    jump = [*range(8), *range(end - 12, end)]
    found = runtime.logits(ids, positions=jump)
    near(found, random_torch.logits(ids, positions=jump))
    assert np.abs(found - runtime.logits(ids)).max() > 1e-3
    far = range(end - 20, end)
    near(runtime.logits(ids, positions=far), random_torch.logits(ids, positions=far))


def test_the_last_position_of_the_context_is_the_last(runtime: Runtime) -> None:
    runtime.prefill((PROMPT * 5)[:512])
    with pytest.raises(RequestError, match="513 positions are needed, the context has 512"):
        runtime.decode(1)
    assert runtime.cache_length == 512
    runtime.truncate(511)
    assert np.isfinite(runtime.decode(1)).all()


def test_a_refused_call_leaves_the_cache_as_it_was(
    runtime: Runtime, near: Any, expected: Logits
) -> None:
    runtime.prefill(PROMPT[:10])
    for call in (
        lambda: runtime.prefill([]),
        lambda: runtime.decode(2048),
        lambda: runtime.append([1, -1]),
        lambda: runtime.append([1, 2], keep=3),
        lambda: runtime.append([1, 2], keep=0),
        lambda: runtime.prefill([1.0]),  # type: ignore[list-item]
        lambda: runtime.truncate(11),
        lambda: runtime.truncate(-1),
    ):
        with pytest.raises(RequestError):
            call()
    near(runtime.decode(PROMPT[10]), expected[10])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[]], {}, "with tokens, got shape"),
        ([1, 2], {}, "with tokens, got shape"),
        ([[1, 2048]], {}, r"in 0\.\.2047, got 2048"),
        ([[1, -1]], {}, r"in 0\.\.2047, got -1"),
        ([[1, 2]], {"lengths": [3]}, r"lengths in 1\.\.2, one per row"),
        ([[1, 2]], {"lengths": [0]}, r"lengths in 1\.\.2, one per row"),
        ([[1, 2]], {"lengths": [2, 2]}, "expected 1 lengths"),
        ([[1, 2]], {"positions": [3, 3]}, "2 rising positions"),
        ([[1, 2]], {"positions": [3]}, "2 rising positions"),
        ([[1, 2]], {"positions": [-1, 0]}, "shorten the rows"),
        ([[1, 2]], {"positions": [511, 512]}, r"511\.\.512 are needed, the context has 0\.\.511"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    runtime: Runtime, random_torch: Runtime, ids: Any, options: Any, message: str
) -> None:
    for one in (runtime, random_torch):
        with pytest.raises(RequestError, match=message):
            one.logits(np.array(ids, np.int64), **options)


def test_token_ids_of_numpy_are_taken(runtime: Runtime, near: Any, expected: Logits) -> None:
    near(runtime.prefill(np.array(PROMPT[:9])), expected[8])  # type: ignore[arg-type]
    near(runtime.decode(np.int64(PROMPT[9])), expected[9])  # type: ignore[arg-type]
    assert json.dumps(runtime.cached_ids)


def test_past_and_present_are_one_buffer_that_stays_while_it_is_large_enough(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    with open_runtime(make_bundle(random_checkpoint), threads=1) as runtime:
        cache: Any = runtime._cache  # type: ignore[attr-defined]
        runtime.prefill(PROMPT)

        def places() -> list[int]:
            return [buffer.data_ptr() for buffer in cache._buffers.values()]

        before = places()
        for token in PROMPT[:50]:
            runtime.decode(token)
        assert places() == before
        assert len(set(before)) == 4
        # The run wrote its new keys into that very memory, and nothing beyond.
        keys = cache._buffers["1.key"].numpy()
        assert keys[:, :, :170].any(axis=(1, 3)).all()
        assert not keys[:, :, 170:].any()
        outputs = runtime._binding.get_outputs()  # type: ignore[attr-defined]
        assert [value.data_ptr() for value in outputs[1:]] == before
        runtime.truncate(60)
        runtime.decode(1)
        assert places() == before
        runtime.reset()
        assert places() == []


def test_a_grown_cache_does_not_stand_on_freed_memory(
    make_bundle: MakeBundle, random_checkpoint: Path, random_torch: Runtime
) -> None:
    # Until it was fixed, the arrays behind grown buffers were freed: crashes after 256 positions.
    tokens = (PROMPT * 5)[:500]
    with open_runtime(make_bundle(random_checkpoint), threads=1) as runtime:
        runtime.prefill(tokens[:250])
        ballast = []
        rows = []
        for token in tokens[250:]:
            rows.append(runtime.decode(token))
            ballast.append(np.full((1, 2, 512, 32), np.nan, np.float32))
            del ballast[:-8]
        for buffer in runtime._cache._buffers.values():  # type: ignore[attr-defined]
            assert buffer._numpy_obj.ctypes.data == buffer.data_ptr()
    expected = random_torch.logits(np.array([tokens]))[0, 250:]
    np.testing.assert_allclose(np.stack(rows), expected, atol=FLOAT32_LOGITS)


def test_bfloat16_buffers_grow_as_bits_and_are_bound_as_bfloat16() -> None:
    # NumPy has no bfloat16 and ONNX Runtime's CPU provider no kernel for it.
    facts = {"layers": 1, "num_key_value_heads": 2, "head_dim": 4, "dtype": "bfloat16"}
    cache = onnx_cache.SharedCache(facts, "cpu", 600)
    bound: dict[str, Any] = {}

    class Binding:
        def bind_input(self, name: str, *place: Any) -> None:
            bound[name] = place

        bind_output = bind_input

    binding = Binding()
    cache.bind(binding, 0, 3)
    bits = np.arange(1, 25, dtype=np.uint16).reshape(1, 2, 3, 4)
    cache._buffers["0.key"].numpy()[:, :, :3] = bits
    cache.bind(binding, 3, 257)
    assert cache.capacity == 512
    device, _, element_type, shape, address = bound["past_key_values.0.key"]
    assert bound["present.0.key"] == bound["past_key_values.0.key"]
    assert (device, element_type, shape) == ("cpu", 16, [1, 2, 512, 4])
    assert address == cache._buffers["0.key"].data_ptr()
    np.testing.assert_array_equal(cache._buffers["0.key"].numpy()[:, :, :3], bits)
    cache.bind(binding, 512, 513)
    assert cache.capacity == 600


def test_the_cache_goes_to_a_near_end_at_once_and_to_a_far_one_in_steps() -> None:
    facts = {"layers": 1, "num_key_value_heads": 1, "head_dim": 4, "dtype": "float32"}
    near, far = (onnx_cache.SharedCache(facts, "cpu", 20000) for _ in range(2))
    near.expect(4200)
    near.reserve(0, 4096)
    assert near.capacity == 4352
    far.expect(16000)
    far.reserve(0, 4096)
    assert far.capacity == 4096
    far.reserve(4096, 4097)
    assert far.capacity == 4352
    far.reserve(4352, 8192)
    far.reserve(8192, 8193)
    assert far.capacity == 8192 + 512


def test_the_cache_never_grows_beyond_the_context(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    bundle = make_bundle(random_checkpoint, max_context=300)
    with open_runtime(bundle, threads=1) as runtime:
        runtime.prefill((PROMPT * 3)[:299])
        assert runtime._cache.capacity == 300  # type: ignore[attr-defined]
        assert np.isfinite(runtime.decode(1)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bundles_give_nearly_the_same_by_every_way(
    make_bundle: MakeBundle, random_checkpoint: Path, bits: int
) -> None:
    # int8 activations of the CPU's kernels round differently for one row and for many.
    with open_runtime(
        make_bundle(random_checkpoint, bits=bits, method="rtn"), threads=1
    ) as runtime:
        whole = runtime.logits(np.array([PROMPT[:40]]))[0]
        stepped = np.stack([runtime.decode(token) for token in PROMPT[:40]])
    assert np.abs(whole - stepped).mean() < 0.05 * whole.std()


def test_threads_do_not_change_the_answer(
    make_bundle: MakeBundle, random_checkpoint: Path, expected: Logits
) -> None:
    for threads in (1, 2):
        with open_runtime(make_bundle(random_checkpoint), threads=threads) as runtime:
            options = runtime._session.get_session_options()  # type: ignore[attr-defined]
            assert options.intra_op_num_threads == threads
            np.testing.assert_allclose(runtime.prefill(PROMPT), expected[-1], atol=FLOAT32_LOGITS)


def test_facts_are_those_of_the_bundle(make_bundle: MakeBundle, random_checkpoint: Path) -> None:
    bundle = make_bundle(random_checkpoint, bits=4, method="rtn")
    with open_runtime(bundle) as runtime:
        assert (runtime.backend, runtime.device, runtime.dtype) == ("onnx", "cpu", "float32")
        assert (runtime.vocab_size, runtime.max_context) == (2048, 512)
        assert runtime.folder == bundle
        assert 4 < runtime.bits_per_weight < 9
        assert 0 < runtime.weight_bytes < (bundle / "model.onnx_data").stat().st_size * 1.01


def test_a_closed_runtime_may_be_closed_again(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    for options in LAYOUTS.values():
        bundle = make_bundle(random_checkpoint, **options)
        runtime = open_runtime(bundle, device="cpu", threads=1)
        runtime.prefill([1, 2, 3])
        runtime.close()
        runtime.close()


needs_no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="CUDA is here"
)


@needs_no_cuda
def test_a_device_that_is_not_here_is_refused_with_what_to_install(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    with pytest.raises(BackendError, match=r'pip install "qwen2x\[cuda\]"') as caught:
        open_runtime(make_bundle(random_checkpoint), device="cuda")
    assert "\n" not in str(caught.value)


@needs_no_cuda
def test_a_bfloat16_bundle_is_refused_on_the_cpu(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    bundle = make_bundle(random_checkpoint, device="cuda", dtype="bfloat16")
    for device in ("cpu", "auto"):
        with pytest.raises(BackendError, match=r"bfloat16 bundle for cuda.*--device cpu"):
            open_runtime(bundle, device=device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"backend": "tensorflow"}, "backend must be 'onnx', 'mlx' or 'torch', got 'tensorflow'"),
        ({"prefill_chunk": 0}, "prefill_chunk must be 1 or more, got 0"),
        ({"backend": "torch"}, "which torch cannot run; give the checkpoint"),
    ],
)
def test_unknown_choices_are_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, options: Any, message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        open_runtime(make_bundle(random_checkpoint), **options)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match=f"no bundle.*{MANIFEST}"):
            open_runtime(folder)


def test_a_bundle_for_another_target_is_refused(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    with pytest.raises(BackendError, match=r"made for onnx, the backend is mlx; .*--to mlx"):
        open_runtime(make_bundle(random_checkpoint), backend="mlx")


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
def test_a_damaged_graph_is_refused_in_one_line(
    tmp_path: Path, make_bundle: MakeBundle, random_checkpoint: Path, damage: str
) -> None:
    folder = copy_bundle(make_bundle(random_checkpoint), tmp_path)
    whole = (folder / "model.onnx").read_bytes()
    content = {"garbage": b"\x00\xff" * 50, "cut": whole[: len(whole) // 2], "empty": b""}[damage]
    (folder / "model.onnx").write_bytes(content)
    rewrite_manifest(folder)
    with pytest.raises(BundleError, match=r"cannot use .*model\.onnx: .") as caught:
        open_runtime(folder)
    assert "\n" not in str(caught.value)


def test_a_graph_whose_weights_are_cut_short_is_refused(
    tmp_path: Path, make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    folder = copy_bundle(make_bundle(random_checkpoint), tmp_path)
    data = (folder / "model.onnx_data").read_bytes()
    (folder / "model.onnx_data").write_bytes(data[:5000])
    rewrite_manifest(folder)
    with pytest.raises(BundleError, match="cannot use"):
        open_runtime(folder)


def copy_bundle(bundle: Path, into: Path) -> Path:
    return Path(shutil.copytree(bundle, into / "copy"))


def rewrite_manifest(folder: Path) -> None:
    """As if the files had been written so in the first place."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).unlink()
    manifest["files"] = describe_files(folder)
    write_manifest(folder, manifest)
