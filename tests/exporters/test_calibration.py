"""``--method gptq``: what is fitted to, what is written, and an export that is interrupted."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from qwen2x.exporters import bundle_writer, calibration
from qwen2x.exporters.bundle import open_bundle
from qwen2x.exporters.bundle_writer import estimate_peak_memory
from qwen2x.exporters.calibration import Calibration, read_calibration
from qwen2x.exporters.checkpoint import open_checkpoint
from qwen2x.exporters.config import read_config
from qwen2x.exporters.exporter import export, plan_export
from qwen2x.exporters.options import Options
from tests.exporters.children import FILLS_THE_DISK, can_mount, run_child
from tests.exporters.judge import load_judge
from tests.exporters.test_memory import PROGRAM
from tests.exporters.test_mlx_values import (
    PARTS,
    codes_of_bytes,
    codes_of_words,
    onnx_matrices,
    scheme_of,
    stored,
)
from tests.exporters.test_onnx_quantized import put_dequantized
from tests.exporters.test_staging import hashes
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

SAMPLE = EXAMPLE.parent / "sample.txt"
LAYERS = 3
# One scheme for all layers, which no measurement chooses.
GPTQ: dict[str, Any] = {
    "bits": 4, "group_size": 32, "method": "gptq", "calibration": str(SAMPLE)
}  # fmt: skip
KILLED = -signal.SIGKILL
# Three layers in float32: residuals of size 10, sums in another order.
CLOSE = 1e-4
# Seven layers more are 29 MB in float32, on a peak of some 200 MB; how many chunks happen to live
# at once differs from run to run.
GROWTH = 1.1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("calibration") / "source"
    return write_tiny_checkpoint(folder, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of an export that nothing happened to."""
    return export(source, out=tmp_path_factory.mktemp("undisturbed") / "bundle", **GPTQ).bundle


@pytest.fixture
def own_source(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "own-source")


class Stopped(BaseException):
    """Like Ctrl-C: what was written stays."""


def goes_on_at(source: Path, out: Path, **options: Any) -> int:
    """Exports; gives how many layers were done already."""
    calls: list[tuple[str, int, int]] = []
    export(source, out=out, on_layer=lambda *call: calls.append(call), **(GPTQ | options))
    first = calls[0][1]
    assert calls == [("rounded", done, LAYERS) for done in range(first, LAYERS + 1)]
    return first


def require_like(undisturbed: Path, out: Path) -> None:
    assert hashes(out) == hashes(undisturbed)
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    open_bundle(out, verify=True)


# What is written


def test_twice_the_same_gives_the_same_bytes(source: Path, undisturbed: Path, out: Path) -> None:
    assert goes_on_at(source, out) == 0
    require_like(undisturbed, out)


