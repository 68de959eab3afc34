"""What an export holds in memory does not grow with the model, and is what the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.bundle_writer import estimate_peak_memory
from qwen2x.exporters.checkpoint import open_checkpoint
from qwen2x.exporters.exporter import plan_export
from qwen2x.exporters.options import Options
from tests.exporters.children import run_child
from tests.packed_checkpoint import write_packed_checkpoint
from tests.tiny_checkpoint import write_tiny_checkpoint

SHALLOW, DEEP = 2, 12
# The deep model has 79 MB more of bfloat16 than the shallow one, on a base of 55 MB.
GROWTH = 1.15
CAP_BYTES = 160 << 20
# How many chunks happen to live at once differs from run to run: small ones tell growth from that.
SMALL_CHUNKS = "weight_writer.CHUNK_ELEMENTS = 1 << 17"
# Not ru_maxrss: Linux counts the parent's size at the fork, here pytest with torch, as the child's.
PROGRAM = """
run()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(1024 * int(status["VmHWM"].split()[0]))
"""
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("memory")
    return {
        layers: write_tiny_checkpoint(
            root / f"{layers}-layers",
            hidden_size=512,
            intermediate_size=2048,
            num_attention_heads=8,
            vocab_size=8192,
            num_hidden_layers=layers,
        )
        for layers in (SHALLOW, DEEP)
    }


OPTIONS = [
    {},
    {"bits": 4, "method": "rtn"},
    {"device": "cuda", "dtype": "bfloat16"},
    {"target": "mlx", "bits": 4, "method": "rtn"},
]


def peak_bytes(program: str, source: Path, out: Path, options: dict[str, Any]) -> int:
    done = run_child(program, source, out, **options)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("options", OPTIONS)
def test_peak_memory_does_not_grow_with_depth(
    options: dict[str, Any], sources: dict[int, Path], tmp_path: Path
) -> None:
    peaks = {
        layers: peak_bytes(SMALL_CHUNKS + PROGRAM, source, tmp_path / f"{layers}", options)
        for layers, source in sources.items()
    }
    assert peaks[DEEP] < GROWTH * peaks[SHALLOW]


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_peak_memory_of_an_import_does_not_grow_with_depth(target: str, tmp_path: Path) -> None:
    """Pages of every matrix stayed mapped when its last columns were not read last."""
    peaks = {}
    for layers in (SHALLOW, DEEP):
        packed = write_packed_checkpoint(
            tmp_path / f"{layers}-layers",
            bits=8,
            group_size=128,
            hidden_size=512,
            intermediate_size=4096,
            num_attention_heads=8,
            num_hidden_layers=layers,
        )
        out = tmp_path / f"{layers}"
        options = {"target": target}
        peaks[layers] = peak_bytes(SMALL_CHUNKS + PROGRAM, packed.folder, out, options)
        with open_checkpoint(packed.folder) as checkpoint:
            plan = plan_export(checkpoint.config, Options(target=target))
        assert peaks[layers] <= estimate_peak_memory(plan)
    assert peaks[DEEP] < GROWTH * peaks[SHALLOW]


@pytest.mark.parametrize("options", OPTIONS)
def test_peak_memory_stays_below_what_the_plan_says(
    options: dict[str, Any], sources: dict[int, Path], tmp_path: Path
) -> None:
    peak = peak_bytes(PROGRAM, sources[DEEP], tmp_path / "bundle", options)
    with open_checkpoint(sources[DEEP]) as checkpoint:
        plan = plan_export(checkpoint.config, Options(**options))
    assert peak < CAP_BYTES
    assert peak <= estimate_peak_memory(plan)
