"""Prompts by products of int8. The judge is the float graph of the same rounded weights."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file

from qwen2x.exporters.bundle import PREFILL_FILE, open_bundle
from qwen2x.exporters.exporter import export
from qwen2x.quantize.errors import BackendError, BundleError, SchemeError
from qwen2x.quantize.groups import dequantize, quantize
from qwen2x.quantize.rows import quantize_rows
from qwen2x.quantize.scheme import Scheme
from qwen2x.runtimes import onnx_runtime
from qwen2x.runtimes.footprint import footprint_of
from qwen2x.runtimes.onnx_prefill import LEAST_ROWS
from qwen2x.runtimes.onnx_provider import sums_are_exact
from qwen2x.runtimes.profile import RecordsRuns
from qwen2x.runtimes.runtime import ReadsPromptsInInt8, Runtime, open_runtime
from qwen2x.runtimes.tolerance import tolerance_for
from qwen2x.runtimes.validate import validate
from tests.packed_checkpoint import write_packed_checkpoint
from tests.runtimes.conftest import MakeBundle
from tests.runtimes.test_onnx_runtime import rewrite_manifest

PROMPT = np.random.default_rng(3).integers(0, 2016, 120).tolist()
# Two parts of 8 bits leave some 1 / 32,000 of a row's largest number; four layers add up.
TWO_PARTS = 2e-3
# One part leaves 1 / 250.
ONE_PART = 0.2
# A graph read in other pieces sums in other orders.
OTHER_ORDER = 1e-4


def rounded_rows(source: Path, folder: Path) -> Path:
    """A checkpoint whose layers' matrices are what int8 with a scale for each row makes of them."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("proj.weight"):
            codes, scales = quantize_rows(values)
            tensors[name] = codes * scales[:, None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bundle(make_bundle: MakeBundle, random_checkpoint: Path) -> Path:
    return make_bundle(random_checkpoint, prefill_int8=True)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Runtime]:
    with open_runtime(bundle, threads=1) as runtime:
        yield runtime


@pytest.fixture
def runtime(opened: Runtime) -> Runtime:
    opened.reset()
    return opened


