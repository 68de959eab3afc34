"""Folders that mlx-lm made, opened as bundles. mlx-lm itself says what they must compute."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from qwen2x.exporters.bundle import Bundle, is_bundle, open_bundle
from qwen2x.exporters.exporter import export
from qwen2x.exporters.rope import read_rope
from qwen2x.quantize.errors import BackendError, BundleError, ConfigError, InputError
from qwen2x.runtimes.runtime import open_runtime
from tests.exporters.judge import judge_logits, load_judge
from tests.exporters.refusal import listing, refused_export
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None or importlib.util.find_spec("mlx") is None,
    reason="mlx-lm is not installed",
)

# Two float32 implementations over two layers: sums in other orders, logits of size 5.
LOGITS = 1e-4
# Against transformers in float32: 8 bits of activations, and of weights.
BFLOAT16_LOGITS = 0.4
INT8_LOGITS = 0.2
PROMPT = np.random.default_rng(5).integers(0, 2016, (1, 30))
# One process of mlx-lm converts, and runs what it has made.
CONVERT = """
import json, sys
import mlx.core as mx, numpy as np
from mlx_lm import convert, load
request = json.load(sys.stdin)
for name, (source, options) in request["cases"].items():
    folder = f"{request['out']}/{name}"
    convert(source, folder, **options)
    model, _ = load(folder)
    logits = model(mx.array(request["prompt"]))
    np.save(f"{folder}.npy", np.array(logits[0].astype(mx.float32)))