def test_the_bundle_holds_nothing_that_plain_rounding_does_not(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    plain = export(source, out=tmp_path / "plain", bits=4, method="rtn").bundle
    assert hashes(plain).keys() == hashes(undisturbed).keys()
    different = {name for name in hashes(plain) if hashes(plain)[name] != hashes(undisturbed)[name]}
    assert different == {"model.onnx_data", "README.md"}
    assert "| method | gptq |" in (undisturbed / "README.md").read_text("utf-8")


def test_the_manifest_names_the_method_and_the_text(source: Path, undisturbed: Path) -> None:
    manifest = json.loads((undisturbed / "qwen2x.json").read_text("utf-8"))
    text = read_calibration(source, SAMPLE, read_config(source))
    assert manifest["method"] == "gptq"
    assert manifest["calibration"] == {
        "text": "sample.txt",
        "tokens": text.windows.size,
        "sha256": text.sha256,
    }
    assert not any("calibration" in name for name in manifest["files"])


def test_a_bundle_that_was_not_calibrated_says_so(own_source: Path, out: Path) -> None:
    manifest = export(own_source, out=out, bits=4, method="rtn").manifest
    assert (manifest["method"], manifest["calibration"]) == ("rtn", None)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [
        {"bits": 4}, {"bits": 8, "group_size": 64}, {"group_size": None},
        {"group_size": None, "asymmetric": True},
    ],
    ids=str,
)  # fmt: skip
def test_both_targets_hold_the_same_integers(
    scheme: dict[str, int], is_tied: bool, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", is_tied=is_tied)
    bundle = export(source, "onnx", out=tmp_path / "onnx", **(GPTQ | scheme)).bundle
    folder = export(source, "mlx", out=tmp_path / "mlx", **(GPTQ | scheme)).bundle
    tensors = stored(folder)
    matrices = list(onnx_matrices(bundle))
    assert len(matrices) == 8 + (1 if is_tied else 2)
    for name, packed, scales in matrices:
        layer, tail = name.split(".")[:3], ".".join(name.split(".")[3:])
        modules = [".".join([*layer, part]) for part in PARTS[tail]] if tail in PARTS else [name]
        bits = scheme_of(folder, modules[0]).bits
        codes = [codes_of_words(tensors[f"{module}.weight"], bits) for module in modules]
        np.testing.assert_array_equal(np.concatenate(codes), codes_of_bytes(packed, bits))
        theirs = np.concatenate([tensors[f"{module}.scales"] for module in modules])
        np.testing.assert_array_equal(theirs.astype(np.float32), scales)


def test_both_streams_reach_the_last_layer_as_transformers_says(source: Path, out: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == total:
            raise Stopped

    with pytest.raises(Stopped):
        export(source, out=out, on_layer=stop, **GPTQ)
    streams = load_file(out.with_name(".bundle.partial") / "calibration-streams.safetensors")
    assert goes_on_at(source, out) == LAYERS
    model = load_judge(source)
    seen: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    text = read_calibration(source, SAMPLE, read_config(source))
    assert len(text.held_out) > 0
    ids = torch.from_numpy(np.concatenate([text.windows, text.held_out]))
    with torch.inference_mode():
        model.model(ids, use_cache=False)
        put_dequantized(model, out)
        model.model(ids, use_cache=False)
    for name, expected in zip(("exact", "rounded"), seen, strict=True):
        assert np.abs(streams[name] - expected.numpy()).max() < CLOSE, name
    assert np.abs(streams["exact"] - streams["rounded"]).max() > 100 * CLOSE


# The text


def test_the_built_in_texts_are_taken_in_the_same_shares_each_time() -> None:
    one, two = (read_calibration(EXAMPLE, None, read_config(EXAMPLE)) for _ in range(2))
    assert one.windows.shape == (48, 512)
    assert one.windows.dtype == np.int64
    assert one.sha256 == two.sha256
    assert one.name == "built-in mix"
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    text = tokenizer.decode(one.windows.reshape(-1).tolist(), skip_special_tokens=False)
    for piece in ("<|im_start|>assistant\n", "import ", "the "):
        assert piece in text


def test_windows_are_whole_pieces_of_the_text_and_some_are_held_out(source: Path) -> None:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = tokenizer.encode(SAMPLE.read_text("utf-8"), add_special_tokens=False).ids
    text = read_calibration(source, SAMPLE, read_config(source))
    size = text.windows.shape[1]
    pieces = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    used, held_out = text.windows.tolist(), text.held_out.tolist()
    assert sorted(used + held_out) == sorted(pieces)
    assert used == [piece for piece in pieces if piece in used]
    assert 0 < len(held_out) < len(used) / 3


def test_windows_are_no_longer_than_the_model_can_read(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "short", max_position_embeddings=48)
    text = read_calibration(source, SAMPLE, read_config(source))
    assert (text.windows.shape, text.held_out.shape) == ((48, 48), (4, 48))


def test_a_tokenizers_own_truncation_does_not_shorten_the_text(
    own_source: Path, source: Path
) -> None:
    """Some fine-tunes store that of their training run."""
    path = own_source / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(512)
    tokenizer.enable_padding(length=4096)
    tokenizer.save(str(path))
    whole = read_calibration(source, SAMPLE, read_config(source))
    assert read_calibration(own_source, SAMPLE, read_config(own_source)).sha256 == whole.sha256


def test_the_hash_is_of_the_tokens() -> None:
    def sha256(ids: list[list[int]]) -> str:
        windows = np.array(ids, np.int64)
        return Calibration(windows=windows[:1], held_out=windows[1:], name="text").sha256

    assert sha256([[1, 2], [3, 4]]) == sha256([[1, 2], [3, 4]])
    assert sha256([[1, 2], [3, 4]]) != sha256([[1, 2], [4, 3]])


def test_every_method_and_text_has_a_cache_key_of_its_own() -> None:
    options: list[dict[str, Any]] = [
        {"method": "rtn"}, {"method": "gptq"}, GPTQ, GPTQ | {"calibration": "other.txt"},
        {"method": "gptq", "bits": 8}, {"method": "gptq", "group_size": 64}, {"asymmetric": True},
        {"bits": None, "max_bytes": 10**9}, {"bits": None, "bits_per_weight": 5.0},
    ]  # fmt: skip
    assert len({Options(**({"bits": 4} | chosen)).key for chosen in options}) == len(options)


# Interrupted


def after_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    save = calibration.save_arrays

    def save_or_stop(path: Path, arrays: Any) -> None:
        save(path, arrays)
        if "streams" in path.name and arrays["sizes"][0] == 2:
            raise Stopped

    monkeypatch.setattr(calibration, "save_arrays", save_or_stop)


def between_a_layer_and_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    save = calibration.save_arrays

    def save_or_stop(path: Path, arrays: Any) -> None:
        if "streams" in path.name and arrays["sizes"][0] == 2:
            path.with_name(f"{path.name}.new").write_bytes(b"half")
            raise Stopped
        save(path, arrays)

    monkeypatch.setattr(calibration, "save_arrays", save_or_stop)


def while_the_tokenizer_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise Stopped

    monkeypatch.setattr(bundle_writer, "_copy_companions", stop)


def while_the_manifest_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise Stopped

    monkeypatch.setattr(bundle_writer, "write_manifest", stop)


def while_calibration_files_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def unlink_or_stop(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("calibration-layer"):
            unlink(self)
            raise Stopped
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_or_stop)


@pytest.mark.parametrize(
    ("moment", "done"),
    [
        (after_two_layers, 2),
        (between_a_layer_and_its_streams, 1),
        (while_the_tokenizer_is_copied, LAYERS),
        (while_the_manifest_is_written, LAYERS),
        (while_calibration_files_are_removed, 0),
    ],
)
def test_an_interrupted_export_goes_on_behind_its_last_layer(
    moment: Callable[[pytest.MonkeyPatch], None],
    done: int,
    source: Path,
    undisturbed: Path,
    out: Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        moment(patch)
        with pytest.raises(Stopped):
            export(source, out=out, **GPTQ)
    assert not out.exists()
    assert goes_on_at(source, out) == done
    require_like(undisturbed, out)


@pytest.mark.parametrize(
    ("program", "done"),
    [
        ("run(on_layer=lambda stage, done, total: die() if done == 2 else None)", 2),
        (
            "weight_writer.CHUNK_ELEMENTS = 4096\nweight_writer._SYNC_BYTES = 1\n"
            "run(progress=lambda done, total: die() if done > total / 2 else None)",
            LAYERS,
        ),
    ],
    ids=["layers", "weights"],
)
def test_an_export_that_was_killed_goes_on_behind_its_last_layer(
    program: str, done: int, source: Path, undisturbed: Path, out: Path
) -> None:
    killed = run_child(program, source, out, **GPTQ)
    assert killed.returncode == KILLED, killed.stderr
    assert goes_on_at(source, out) == done
    require_like(undisturbed, out)


@pytest.fixture
def partial(source: Path, out: Path) -> Path:
    """Left by an export that was interrupted after two layers."""
    with pytest.MonkeyPatch.context() as patch:
        after_two_layers(patch)
        with pytest.raises(Stopped):
            export(source, out=out, **GPTQ)
    return out.with_name(".bundle.partial")


@pytest.mark.usefixtures("partial")
def test_another_text_begins_anew(source: Path, out: Path, tmp_path: Path) -> None:
    text = tmp_path / "sample.txt"
    text.write_text("And it came to pass. " + SAMPLE.read_text("utf-8"), encoding="utf-8")
    assert goes_on_at(source, out, calibration=str(text)) == 0


@pytest.mark.usefixtures("partial")
def test_the_same_text_elsewhere_goes_on(source: Path, out: Path, tmp_path: Path) -> None:
    text = shutil.copyfile(SAMPLE, tmp_path / "moved.txt")
    assert goes_on_at(source, out, calibration=text) == 2
    assert json.loads((out / "qwen2x.json").read_text("utf-8"))["calibration"]["text"] == text.name


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("changes", [{"bits": 8}, {"group_size": 64}], ids=str)
def test_another_scheme_begins_anew(changes: dict[str, int], source: Path, out: Path) -> None:
    assert goes_on_at(source, out, **changes) == 0


def test_a_layer_that_is_gone_is_not_rounded_plainly(
    source: Path, undisturbed: Path, out: Path, partial: Path
) -> None:
    (partial / "calibration-layer-000.safetensors").unlink()
    assert goes_on_at(source, out) == 0
    require_like(undisturbed, out)


def test_plain_rounding_leaves_nothing_of_a_calibration(
    source: Path, undisturbed: Path, out: Path, partial: Path
) -> None:
    export(source, out=out, bits=4, method="rtn")
    assert not partial.exists()
    assert hashes(out).keys() == hashes(undisturbed).keys()


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a peak")
def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 9):
        source = write_tiny_checkpoint(
            tmp_path / f"{layers}",
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=layers,
        )
        done = run_child(PROGRAM, source, tmp_path / f"{layers}-bundle", **GPTQ)
        peaks.append(int(done.stdout))
    assert peaks[1] < GROWTH * peaks[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a peak")
def test_the_plan_foretells_the_peak_of_the_built_in_texts(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", intermediate_size=768, num_hidden_layers=1)
    options: dict[str, Any] = GPTQ | {"calibration": None}
    peak = int(run_child(PROGRAM, source, tmp_path / "bundle", **options).stdout)
    with open_checkpoint(source) as checkpoint:
        plan = plan_export(checkpoint.config, Options(**options))
    assert peak <= estimate_peak_memory(plan) < 2 * peak


def test_a_full_disk_leaves_nothing_behind(own_source: Path, out: Path, tmp_path: Path) -> None:
    if not can_mount(tmp_path / "mounted"):
        pytest.skip("this user may not mount a disk")
    done = run_child(FILLS_THE_DISK, own_source, out, on_disk="size=2m", **GPTQ)
    assert done.returncode == 0, done.stderr
    message, left = json.loads(done.stdout)
    assert "the disk is full; make room" in message
    assert left == []
