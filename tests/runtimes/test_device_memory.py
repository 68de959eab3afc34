"""What is said when a device is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2x.exporters.bundle import open_bundle
from qwen2x.quantize.errors import BackendError
from qwen2x.runtimes import device_memory
from qwen2x.runtimes.device_memory import free_bytes, is_out_of_memory, out_of_memory
from qwen2x.runtimes.onnx_session import not_runnable
from tests.runtimes.conftest import MakeBundle

# As onnxruntime-gpu 1.31 words it.
FULL = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:376 AllocateRawInternal Available "
    "memory of 1024 is smaller than requested bytes of 4096",
    "CUDA failure 2: out of memory ; GPU=0 ; hostname=gpu",
)


@pytest.mark.parametrize("reason", FULL)
def test_a_full_device_is_recognized(
    make_bundle: MakeBundle, random_checkpoint: Path, reason: str
) -> None:
    bundle = open_bundle(make_bundle(random_checkpoint, device="cuda", dtype="float16"))
    assert is_out_of_memory(reason)
    error = not_runnable(bundle, RuntimeError(reason))
    assert isinstance(error, BackendError)
    assert len(str(error).splitlines()) == 1


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory("[ONNXRuntimeError] : 1 : FAIL : Type Error: parameter T bound")


def test_the_widest_export_that_fits_is_named(
    make_bundle: MakeBundle, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(make_bundle(random_checkpoint, device="cuda", dtype="float16"))
    monkeypatch.setattr(device_memory, "_WORKSPACE", 0)
    parameters = 8 * bundle.weight_bytes / bundle.bits_per_weight
    wide, narrow, none = (int(parameters * bits / 8) for bits in (9, 5, 1))
    assert "with --bits 8" in str(out_of_memory(bundle, wide))
    assert "with --bits 4" in str(out_of_memory(bundle, narrow))
    assert "--device cpu" in str(out_of_memory(bundle, none))
    assert "GB were free" in str(out_of_memory(bundle, none))


def test_without_a_driver_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(device_memory.ctypes, "CDLL", missing)
    assert free_bytes() is None