"""
UNTIED = {"is_tied": False}
# With groups of 128, mlx-lm leaves matrices of 192 columns as they are, and does not say so.
NARROW = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
THETA = {"rope_theta": 500000.0, "rope_type": "default"}
V5 = {"rope_theta": None, "torch_dtype": None, "rope_parameters": THETA}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "q4-g32": ({}, {"q_bits": 4, "q_group_size": 32}),
    "q4-untied": (UNTIED, {"q_bits": 4}),
    "q8-g128": (UNTIED, {"q_bits": 8, "q_group_size": 128}),
    "q2": ({}, {"q_bits": 2}),
    "q3": ({}, {"q_bits": 3}),
    "q5": ({}, {"q_bits": 5}),
    "q6": ({}, {"q_bits": 6}),
    "mixed_4_6": (UNTIED, {"quant_predicate": "mixed_4_6"}),
    "mixed_2_6-g32": ({}, {"quant_predicate": "mixed_2_6", "q_group_size": 32}),
    "narrow": (NARROW, {"q_bits": 4, "q_group_size": 128}),
    "mxfp4": ({}, {"q_mode": "mxfp4"}),
    "nvfp4": ({}, {"q_mode": "nvfp4"}),
    "float": ({}, {}),
    "bfloat16": ({"dtype": "bfloat16"} | UNTIED, {}),
    "rope_parameters": (V5, {"q_bits": 8}),
}
AFFINE = [name for name in CASES if "fp4" not in name]
SCHEMES = {
    "q4-g32": "int4-g32", "q4-untied": "int4-g64", "q8-g128": "int8-g128", "q2": "int2-g64",
    "q3": "int3-g64", "q5": "int5-g64", "q6": "int6-g64", "mixed_4_6": "int4-g64",
    "mixed_2_6-g32": "int2-g32", "narrow": "int4-g128", "float": "float", "bfloat16": "float",
    "rope_parameters": "int8-g64",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what mlx-lm made of each case, its logits, the source; not to be changed."""
    root = tmp_path_factory.mktemp("mlx-lm")
    cases = {}
    for name, (changes, options) in CASES.items():
        source = write_tiny_checkpoint(root / f"{name}-source", **{"dtype": "float32"} | changes)
        cases[name] = (str(source), {"quantize": bool(options)} | options)
    request = {"cases": cases, "prompt": PROMPT.tolist(), "out": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", CONVERT],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """Of a quantized one, to be changed."""
    return shutil.copytree(made / "q4-untied", tmp_path / "copy")


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return content


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys; None removes one."""
    config = config_of(folder) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def logits_of(folder: Path) -> NDArray[np.float32]:
    with open_runtime(folder, device="cpu") as runtime:
        return runtime.logits(PROMPT)[0]


def refusal_of(folder: Path, kind: type[InputError]) -> str:
    """The one line that opening says."""
    assert is_bundle(folder)
    with pytest.raises(kind) as caught:
        open_bundle(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_cases_are_as_mlx_lm_makes_them_today(made: Path) -> None:
    # What makes these folders hard to open: groups that are null, and floats that go unsaid.
    assert config_of(made / "mixed_4_6")["quantization"]["lm_head"]["group_size"] is None
    narrow = load_file(made / "narrow" / "model.safetensors")
    assert "model.embed_tokens.scales" not in narrow
    assert "model.layers.0.mlp.down_proj.scales" in narrow
    assert config_of(made / "narrow")["quantization"].keys() == {"group_size", "bits", "mode"}


@pytest.mark.parametrize("name", [name for name in AFFINE if name != "rope_parameters"])
def test_our_runtime_computes_what_mlx_lm_does_of_its_own_folder(name: str, made: Path) -> None:
    found, expected = logits_of(made / name), np.load(made / f"{name}.npy")
    if name == "bfloat16":
        # mlx-lm computes attention in 16 bits; the floats themselves are the source's.
        expected = judge_logits(load_judge(made / f"{name}-source"), PROMPT)[0]
        assert np.abs(found - expected).max() < BFLOAT16_LOGITS
        return
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)


def test_rope_parameters_of_transformers_5_are_followed(made: Path, tmp_path: Path) -> None:
    folder, source = made / "rope_parameters", made / "rope_parameters-source"
    config = open_bundle(folder).model_config
    assert config.rope.theta == 500000
    assert config.rope == read_rope(config_of(source), 32)
    # mlx-lm took its own default, which shows in the logits.
    ours, mlx_lm = logits_of(folder), np.load(made / "rope_parameters.npy")
    theirs = judge_logits(load_judge(source), PROMPT)[0]
    rounding = np.abs(ours - theirs).max()
    assert rounding < INT8_LOGITS
    assert np.abs(mlx_lm - theirs).max() > 5 * rounding


@pytest.mark.parametrize("name", AFFINE)
def test_the_manifest_says_what_is_found(name: str, made: Path) -> None:
    folder = made / name
    bundle = open_bundle(folder)
    tensors = load_file(folder / "model.safetensors")
    assert not bundle.is_ours
    assert (bundle.target, bundle.device, bundle.folder) == ("mlx", "any", folder)
    assert bundle.scheme == SCHEMES[name]
    assert bundle.dtype == ("bfloat16" if name == "bfloat16" else "float32")
    assert bundle.weight_bytes == sum(values.nbytes for values in tensors.values())
    parts = bundle.manifest["by_kind"]
    assert sum(part["bytes"] for part in parts.values()) == bundle.weight_bytes
    assert sum(part["parameters"] for part in parts.values()) == bundle.manifest["parameters"]
    vectors = [values for values in tensors.values() if values.ndim == 1]
    matrix_bytes = bundle.weight_bytes - sum(values.nbytes for values in vectors)
    count = bundle.manifest["parameters"] - sum(values.size for values in vectors)
    assert bundle.bits_per_weight == pytest.approx(8 * matrix_bytes / count, abs=1e-4)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {key: entry["bytes"] for key, entry in bundle.manifest["files"].items()} == sizes
    # The example's generation config.
    assert set(bundle.eos_token_ids) == {2013, 2015}
    assert bundle.max_context == 512
    assert bundle.model_config.is_tied == ("lm_head.weight" not in tensors)


def test_what_was_left_as_floats_is_told(made: Path) -> None:
    settings = open_bundle(made / "narrow").quantization
    assert settings is not None
    assert settings["model.layers.0.self_attn.q_proj"] is False
    assert settings["model.embed_tokens"] is False
    assert "model.layers.0.mlp.down_proj" not in settings
    mixed = open_bundle(made / "mixed_4_6").quantization
    assert mixed == config_of(made / "mixed_4_6")["quantization"]


@pytest.mark.parametrize("name", ["q4-g32", "q4-untied"])
def test_a_head_that_the_config_does_not_speak_of_is_the_one_that_is_there(
    name: str, made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made / name, tmp_path / "copy")
    change_config(folder, tie_word_embeddings=None)
    assert open_bundle(folder).model_config.is_tied == (name == "q4-g32")
    np.testing.assert_array_equal(logits_of(folder), logits_of(made / name))


def test_a_folder_of_links_as_in_a_hub_cache_is_opened(made: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    shutil.copytree(made / "mixed_4_6", blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        blob = path.rename(path.with_name(f"blob-{path.name}"))
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    bundle = open_bundle(snapshot)
    assert bundle.manifest["source"]["id"] == "0123abc"
    assert bundle.manifest["files"] == open_bundle(made / "mixed_4_6").manifest["files"]
    np.testing.assert_array_equal(logits_of(snapshot), logits_of(made / "mixed_4_6"))


def test_shards_are_one_model(made: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:20], names[20:]), 1):
        shard = {name: tensors[name] for name in part}
        file = copy / f"model-{number:05}-of-00002.safetensors"
        save_file(shard, file, metadata={"format": "mlx"})
    one = open_bundle(made / "q4-untied")
    assert open_bundle(copy).weight_bytes == one.weight_bytes
    np.testing.assert_array_equal(logits_of(copy), logits_of(made / "q4-untied"))


def test_the_folder_in_which_one_stands_has_a_name(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    assert open_bundle(Path()).manifest["source"]["id"] == "copy"


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_modes_that_we_do_not_run_are_named(name: str, made: Path) -> None:
    said = refusal_of(made / name, BackendError)
    assert said.startswith(f"quantization has the mode '{name}'; expected 'affine'")
    assert "export --to mlx" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 16}, "quantization has 4 bits in groups of 16; expected bits of 2, 3, 4"),
        ({"bits": 7}, "quantization has 7 bits in groups of 64"),
        ({"bits": "4"}, "quantization has '4' bits"),
        ({"bits": None}, "quantization has None bits"),
        ({"bits": [4]}, "quantization has [4] bits"),
        ({"lm_head": {"group_size": 64, "bits": 1}}, "lm_head has 1 bits in groups of 64"),
        ({"lm_head": {"mode": "mxfp8"}}, "lm_head has the mode 'mxfp8'; expected 'affine'"),
    ],
    ids=str,
)
def test_settings_that_mlx_has_no_matmul_for_are_refused(
    settings: dict[str, Any], said: str, copy: Path
) -> None:
    change_config(copy, quantization=config_of(copy)["quantization"] | settings)
    assert refusal_of(copy, BackendError).startswith(said)


