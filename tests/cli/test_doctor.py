from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

from qwen2x.runtimes.onnx_provider import sums_are_exact
from tests.cli.command import Done, run_program
from tests.cli.conftest import Call

# A sitecustomize that makes libraries as good as not installed, or broken.
BLOCKER = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    if name.split(".")[0] in {names!r}:
        {instead}
    return find(name, path, target)
PathFinder.find_spec = find_spec
"""
MISSING = "return None"
BROKEN = 'raise ImportError("libfoo.so.1: cannot open shared object file")'


def run_without(
    folder: Path, names: tuple[str, ...], *args: object, instead: str = MISSING
) -> Done:
    script = BLOCKER.format(names=names, instead=instead)
    (folder / "sitecustomize.py").write_text(script)
    return run_program(*args, PYTHONPATH=str(folder), QWEN2X_CACHE=str(folder / "cache"))


def test_doctor_sees_what_is_here(call: Call) -> None:
    facts = call("doctor", "--json").json
    assert facts["qwen2x"] == version("qwen2x")
    assert facts["backends"] == ["onnx", "mlx", "torch"]
    assert "cpu" in facts["devices"]
    assert facts["extras"]["cpu"]["is_usable"] is True
    assert version("onnxruntime") in facts["extras"]["cpu"]["detail"]
    assert facts["extras"]["torch"]["is_usable"] is True
    assert facts["cores"] >= 1
    text = call("doctor").out
    exact = facts["int8_prompts"]
    assert exact is sums_are_exact()
    assert f"prompts  {'read in int8' if exact else 'never read in int8'}" in text
    assert "ready    [cpu]" in text
    assert "ready    [torch]" in text


def test_doctor_tells_mlx_from_mlx_with_cuda(call: Call) -> None:
    mlx_runtime = pytest.importorskip("qwen2x.runtimes.mlx_runtime", reason="mlx is not installed")
    extras = call("doctor", "--json").json["extras"]
    assert extras["mlx"]["is_usable"] is True
    assert extras["mlx"]["detail"] == f"mlx {version('mlx')}"
    has_cuda = "cuda" in mlx_runtime.available_devices()
    assert extras["mlx-cuda"]["is_usable"] is has_cuda
    if not has_cuda:
        assert extras["mlx-cuda"]["detail"] == f"mlx {version('mlx')} has no CUDA here"
        assert extras["mlx-cuda"]["advice"] == 'pip install "qwen2x[mlx-cuda]"'


@pytest.mark.parametrize(
    ("here", "devices"),
    [(["metal", "cpu"], ["cpu", "metal"]), (["cuda", "cpu"], ["cpu", "cuda"])],
)
def test_doctor_lists_the_devices_of_all_backends_once(
    here: list[str], devices: list[str], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlx_runtime = pytest.importorskip("qwen2x.runtimes.mlx_runtime", reason="mlx is not installed")
    from qwen2x.runtimes import onnx_provider

    monkeypatch.setattr(onnx_provider, "available_devices", lambda: ["cpu"])
    monkeypatch.setattr(mlx_runtime, "available_devices", lambda: here)
    facts = call("doctor", "--json").json
    assert facts["devices"] == devices
    assert facts["extras"]["mlx-cuda"]["is_usable"] is ("cuda" in here)
    # CUDA in MLX says nothing of onnxruntime.
    assert facts["extras"]["cuda"]["is_usable"] is False


@pytest.mark.parametrize(
    ("names", "backends", "extra"),
    [
        (("onnxruntime",), ["mlx", "torch"], "cpu"),
        (("mlx",), ["onnx", "torch"], "mlx"),
        (("torch", "transformers"), ["onnx", "mlx"], "torch"),
    ],
)
def test_doctor_says_what_to_install(
    names: tuple[str, ...], backends: list[str], extra: str, tmp_path: Path
) -> None:
    facts = run_without(tmp_path, names, "doctor", "--json").json
    assert facts["backends"] == backends
    state = facts["extras"][extra]
    assert state["is_usable"] is False
    assert f"{names[0]} is not installed" in state["detail"]
    assert state["advice"] == f'pip install "qwen2x[{extra}]"'


def test_doctor_survives_a_broken_library(tmp_path: Path) -> None:
    names = ("onnxruntime", "mlx", "torch", "transformers")
    done = run_without(tmp_path, names, "doctor", instead=BROKEN)
    assert done.code == 0
    assert "cannot be imported: libfoo.so.1" in done.out
    assert "devices  none" in done.out


@pytest.mark.parametrize("command", ["run {bundle} hello", "chat {bundle}", "bench {bundle}",
                                     "validate {bundle} --against {example}",
                                     "run {example} hello"])  # fmt: skip
def test_without_onnxruntime_a_command_names_the_extra(
    command: str, float_bundle: Path, example: Path, tmp_path: Path
) -> None:
    args = command.format(bundle=float_bundle, example=example).split()
    assert 'pip install "qwen2x[cpu]"' in run_without(tmp_path, ("onnxruntime",), *args).complaint


@pytest.mark.parametrize("command", ["run {example} hello --backend torch",
                                     "validate {bundle} --against {example}"])  # fmt: skip
def test_without_torch_a_command_names_the_extra(
    command: str, float_bundle: Path, example: Path, tmp_path: Path
) -> None:
    args = command.format(bundle=float_bundle, example=example).split()
    names = ("torch", "transformers")
    assert 'pip install "qwen2x[torch]"' in run_without(tmp_path, names, *args).complaint


def test_without_mlx_the_demo_says_what_it_leaves_out(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2x.cli import demo

    monkeypatch.setattr(demo, "STOPS", [stop for stop in demo.STOPS if stop.target == "mlx"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = call("demo", "--out", tmp_path / "kept")
    assert done.code == 0
    assert 'int4-mlx is left out: mlx is not installed; pip install "qwen2x[mlx]"' in done.err
    assert done.out.strip().startswith("all passed")
    assert not (tmp_path / "kept").exists()


def test_export_needs_neither_torch_nor_onnxruntime(example: Path, tmp_path: Path) -> None:
    names = ("torch", "transformers", "onnxruntime")
    done = run_without(
        tmp_path, names, "export", example, "--bits", "4", "--method", "rtn", "-o", tmp_path / "b"
    )
    assert done.code == 0, done.err
    assert run_without(tmp_path, names, "inspect", tmp_path / "b", "--verify").code == 0
