"""``validate`` with several bundles, with a bundle as the judge, and layer by layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen2x.exporters.exporter import export
from tests.cli.conftest import Call
from tests.exporters.refusal import listing
from tests.tiny_checkpoint import write_tiny_checkpoint, write_weights

pytest.importorskip("mlx.core", reason="mlx is not installed")

FEW = ("--tokens", "64", "--window", "32")
# Of the residual stream of a float32 model, see runtimes/tolerance.py.
FLOAT32_LAYER = 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def mlx_float(root: Path, example: Path) -> Path:
    """Of the example in float32, with a graph; not to be changed."""
    return export(example, "mlx", out=root / "mlx-float", dtype="float32", graph=True).bundle


@pytest.fixture(scope="module")
def mlx_int4(root: Path, example: Path) -> Path:
    """Of the example; not to be changed."""
    return export(
        example, "mlx", out=root / "mlx-int4", bits=4, method="rtn", dtype="float32"
    ).bundle


@pytest.fixture(scope="module")
def source(root: Path) -> Path:
    """A random checkpoint of three layers."""
    return write_tiny_checkpoint(root / "source", dtype="float32", num_hidden_layers=3)


@pytest.fixture(scope="module")
def tampered(root: Path, source: Path) -> Path:
    """The same, but for one matrix of layer 1."""
    copy = shutil.copytree(source, root / "tampered")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= np.float32(1.3)
    write_weights(copy, tensors)
    return copy


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in report["checks"]}


# Another bundle as the judge


def test_the_same_integers_on_onnx_and_mlx_are_one_model(
    call: Call, int4_bundle: Path, mlx_int4: Path
) -> None:
    before = listing(mlx_int4)
    for one, other in ((int4_bundle, mlx_int4), (mlx_int4, int4_bundle)):
        report = call("validate", one, "--against", other, *FEW, "--json").json
        assert report["verdict"] == "pass"
        backend = "mlx" if other == mlx_int4 else "onnx"
        assert report["reference"] == {"name": str(other), "backend": backend}
        # Far nearer than int4 is to the floats.
        assert report["kl_mean"] < report["tolerance"]["kl_mean"] == 0.03
    assert listing(mlx_int4) == before, "figures against a bundle are not recorded"


def test_a_bundle_equals_itself(call: Call, mlx_int4: Path) -> None:
    report = call("validate", mlx_int4, "--against", mlx_int4, *FEW, "--layers", "--json").json
    assert report["max_abs_diff"] == report["kl_max"] == 0
    assert report["top1_agreement"] == report["top10_overlap"] == 1
    assert [layer["relative_error"] for layer in report["layers"]] == [0] * 7
    assert report["next_tokens"] == report["reference_next_tokens"]


def test_floats_of_two_targets_are_one_model_and_int4_is_as_far_as_it_may_be(
    call: Call, float_bundle: Path, mlx_float: Path, mlx_int4: Path
) -> None:
    exact = call("validate", mlx_float, "--against", float_bundle, *FEW, "--json").json
    assert exact["verdict"] == "pass"
    assert exact["max_abs_diff"] < 1e-3
    rounded = call("validate", mlx_int4, "--against", float_bundle, *FEW, "--json").json
    assert rounded["verdict"] == "pass"
    assert rounded["kl_mean"] > 100 * exact["kl_mean"]
    assert rounded["tolerance"]["kl_mean"] > 0.24
    shown = call("validate", mlx_int4, "--against", float_bundle, *FEW)
    assert f"{float_bundle} {rounded['perplexity_reference']:.4f}" in shown.out
    assert "PyTorch" not in shown.out


def test_a_bundle_of_another_checkpoint_fails(
    call: Call, source: Path, tampered: Path, tmp_path: Path
) -> None:
    one = export(source, out=tmp_path / "one").bundle
    other = export(tampered, "mlx", out=tmp_path / "other").bundle
    done = call("validate", one, "--against", other, *FEW, "--json")
    assert done.code == 1
    assert verdicts(done.json)["source_is_the_same"] == "fail"
    assert f"{other} is not the checkpoint that {one} was made of" in done.err
    assert "model.safetensors differ" in done.err
    assert call("validate", one, "--against", other, *FEW).code == 1


def test_what_cannot_judge_is_one_line(
    call: Call, int4_bundle: Path, source: Path, tmp_path: Path, float_bundle: Path
) -> None:
    def complaint(*args: object) -> str:
        return call("validate", *args, *FEW).complaint

    said = complaint(int4_bundle, "--against", float_bundle, "--revision", "main")
    assert "is a bundle, which has no revisions" in said
    broken = shutil.copytree(float_bundle, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"")
    assert "has 0 bytes" in complaint(int4_bundle, "--against", broken)
    larger = write_tiny_checkpoint(tmp_path / "larger", vocab_size=2304)
    judge = export(larger, out=tmp_path / "judge").bundle
    assert "2304" in complaint(int4_bundle, "--against", judge)
    assert "./nowhere" in complaint(int4_bundle, "--against", "./nowhere")


# Side by side


def test_bundles_of_two_targets_stand_side_by_side(
    call: Call, example: Path, float_bundle: Path, mlx_int4: Path, mlx_float: Path
) -> None:
    bundles = [float_bundle, mlx_int4, mlx_float]
    done = call("validate", *bundles, "--against", example, *FEW)
    assert done.code == 0
    header, *rows = done.out.splitlines()
    assert header.split() == ["PyTorch", *map(str, bundles)]
    table = {row[2:20].strip(): row[20:].split() for row in rows}
    assert table["runs on"] == ["onnx", "cpu", "mlx", "cpu", "mlx", "cpu"]
    assert table["scheme"] == ["float", "float32", "int4-g32", "float32", "float", "float32"]
    assert table["verdict"] == ["pass"] * 3
    assert len(table["perplexity"]) == 4
    # Two floats write the same; the first column is PyTorch's.
    first = next(row for row in rows if "next token, 1" in row)
    assert first.count(first[20:].split()[0]) >= 3
    for bundle in bundles:
        assert f"{bundle}:" in done.err


def test_side_by_side_as_json_is_one_object_per_bundle(
    call: Call, example: Path, float_bundle: Path, mlx_int4: Path
) -> None:
    done = call("validate", float_bundle, mlx_int4, "--against", example, *FEW, "--json")
    assert done.err == ""
    assert done.json["verdict"] == "pass"
    assert done.json["peak_memory_bytes"] > 10e6
    one, other = done.json["bundles"]
    assert (one["bundle"], other["bundle"]) == (str(float_bundle), str(mlx_int4))
    assert (one["backend"], other["backend"]) == ("onnx", "mlx")
    assert one["perplexity_reference"] == other["perplexity_reference"]
    assert len(one["next_tokens"]) == 5
    assert not {"layers", "first_layer_beyond"} & one.keys()
    logits = [entry["logit"] for entry in one["next_tokens"]]
    assert logits == sorted(logits, reverse=True)
    alone = call("validate", mlx_int4, "--against", example, *FEW, "--json").json
    assert {key: other[key] for key in alone if key != "peak_memory_bytes"} == {
        key: value for key, value in alone.items() if key != "peak_memory_bytes"
    }
    # The figures of each are recorded in it.
    for report, bundle in ((one, float_bundle), (other, mlx_int4)):
        quality = json.loads((bundle / "qwen2x.json").read_text())["quality"]
        assert quality["kl_mean"] == report["kl_mean"]


def test_one_that_fails_fails_all(call: Call, source: Path, tampered: Path, tmp_path: Path) -> None:
    good = export(source, "mlx", out=tmp_path / "good").bundle
    bad = export(tampered, out=tmp_path / "bad").bundle
    done = call("validate", good, bad, "--against", source, *FEW, "--json")
    assert done.code == 1
    assert done.json["verdict"] == "fail"
    assert [part["verdict"] for part in done.json["bundles"]] == ["pass", "fail"]


def test_a_bundle_that_is_none_is_told_before_the_others_are_run(
    call: Call, example: Path, float_bundle: Path, tmp_path: Path
) -> None:
    done = call("validate", float_bundle, tmp_path, "--against", example, *FEW)
    assert "is no bundle" in done.complaint
    assert "checking" not in done.err


def test_a_page_shows_several_bundles_and_those_that_lie_beside_them(
    call: Call, example: Path, float_bundle: Path, mlx_int4: Path, tmp_path: Path
) -> None:
    names = ("float-a", "mlx-b", "beside-c", "other-text-d", "damaged-e")
    folders = [
        shutil.copytree(original, tmp_path / name)
        for original, name in zip([float_bundle, *[mlx_int4] * 4], names, strict=True)
    ]
    one, two, beside, other, damaged = folders
    assert call("validate", beside, "--against", example, *FEW).code == 0
    assert call("validate", other, "--against", example, "--tokens", "96").code == 0
    (damaged / "qwen2x.json").write_text("[")
    page = tmp_path / "page.html"
    assert call("validate", one, two, "--against", example, *FEW, "--html", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert "2 bundles against tiny-qwen2" in text
    for name in names[:3]:
        assert name in text
    for name in names[3:]:
        assert name not in text
    assert text.count('id="along') == 4, "title and description of two plots"
    assert text.count('id="layers') == 4
    assert "mlx cpu" in text


def test_a_page_has_no_layers_where_a_graph_shows_none(
    call: Call, example: Path, mlx_float: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    args = ("validate", mlx_float, "--against", example, *FEW, "--graph", "--html", page)
    assert call(*args).code == 0
    text = page.read_text(encoding="utf-8")
    assert 'id="along0-title"' in text
    assert 'id="layers' not in text


# Layer by layer


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_the_first_layer_beyond_is_the_one_that_was_changed(
    target: str, call: Call, source: Path, tampered: Path, tmp_path: Path
) -> None:
    bundle = export(tampered, target, out=tmp_path / "tampered").bundle
    good = export(source, target, out=tmp_path / "good").bundle
    for judge in (source, good):
        args = ("validate", bundle, "--against", judge, *FEW, "--layers")
        done = call(*args, "--json")
        assert done.code == 1
        layers = {layer["layer"]: layer for layer in done.json["layers"]}
        assert list(layers) == ["embed_tokens", "layers.0", "layers.1", "layers.2"]
        assert done.json["first_layer_beyond"] == "layers.1"
        assert layers["layers.0"]["relative_error"] < FLOAT32_LAYER
        assert layers["layers.1"]["relative_error"] > 100 * FLOAT32_LAYER
        assert layers["layers.1"]["cosine"] < 1
        assert layers["layers.1"]["worst"] >= layers["layers.1"]["relative_error"]
        shown = call(*args)
        assert f"{bundle}: first beyond {FLOAT32_LAYER:g} is layers.1" in shown.out
        assert "checking layers" in shown.err


def test_layers_of_several_and_what_failed_stand_below_the_figures(
    call: Call, source: Path, tampered: Path, tmp_path: Path
) -> None:
    good = export(source, "mlx", out=tmp_path / "good").bundle
    bad = export(tampered, out=tmp_path / "bad").bundle
    done = call("validate", good, bad, "--against", source, *FEW, "--layers")
    assert done.code == 1
    failures = [line for line in done.out.splitlines() if line.startswith("  fail  ")]
    assert any(f"{bad}: kl_mean is " in line for line in failures)
    assert not any(f"{good}:" in line for line in failures)
    rows = done.out.partition("relative error of hidden states")[2].splitlines()[1:]
    assert rows[0].split() == [str(good), str(bad)]
    assert [row.split()[0] for row in rows[1:5]] == [
        "embed_tokens", "layers.0", "layers.1", "layers.2"
    ]  # fmt: skip
    assert all(len(row.split()) == 3 for row in rows[1:5])
    assert rows[5:] == [
        f"  {good}: all within 0.0001",
        f"  {bad}: first beyond 0.0001 is layers.1",
    ]


def test_layers_within_their_limit_have_no_first_beyond(
    call: Call, example: Path, int4_bundle: Path, mlx_int4: Path
) -> None:
    args = ("validate", int4_bundle, mlx_int4, "--against", example, *FEW, "--layers", "--json")
    for report in call(*args).json["bundles"]:
        assert report["first_layer_beyond"] is None
        assert len(report["layers"]) == 7
        assert max(layer["relative_error"] for layer in report["layers"]) > 0.01


# The graph and the 8-bit cache


def test_the_graph_is_judged_like_the_modules(call: Call, source: Path, tmp_path: Path) -> None:
    bundle = export(source, "mlx", out=tmp_path / "bundle", graph=True).bundle
    args = ("validate", bundle, "--against", source, *FEW, "--json")
    graph, eager = call(*args, "--graph").json, call(*args).json
    assert graph["verdict"] == "pass"
    assert verdicts(graph) == verdicts(eager)
    assert graph["perplexity"] == pytest.approx(eager["perplexity"], rel=1e-5)


def test_a_graph_shows_no_layers_and_an_onnx_bundle_has_none_to_ask_for(
    call: Call, example: Path, mlx_float: Path, float_bundle: Path
) -> None:
    done = call("validate", mlx_float, "--against", example, *FEW, "--graph", "--layers")
    assert "shows no layers; leave out --graph or --layers" in done.complaint
    assert "checking" not in done.err
    said = call("validate", float_bundle, "--against", example, *FEW, "--graph").complaint
    assert "leave out --graph" in said


def test_an_8_bit_cache_is_judged_with_mlx_and_does_not_replace_the_bundles_figures(
    call: Call, example: Path, mlx_int4: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(mlx_int4, tmp_path / "bundle")
    plain = call("validate", bundle, "--against", example, *FEW, "--json").json
    before = listing(bundle)
    args = ("validate", bundle, "--against", example, *FEW, "--kv-bits", "8", "--json")
    report = call(*args).json
    assert report["verdict"] == "pass"
    assert report["kv_bits"] == 8
    assert "kv_bits" not in plain
    assert report["kl_mean"] != plain["kl_mean"]
    assert listing(bundle) == before


def test_an_8_bit_cache_is_refused_with_onnx_and_with_a_graph(
    call: Call, example: Path, float_bundle: Path, mlx_float: Path
) -> None:
    options = ("--against", example, *FEW, "--kv-bits", "8")
    said = call("validate", float_bundle, *options).complaint
    assert "export it again with --kv-bits 8" in said
    said = call("validate", mlx_float, *options, "--graph").complaint
    assert "not for a graph" in said
    assert "--kv-bits" in call("validate", mlx_float, *options[:-1], "4").complaint