def test_true_for_a_module_means_the_settings_for_all(made: Path, copy: Path) -> None:
    settings = config_of(copy)["quantization"]
    change_config(copy, quantization=settings | {"lm_head": True, "model.embed_tokens": True})
    assert open_bundle(copy).quantization == settings
    np.testing.assert_array_equal(logits_of(copy), logits_of(made / "q4-untied"))


def test_settings_that_are_no_object_are_refused(copy: Path) -> None:
    change_config(copy, quantization=[4, 64])
    assert "quantization must be an object, got [4, 64]" in refusal_of(copy, BackendError)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "expected a Qwen2 model (model_type 'qwen2'), got 'llama'"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding window attention"),
    ],
)
def test_what_is_no_qwen2_of_ours_is_refused(
    changes: dict[str, Any], said: str, copy: Path
) -> None:
    change_config(copy, **changes)
    assert said in refusal_of(copy, ConfigError)


def write_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight; expected a whole Qwen2"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight; expected a whole Qwen2"),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.1." in name],
            "lacks model.layers.1.input_layernorm.weight, model.layers.1.self_attn.q_proj.weight, "
            "model.layers.1.self_attn.q_proj.bias and 9 more; expected a whole Qwen2",
        ),
    ],
    ids=["norm", "head", "layer"],
)
def test_a_folder_that_is_not_whole_is_refused_by_name(
    change: Callable[[dict[str, Any]], Any], said: str, copy: Path
) -> None:
    write_tensors(copy, change)
    assert said in refusal_of(copy, BundleError)


def test_tensors_that_affine_quantization_does_not_have_are_refused(copy: Path) -> None:
    write_tensors(copy, lambda t: t.update(more=np.zeros(8, np.uint8)))
    assert "holds tensors of U8; expected F32, F16, BF16, U32" in refusal_of(copy, BackendError)


def test_codes_without_scales_are_refused_when_they_are_loaded(copy: Path) -> None:
    write_tensors(copy, lambda t: t.pop("lm_head.scales"))
    with pytest.raises(BundleError, match=r"surplus: lm_head\.biases; unlike: lm_head\.weight"):
        open_runtime(copy)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_damaged_weights_are_told_as_such(size: int, copy: Path) -> None:
    """A folder with one was taken for a float checkpoint that is "already quantized"."""
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    said = refusal_of(copy, BundleError)
    assert "model.safetensors is not an intact safetensors file" in said
    assert said.endswith("fetch it again")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": '])
def test_a_config_that_cannot_be_read_is_refused(content: str, copy: Path) -> None:
    (copy / "config.json").write_text(content)
    assert "config.json" in refusal_of(copy, ConfigError)
    # Damaged weights beside it are no reason for a traceback either.
    (copy / "model.safetensors").write_bytes(b"")
    assert not is_bundle(copy)


def test_what_mlx_did_not_write_is_no_bundle(made: Path, tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "nowhere")
    source = made / "q4-g32-source"
    assert not is_bundle(source)
    # A key that transformers ignores does not make a float checkpoint one of MLX.
    keyed = shutil.copytree(source, tmp_path / "keyed")
    change_config(keyed, quantization={"group_size": 64, "bits": 4})
    assert not is_bundle(keyed)
    weights = shutil.copytree(made / "q4-g32", tmp_path / "weights")
    (weights / "config.json").unlink()
    assert not is_bundle(weights)


@pytest.mark.parametrize("name", ["q4-untied", "mixed_4_6", "mxfp4"])
@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_a_quantized_folder_is_not_exported_again(
    name: str, target: str, made: Path, tmp_path: Path
) -> None:
    said = refused_export(made / name, tmp_path / "new" / "out", target=target)
    assert said == (
        "the checkpoint is already quantized (by MLX); give the float checkpoint, or one quantized "
        "by gptq or awq"
    )


def test_a_folder_of_floats_is_exported_as_its_source_is(made: Path, tmp_path: Path) -> None:
    ours = export(made / "float-source", out=tmp_path / "ours").bundle
    theirs = export(made / "float", out=tmp_path / "theirs").bundle
    assert (ours / "model.onnx_data").read_bytes() == (theirs / "model.onnx_data").read_bytes()


def test_opening_and_running_leaves_the_folder_as_it_is(made: Path) -> None:
    before = listing(made / "q8-g128")
    logits_of(made / "q8-g128")
    assert isinstance(open_bundle(made / "q8-g128", verify=True), Bundle)
    assert listing(made / "q8-g128") == before
