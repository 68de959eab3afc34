"""MLX folders through every command, ours and those of mlx-lm."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.exporter import export
from tests.cli.conftest import Call
from tests.cli.test_doctor import run_without
from tests.exporters.refusal import listing

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

needs_mlx_lm = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed"
)
is_cpu = mx.default_device().type == mx.cpu
needs_cpu = pytest.mark.skipif(not is_cpu, reason="MLX has a GPU here")

GREEDY = ("--raw", "--temperature", "0", "--max-tokens", "12", "--json")
PROMPT = "And it came to pass, that the king said unto"
FEW = ("--tokens", "48", "--window", "24")
SHORT = ("--prompt-tokens", "20", "--new-tokens", "4", "--repeat", "1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlx")


@pytest.fixture(scope="module")
def bundle(root: Path, example: Path) -> Path:
    """Of the example in float32, with a graph; not to be changed."""
    return export(example, "mlx", out=root / "float", dtype="float32", graph=True).bundle


@pytest.fixture(scope="module")
def int8(root: Path, example: Path) -> Path:
    """Of the example, without a graph; not to be changed."""
    return export(example, "mlx", out=root / "int8", bits=8, dtype="float32").bundle


@pytest.fixture(scope="module")
def theirs(root: Path, example: Path) -> dict[str, Path]:
    """What mlx-lm makes of the example, and the text with which it goes on; not to be changed."""
    program = (
        "import sys; from mlx_lm import convert\n"
        "convert(sys.argv[1], sys.argv[2] + '/mxfp4', quantize=True, q_mode='mxfp4')\n"
        "convert(sys.argv[1], sys.argv[2] + '/q8', quantize=True, q_bits=8, dtype='float32')\n"
        "convert(sys.argv[1], sys.argv[2] + '/q4', quantize=True, q_bits=4, q_group_size=32,"
        " dtype='float32')\n"
        "convert(sys.argv[1], sys.argv[2] + '/floats', dtype='float32')\n"
    )
    folder = root / "mlx-lm"
    folder.mkdir()
    command = [sys.executable, "-c", program, str(example), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return {path.name: path for path in folder.iterdir()}


def greedy(call: Call, *args: object) -> dict[str, Any]:
    return call("run", args[0], PROMPT, *args[1:], *GREEDY).json


# run


def test_greedy_text_is_that_of_onnx_and_of_the_graph(
    call: Call, bundle: Path, float_bundle: Path, example: Path
) -> None:
    expected = greedy(call, float_bundle)
    assert len(expected["token_ids"]) == 12
    eager, graph = greedy(call, bundle), greedy(call, bundle, "--graph")
    torch = greedy(call, example, "--backend", "torch")
    for answer in (eager, graph, torch):
        assert answer["token_ids"] == expected["token_ids"]
        assert answer["text"] == expected["text"]
    assert (expected["backend"], eager["backend"], graph["backend"]) == ("onnx", "mlx", "mlx")
    assert eager["device"] == graph["device"]
    assert eager["timings"]["decode_tokens_per_s"] > 0


def test_sampled_text_is_that_of_the_graph(call: Call, bundle: Path) -> None:
    options = ("--raw", "--seed", "3", "--max-tokens", "12", "--temperature", "0.9", "--json")
    args = ("run", bundle, PROMPT, *options)
    assert call(*args).json["token_ids"] == call(*args, "--graph").json["token_ids"]


def test_an_8_bit_cache_runs_and_is_refused_with_onnx_and_a_graph(
    call: Call, bundle: Path, float_bundle: Path
) -> None:
    answer = greedy(call, bundle, "--kv-bits", "8")
    assert len(answer["token_ids"]) == 12
    options = ("--kv-bits", "8", "--max-tokens", "1")
    said = call("run", float_bundle, "hi", *options).complaint
    assert "export it again with --kv-bits 8" in said
    assert "not for a graph" in call("run", bundle, "hi", *options, "--graph").complaint


def test_a_checkpoint_is_exported_once_for_mlx_and_used_again(
    call: Call, example: Path, tmp_path: Path
) -> None:
    options = ("--backend", "mlx", "--bits", "8", "--dtype", "float32")
    first = call("run", example, PROMPT, *options, *GREEDY)
    (folder,) = (tmp_path / "cache" / "bundles").iterdir()
    made = open_bundle(folder, verify=True)
    assert (made.target, made.scheme, made.dtype) == ("mlx", "int8-g32", "float32")
    assert f"using {folder}" in first.err
    before = listing(folder)
    second = call("run", example, PROMPT, *options, *GREEDY)
    assert listing(folder) == before
    assert second.json["token_ids"] == first.json["token_ids"]
    assert second.json["backend"] == "mlx"
    # Other options are another bundle.
    greedy(call, example, "--backend", "mlx", "--dtype", "float32")
    assert len(list((tmp_path / "cache" / "bundles").iterdir())) == 2


@pytest.mark.parametrize(
    ("system", "machine", "target"),
    [("darwin", "arm64", "mlx"), ("darwin", "x86_64", "onnx"), ("linux", "x86_64", "onnx")],
)
def test_a_mac_with_apple_silicon_runs_checkpoints_with_mlx(
    system: str,
    machine: str,
    target: str,
    call: Call,
    example: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwen2x.runtimes import runtime

    class System:
        """``sys`` of another platform."""

        platform = system

    monkeypatch.setattr(runtime, "sys", System)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    answer = call("run", example, PROMPT, "--raw", "--max-tokens", "1", "--json").json
    assert answer["backend"] == target
    (folder,) = (tmp_path / "cache" / "bundles").iterdir()
    assert open_bundle(folder).target == target


@needs_cpu
@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_a_device_that_is_not_here_is_one_line(
    device: str, call: Call, bundle: Path, example: Path, tmp_path: Path
) -> None:
    for command in (
        ("run", bundle, "hi"),
        ("chat", bundle),
        ("bench", bundle),
        ("validate", bundle, "--against", example),
        ("run", bundle, "hi", "--graph"),
    ):
        said = call(*command, "--device", device).complaint
        assert f"has no {device} here" in said
        assert said.endswith("or use --device cpu")
    # A checkpoint is not exported first, which may take long.
    said = call("run", example, "hi", "--backend", "mlx", "--device", device).complaint
    assert f"has no {device} here" in said
    assert not (tmp_path / "cache").exists()


def test_metal_is_not_for_onnx(
    call: Call, float_bundle: Path, example: Path, tmp_path: Path
) -> None:
    said = call("run", example, "hi", "--backend", "onnx", "--device", "metal").complaint
    assert "onnxruntime has no device metal; use --backend mlx, or --device cpu" in said
    assert "metal" in call("run", float_bundle, "hi", "--device", "metal").complaint
    assert not (tmp_path / "cache").exists()


def test_what_only_a_bundle_can_do_is_refused_before_a_checkpoint_is_exported(
    call: Call, example: Path, tmp_path: Path
) -> None:
    """Both were told only after the export, and as faults of a folder in the cache."""
    said = call("run", example, "hi", "--backend", "mlx", "--graph").complaint
    assert f"make one first: qwen2x export {example} --to mlx --graph -o FOLDER" in said
    said = call("run", example, "hi", "--backend", "torch", "--kv-bits", "8").complaint
    assert "not for torch; leave out --kv-bits" in said
    assert not (tmp_path / "cache").exists()
    assert greedy(call, example, "--backend", "mlx", "--kv-bits", "8", "--dtype", "float32")


def test_a_bundle_for_mlx_runs_with_nothing_else(
    call: Call, bundle: Path, int8: Path, float_bundle: Path
) -> None:
    def complaint(*args: object) -> str:
        return call("run", args[0], "hi", *args[1:]).complaint

    assert "export it with --to onnx" in complaint(bundle, "--backend", "onnx")
    assert "export it with --to mlx" in complaint(float_bundle, "--backend", "mlx")
    assert "which torch cannot run" in complaint(bundle, "--backend", "torch")
    assert "leave out --bits" in complaint(bundle, "--bits", "4")
    assert "has no decode.mlxfn; export it again with --to mlx" in complaint(int8, "--graph")
    assert "leave out --graph" in complaint(float_bundle, "--graph")


# chat, bench, inspect, validate


def test_chat_answers_with_mlx(call: Call, bundle: Path) -> None:
    for options in ((), ("--graph",), ("--kv-bits", "8")):
        done = call("chat", bundle, "--max-tokens", "3", *options, stdin=b"hi\nand then?\n")
        assert done.code == 0, done.err
        assert done.out.strip()


@pytest.mark.parametrize("options", [(), ("--graph",), ("--kv-bits", "8")], ids=str)
def test_bench_measures_mlx(options: tuple[str, ...], call: Call, bundle: Path) -> None:
    result = call("bench", bundle, *SHORT, *options, "--json").json
    assert result["backend"] == "mlx"
    assert result["device"] == ("cpu" if is_cpu else result["device"])
    assert result["prefill_tokens_per_s"] > 0
    assert result["decode_tokens_per_s"] > 0
    assert result["weight_bytes"] == open_bundle(bundle).weight_bytes


@pytest.mark.parametrize(("options", "times"), [((), 2), (("--graph",), 0)])
def test_bench_measures_the_way_in_which_run_makes_its_tokens(
    options: tuple[str, ...],
    times: int,
    call: Call,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwen2x.runtimes.mlx_runtime import MlxRuntime

    calls = []
    sample_ahead = MlxRuntime.sample_ahead

    def counted(self: MlxRuntime, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((len(token_ids), kwargs["limit"]))
        return sample_ahead(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(MlxRuntime, "sample_ahead", counted)
    # Once to warm up.
    assert call("bench", bundle, *SHORT, *options, "--json").code == 0
    assert calls == [(20, 4)] * times


def test_inspect_shows_an_mlx_bundle_and_its_graph(call: Call, bundle: Path, int8: Path) -> None:
    facts = call("inspect", bundle, "--verify", "--json").json
    assert (facts["kind"], facts["target"], facts["device"]) == ("bundle", "mlx", "any")
    assert facts["graph"]["chunk"] == 128
    assert facts["quantization"] is None
    assert facts["is_verified"] is True
    assert "decode.mlxfn" in facts["files"]
    # Keys and values, 6 layers of 2 heads of 32 in float32.
    assert facts["cache_bytes_per_token"] == 2 * 6 * 2 * 32 * 4
    shown = call("inspect", bundle).out
    assert "mlx for any device, float32" in shown
    assert f"decode.mlxfn, traced by mlx {facts['graph']['mlx']} on " in shown
    facts = call("inspect", int8, "--json").json
    assert facts["graph"] is None
    quantization = facts["quantization"]
    common = {"bits": 8, "group_size": 32, "mode": "affine"}
    assert {key: quantization.pop(key) for key in common} == common
    assert all(name.endswith(("gate_proj", "up_proj")) for name in quantization)
    assert {each["group_size"] for each in quantization.values()} == {64}
    assert "none; run by our own modules" in call("inspect", int8).out


@needs_mlx_lm
def test_a_folder_of_mlx_lm_goes_through_every_command_and_stays_as_it_is(
    call: Call, theirs: dict[str, Path], example: Path, int8: Path, tmp_path: Path
) -> None:
    folder = theirs["q8"]
    before = listing(folder)
    facts = call("inspect", folder, "--json").json
    assert (facts["scheme"], facts["source"]["id"]) == ("int8-g64", "q8")
    assert facts["is_verified"] is False
    assert "q8, by another program" in call("inspect", folder).out
    report = call("validate", folder, "--against", example, *FEW, "--layers", "--json").json
    assert report["verdict"] == "pass"
    assert report["first_layer_beyond"] is None
    assert call("validate", folder, "--against", int8, *FEW).code == 0
    assert call("validate", int8, "--against", folder, *FEW).code == 0
    assert len(greedy(call, folder)["token_ids"]) == 12
    assert call("chat", folder, "--max-tokens", "2", stdin=b"hi\n").code == 0
    assert call("bench", folder, *SHORT, "--json").json["weight_bytes"] == facts["weight_bytes"]
    assert "has no decode.mlxfn" in call("run", folder, "hi", "--graph").complaint
    said = call("inspect", folder, "--verify").complaint
    assert "has no hashes; leave out --verify" in said
    said = call("export", folder, "--to", "onnx", "-o", tmp_path / "out").complaint
    assert "already quantized (by MLX); give the float checkpoint" in said
    assert listing(folder) == before
    assert not (tmp_path / "out").exists()


@needs_mlx_lm
def test_a_folder_of_another_rounding_is_not_held_to_our_integers(
    call: Call, theirs: dict[str, Path], int4_bundle: Path
) -> None:
    """Both are called int4-g32, but mlx-lm rounds in its own way, q, k, v and embedding too."""
    folder = theirs["q4"]
    report = call("validate", folder, "--against", int4_bundle, *FEW, "--json").json
    assert report["scheme"] == "int4-g32"
    assert report["verdict"] == "pass"
    assert report["kl_mean"] > 0.03


@needs_mlx_lm
def test_floats_of_mlx_lm_are_the_checkpoint(
    call: Call, theirs: dict[str, Path], example: Path, bundle: Path
) -> None:
    folder = theirs["floats"]
    report = call("validate", folder, "--against", example, *FEW, "--json").json
    assert report["verdict"] == "pass"
    assert report["tolerance"]["greedy_against"] == "transformers"
    assert greedy(call, folder)["token_ids"] == greedy(call, bundle)["token_ids"]


@needs_mlx_lm
def test_a_mode_that_we_do_not_run_is_one_line_in_every_command(
    call: Call, theirs: dict[str, Path], example: Path, bundle: Path
) -> None:
    folder = theirs["mxfp4"]
    for command in (
        ("run", folder, "hi"),
        ("inspect", folder),
        ("bench", folder),
        ("validate", folder, "--against", example),
        ("validate", bundle, "--against", folder),
    ):
        assert "has the mode 'mxfp4'; expected 'affine'" in call(*command).complaint


# export, and mlx that is not there


@pytest.mark.parametrize(
    "options", [[], ["--bits", "4", "--method", "rtn"], ["--bits", "8", "--group-size", "64"]]
)
def test_a_dry_run_foretells_weights_and_index_to_the_byte(
    options: list[str], call: Call, example: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new"
    args = ("export", example, "--to", "mlx", *options)
    plan = call(*args, "--dry-run", "--json").json
    assert not out.exists()
    written = call(*args, "-o", out, "--json").json
    assert (plan["scheme"], plan["bits_per_weight"]) == (
        written["scheme"], written["bits_per_weight"]
    )  # fmt: skip
    planned = {file["name"]: file["bytes"] for file in plan["files"]}
    assert planned.keys() == {"model.safetensors", "model.safetensors.index.json"}
    assert planned == {name: (out / name).stat().st_size for name in planned}
    assert plan["bytes"] == sum(planned.values())
    shown = call(*args, "--dry-run").out
    assert "model.safetensors" in shown


def test_export_writes_an_mlx_folder_and_its_graph(
    call: Call, example: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = call("export", example, "--to", "mlx", "--graph", "-o", out, "--json")
    result = done.json
    assert (result["target"], result["dtype"], result["scheme"]) == ("mlx", "bfloat16", "float")
    sizes = {file["name"]: file["bytes"] for file in result["files"]}
    assert sizes["decode.mlxfn"] == (out / "decode.mlxfn").stat().st_size
    manifest = json.loads((out / "qwen2x.json").read_text("utf-8"))
    assert manifest["graph"]["capacities"][-1] >= 2048 + 128
    shutil.rmtree(out)
    shown = call("export", example, "--to", "mlx", "--bits", "4", "--method", "rtn", "-o", out).out
    assert "mlx int4-g32\n" in shown
    assert f"qwen2x validate {out}" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "mlx", "--device", "cpu"], "an MLX folder is for every device, got --device cpu"),
        (["--to", "mlx", "--device", "cuda"], "got --device cuda; leave it out"),
        (["--to", "onnx", "--graph"], "--graph is for --to mlx"),
        (["--graph"], "--graph is for --to mlx"),
        (["--to", "mlx", "--graph", "--max-context", "9999"], "must be in 1..2048"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    options: list[str], said: str, call: Call, example: Path, tmp_path: Path
) -> None:
    for more in (["-o", tmp_path / "out"], ["--dry-run"]):
        assert said in call("export", example, *options, *more).complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    ["run {bundle} hi", "chat {bundle}", "bench {bundle}", "run {bundle} hi --graph",
     "validate {bundle} --against {example}", "run {example} hi --backend mlx --bits 8"],
)  # fmt: skip
def test_without_mlx_a_command_names_the_extra(
    command: str, bundle: Path, example: Path, tmp_path: Path
) -> None:
    args = command.format(bundle=bundle, example=example).split()
    said = run_without(tmp_path, ("mlx",), *args).complaint
    assert "mlx is not installed" in said
    assert 'pip install "qwen2x[mlx]"' in said


@needs_mlx_lm
def test_without_mlx_folders_are_exported_and_inspected_but_not_traced(
    theirs: dict[str, Path], example: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run_without(tmp_path, ("mlx",), "export", example, "--to", "mlx", "-o", out)
    assert done.code == 0, done.err
    assert run_without(tmp_path, ("mlx",), "inspect", out, "--verify").code == 0
    assert run_without(tmp_path, ("mlx",), "inspect", theirs["q8"]).code == 0
    args = ("export", example, "--to", "mlx", "--graph", "-o", tmp_path / "traced")
    said = run_without(tmp_path, ("mlx",), *args).complaint
    assert 'pip install "qwen2x[mlx]", or leave out --graph' in said
    assert not (tmp_path / "traced").exists()
