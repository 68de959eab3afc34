"""What the MLX runtime refuses, in one line, and how it is chosen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.bundle import MANIFEST, describe_files, write_manifest
from qwen2x.quantize.errors import BackendError, BundleError
from qwen2x.runtimes import runtime as runtime_module
from qwen2x.runtimes.runtime import default_backend, open_runtime
from tests.runtimes.conftest import MakeBundle

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")


def rewritten(folder: Path, tensors: dict[str, Any]) -> Path:
    """The folder with other weights, and a manifest that agrees."""
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    write_manifest(folder, {**manifest, "files": describe_files(folder, without=[MANIFEST])})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update(more=mx.zeros(3)), "surplus: more"),
        (
            lambda t: t.update({"model.norm.weight": mx.zeros(64)}),
            r"unlike: model\.norm\.weight \(float \[64\], expected float \[128\]\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": mx.zeros(128, mx.uint32)}),
            r"unlike: model\.norm\.weight \(uint32 \[128\]",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.0" in name],
            r"missing: model\.layers\.0\.\S+, \S+, \S+ and 2\d more$",
        ),
    ],
    ids=["missing", "surplus", "shape", "integers", "many"],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, make_bundle: MakeBundle, random_checkpoint: Path, change: Any, message: str
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", bits=4, method="rtn")
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.eval(tensors)
    change(tensors)
    with pytest.raises(BundleError, match=message) as caught:
        open_runtime(rewritten(folder, tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "mxfp4", "group_size": 32, "bits": 4}, "mode 'mxfp4'; expected 'affine'"),
        ({"mode": "affine", "group_size": 48, "bits": 4}, "settings do not fit the model"),
        ({"mode": "affine", "bits": 4}, "settings do not fit the model"),
        ({"mode": "affine", "group_size": 32, "bits": "four"}, "settings do not fit the model"),
    ],
    ids=["mode", "group", "no group", "bits"],
)
def test_quantization_settings_that_do_not_fit_are_refused(
    tmp_path: Path,
    make_bundle: MakeBundle,
    random_checkpoint: Path,
    settings: dict[str, Any],
    message: str,
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", bits=4, method="rtn")
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    write_manifest(folder, {**manifest, "quantization": settings})
    with pytest.raises(BundleError, match=message) as caught:
        open_runtime(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be auto, cpu, metal or cuda, got 'tpu'"),
        ({"backend": "onnx"}, "made for mlx, the backend is onnx; export it with --to onnx"),
        ({"backend": "torch"}, "which torch cannot run; give the checkpoint"),
    ],
)
def test_unknown_choices_are_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, options: Any, message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        open_runtime(make_bundle(random_checkpoint, target="mlx", dtype="float32"), **options)


@pytest.mark.parametrize(
    ("device", "advice"),
    [("metal", r'pip install "qwen2x\[mlx\]"'), ("cuda", r'pip install "mlx\[cuda13\]"')],
)
def test_a_device_that_is_not_here_is_refused_with_what_to_install(
    make_bundle: MakeBundle, random_checkpoint: Path, device: str, advice: str
) -> None:
    from qwen2x.runtimes.mlx_runtime import available_devices

    if device in available_devices():
        pytest.skip(f"{device} is here")
    bundle = make_bundle(random_checkpoint, target="mlx", dtype="float32")
    with pytest.raises(BackendError, match=advice) as caught:
        open_runtime(bundle, device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (ModuleNotFoundError("No module named 'mlx'", name="mlx"), "mlx"),
        (ImportError("libmlx.so: cannot open shared object file"), "libmlx"),
    ],
)
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_without_mlx_the_extra_is_named(
    make_bundle: MakeBundle,
    random_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: ImportError,
    missing: str,
    platform: str,
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", dtype="float32")

    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(runtime_module.importlib, "import_module", fail)
    monkeypatch.setattr(runtime_module.sys, "platform", platform)
    with pytest.raises(BackendError, match=rf'^{missing} .*pip install "qwen2x\[mlx\]"') as caught:
        open_runtime(bundle)
    assert ("cuda13" in str(caught.value)) == (platform == "linux")


@pytest.mark.parametrize(
    ("platform", "machine", "backend"),
    [("darwin", "arm64", "mlx"), ("darwin", "x86_64", "onnx"), ("linux", "aarch64", "onnx")],
)
def test_mlx_is_the_default_on_apple_silicon(
    monkeypatch: pytest.MonkeyPatch, platform: str, machine: str, backend: str
) -> None:
    monkeypatch.setattr(runtime_module.sys, "platform", platform)
    monkeypatch.setattr(runtime_module.platform, "machine", lambda: machine)
    assert default_backend() == backend