@pytest.fixture(scope="module")
def expected(
    make_bundle: MakeBundle, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Keys and values of the prompt through the float graph of rounded weights."""
    source = rounded_rows(random_checkpoint, tmp_path_factory.mktemp("rows") / "source")
    with open_runtime(make_bundle(source), threads=1) as runtime:
        runtime.prefill(PROMPT)
        return {part: np.copy(rows) for part, rows in runtime.export_cache(len(PROMPT)).items()}


def cache_of(runtime: Any, length: int) -> dict[str, Any]:
    return {part: np.copy(rows) for part, rows in runtime.export_cache(length).items()}


def largest_difference(some: dict[str, Any], others: dict[str, Any]) -> float:
    assert some.keys() == others.keys()
    return max(float(np.abs(some[part] - others[part]).max()) for part in some)


def test_cache_is_that_of_the_rounded_weights(runtime: Runtime, expected: dict[str, Any]) -> None:
    runtime.prefill(PROMPT)
    # The last token is the other graph's, whose weights are not rounded.
    length = len(PROMPT) - 1
    wanted = {part: rows[:, :length] for part, rows in expected.items()}
    assert largest_difference(cache_of(runtime, length), wanted) < TWO_PARTS


def test_matrices_of_4_bits_take_activations_in_one_part_but_down_proj(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    folder = make_bundle(random_checkpoint, bits=4, method="rtn", prefill_int8=True)
    nodes = onnx.load_model(folder / PREFILL_FILE, load_external_data=False).graph.node
    places = Counter(
        node.name.split("/")[-3] for node in nodes if node.op_type == "MatMulIntegerToFloat"
    )
    # Two layers, of the last of which nothing but keys and values; qkv_proj has 8 bits.
    assert places == {"qkv_proj": 4, "o_proj": 1, "gate_proj": 1, "up_proj": 1, "down_proj": 2}


def test_one_part_is_near_the_rounded_weights_too(
    make_bundle: MakeBundle, random_checkpoint: Path, tmp_path: Path
) -> None:
    source = rounded_rows(random_checkpoint, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    table = quantize(tensors["model.embed_tokens.weight"], Scheme(bits=8, group_size=32))
    tensors["model.embed_tokens.weight"] = dequantize(table)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    caches = []
    for folder in (
        make_bundle(source),
        make_bundle(random_checkpoint, bits=4, method="rtn", prefill_int8=True),
    ):
        with open_runtime(folder, threads=1) as runtime:
            runtime.prefill(PROMPT)
            caches.append(cache_of(runtime, len(PROMPT) - 1))
    assert TWO_PARTS < largest_difference(*caches) < ONE_PART


def test_it_is_not_the_other_graph(
    runtime: Runtime, make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    runtime.prefill(PROMPT)
    with open_runtime(make_bundle(random_checkpoint), threads=1) as plain:
        plain.prefill(PROMPT)
        difference = largest_difference(
            cache_of(runtime, len(PROMPT)), cache_of(plain, len(PROMPT))
        )
    assert difference > 10 * OTHER_ORDER


def test_short_prompts_and_several_rows_of_logits_use_the_other_graph(
    runtime: Runtime, make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    with open_runtime(make_bundle(random_checkpoint), threads=1) as plain:
        short = PROMPT[:LEAST_ROWS]
        assert np.array_equal(runtime.prefill(short), plain.prefill(short))
        more = PROMPT[LEAST_ROWS : LEAST_ROWS + 40]
        assert np.array_equal(runtime.append(more, keep=40), plain.append(more, keep=40))


def test_logits_after_a_prompt_are_near_those_of_transformers(
    runtime: Runtime, random_torch: Runtime
) -> None:
    expected = random_torch.logits(np.array([[*PROMPT, 5]]))[0]
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(runtime.prefill(PROMPT), expected[-2], atol=scale / 50, rtol=0)
    np.testing.assert_allclose(runtime.decode(5), expected[-1], atol=scale / 50, rtol=0)


def test_rows_do_not_depend_on_those_behind_them(bundle: Path, runtime: Runtime) -> None:
    """Of a prompt in pieces, only the very last token is the other graph's."""
    runtime.prefill(PROMPT)
    length = len(PROMPT) - 1
    with open_runtime(bundle, threads=1, prefill_chunk=40) as in_pieces:
        in_pieces.prefill(PROMPT)
        difference = largest_difference(cache_of(in_pieces, length), cache_of(runtime, length))
    assert difference < OTHER_ORDER


def test_attention_behind_many_positions_or_scores_is_in_tiles(
    bundle: Path, runtime: Runtime, tmp_path: Path
) -> None:
    length = len(PROMPT) - 1
    runtime.prefill(PROMPT)
    assert ways_of_attention(bundle) == {"whole"}
    for name in ("longest", "most"):
        folder = Path(shutil.copytree(bundle, tmp_path / name))
        lower_limit(folder / PREFILL_FILE, f"/short/{name}")
        rewrite_manifest(folder)
        assert ways_of_attention(folder) == {"tiles"}
        with open_runtime(folder, threads=1) as in_tiles:
            in_tiles.prefill(PROMPT)
            difference = largest_difference(cache_of(in_tiles, length), cache_of(runtime, length))
        # Another order moves codes of 8 bits.
        assert 0 < difference < TWO_PARTS


def lower_limit(graph: Path, name: str) -> None:
    model = onnx.load_model(graph, load_external_data=False)
    limit = next(each for each in model.graph.initializer if each.name == name)
    values = onnx.numpy_helper.to_array(limit)
    limit.CopyFrom(onnx.numpy_helper.from_array(np.full_like(values, len(PROMPT) - 2), name))
    onnx.save_model(model, graph)


def ways_of_attention(folder: Path) -> set[str]:
    """The places of the operators that a prompt ran through."""
    with open_runtime(folder, threads=1, record=True) as runtime:
        assert isinstance(runtime, RecordsRuns)
        runtime.prefill(PROMPT)
        runs = runtime.recorded_runs()
    return {
        path.split("/")[-2]
        for path, operator, _ in runs[0].nodes
        if operator == "GroupQueryAttention"
    }


def test_a_prompt_can_be_taken_back(runtime: Runtime) -> None:
    first = runtime.prefill(PROMPT)
    runtime.truncate(60)
    again = runtime.prefill(PROMPT[60:])
    runtime.reset()
    assert np.abs(runtime.prefill(PROMPT) - first).max() == 0
    assert np.abs(again - first).max() < np.abs(first).max() / 50


@pytest.mark.parametrize("options", [{"bits": 4, "method": "rtn"}, {"bits": 8}, {"kv_bits": 8}])
def test_with_quantized_weights_or_cache(
    options: dict[str, Any], make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    both = [
        make_bundle(random_checkpoint, **options, prefill_int8=has_prefill)
        for has_prefill in (True, False)
    ]
    rows = []
    for folder in both:
        with open_runtime(folder, threads=1) as runtime:
            runtime.prefill(PROMPT)
            rows.append(runtime.decode(7))
    assert np.corrcoef(rows[0], rows[1])[0, 1] > 0.97
    assert not np.array_equal(rows[0], rows[1])


def test_each_factor_reads_with_its_own_table(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    options = {"yarn": (1.0, 4.0)}
    rows = []
    for has_prefill in (True, False):
        folder = make_bundle(random_checkpoint, **options, prefill_int8=has_prefill)
        with open_runtime(folder, threads=1) as runtime:
            runtime.use_rope(4.0)
            rows.append(runtime.prefill(PROMPT))
            runtime.reset()
            runtime.use_rope(1.0)
            rows.append(runtime.prefill(PROMPT))
    scaled, plain, others_scaled, _ = rows
    assert np.abs(scaled - others_scaled).max() < np.abs(scaled - plain).max() / 3


def test_validate_judges_what_comes_behind_a_prompt(
    make_bundle: MakeBundle, example_torch: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = example_torch.vocab_size // 3
    ids = np.random.default_rng(1).integers(0, text, 128).tolist()
    with open_runtime(make_bundle(prefill_int8=True), threads=1) as candidate:
        options: dict[str, Any] = {
            "tolerance": tolerance_for("float", "float32"), "tokens": 128, "window": 128,
        }  # fmt: skip
        report = validate(candidate, example_torch, ids, **options)
        found = {check.name: check for check in report.checks}
        assert report.verdict == "pass"
        assert 1e-7 < found["behind_prompt"].value < 0.005
        # Another prompt stands in the cache.
        read = candidate.prefill
        monkeypatch.setattr(candidate, "prefill", lambda prompt: read([0] * len(prompt)))
        report = validate(candidate, example_torch, ids, **options)
        failed = {check.name for check in report.checks if check.verdict == "fail"}
        assert "behind_prompt" in failed


def test_manifest_and_footprint_count_the_copy(bundle: Path) -> None:
    opened = open_bundle(bundle)
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    qkv = hidden * (hidden + 2 * head * config["num_key_value_heads"])
    layer = qkv + hidden * hidden + 3 * hidden * inner
    last = qkv
    weights = (config["num_hidden_layers"] - 1) * layer + last
    assert weights < opened.prefill_bytes < 1.2 * weights
    needs = footprint_of(opened, prompt_tokens=10, new_tokens=10)
    assert needs.weight_bytes == opened.weight_bytes + opened.prefill_bytes


def test_where_sums_overflow_the_other_graph_reads(
    bundle: Path,
    make_bundle: MakeBundle,
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_runtime, "sums_are_exact", lambda: False)
    with open_runtime(bundle, threads=1) as careful:
        assert isinstance(careful, ReadsPromptsInInt8)
        assert not careful.reads_prompts_in_int8
        found = careful.prefill(PROMPT)
    with open_runtime(make_bundle(random_checkpoint), threads=1) as plain:
        assert np.array_equal(found, plain.prefill(PROMPT))


def test_sums_that_overflow_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    overflown = [np.full((32, 32), 32 * 32_767, np.int32)]
    monkeypatch.setattr(ort.InferenceSession, "run", lambda *_: overflown)
    assert not sums_are_exact.__wrapped__()


def test_a_missing_graph_is_told(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    (folder / PREFILL_FILE).unlink()
    with pytest.raises(BundleError, match=PREFILL_FILE):
        open_runtime(folder)


def test_what_onnxruntime_cannot_run_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_runtime(bundle, threads=1) as runtime:
        prompts: Any = runtime._prompts  # type: ignore[attr-defined]
        monkeypatch.setattr(prompts, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("no\nx")))
        with pytest.raises(BundleError, match=f"onnxruntime cannot use .*{PREFILL_FILE}: no$"):
            runtime.prefill(PROMPT)


def test_a_budget_does_not_count_the_copy(random_checkpoint: Path, tmp_path: Path) -> None:
    sizes = []
    for has_prefill in (True, False):
        out = tmp_path / f"out-{has_prefill}"
        options: dict[str, Any] = {"max_bytes": 400_000, "method": "rtn"}
        export(random_checkpoint, out=out, prefill_int8=has_prefill, **options)
        sizes.append((out / "model.onnx_data").stat().st_size)
    assert sizes[0] == sizes[1] < 400_000


@pytest.mark.parametrize("options", [{"target": "mlx"}, {"device": "cuda"}])
def test_other_targets_refuse_it(
    options: dict[str, Any], random_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match="--prefill-int8 is for --to onnx on the CPU"):
        export(random_checkpoint, out=tmp_path / "out", prefill_int8=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    source = write_packed_checkpoint(tmp_path / "source").folder
    with pytest.raises(SchemeError, match="needs float weights, got gptq codes"):
        export(source, out=tmp_path / "out", prefill_int8=True)
    assert not (tmp_path / "out").exists()
