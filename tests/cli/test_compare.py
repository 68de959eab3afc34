from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen2x.cli.judge import Judge
from qwen2x.cli.judging import Wish, judge_bundle, read_text
from qwen2x.exporters.exporter import export
from tests.cli.conftest import Call
from tests.cli.test_validate import Elements
from tests.exporters.refusal import listing
from tests.tiny_checkpoint import write_tiny_checkpoint

FEW = ("--tokens", "96", "--window", "48")
SHARED = (
    "kl_mean", "kl_p99", "kl_max", "top1_agreement", "perplexity", "perplexity_reference",
    "bits_per_weight", "bytes", "scheme", "method",
)  # fmt: skip


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory, example: Path) -> Path:
    """Of the example; not to be changed."""
    return export(example, out=tmp_path_factory.mktemp("int8") / "bundle", bits=8).bundle


@pytest.fixture(scope="module")
def validated(
    tmp_path_factory: pytest.TempPathFactory, float_bundle: Path, int4_bundle: Path, example: Path
) -> Path:
    """A folder with two bundles that were validated on the same text; not to be changed."""
    root = tmp_path_factory.mktemp("validated")
    judge = Judge(name=str(example), folder=example)
    for name, original in (("float", float_bundle), ("int4", int4_bundle)):
        shutil.copytree(original, root / name)
        judge_bundle(root / name, judge, Wish(text=read_text(None), tokens=96, window=48))
    return root


@pytest.fixture
def measured(validated: Path, tmp_path: Path) -> list[Path]:
    """The same two, of the test's own."""
    return [shutil.copytree(validated / name, tmp_path / name) for name in ("float", "int4")]


def quality_of(folder: Path) -> dict[str, Any]:
    quality: dict[str, Any] = json.loads((folder / "qwen2x.json").read_text())["quality"]
    return quality


def set_quality(folder: Path, quality: dict[str, Any]) -> None:
    manifest = json.loads((folder / "qwen2x.json").read_text())
    (folder / "qwen2x.json").write_text(json.dumps(manifest | {"quality": quality}))


# Measured now


def test_the_figures_are_those_of_validate(
    call: Call, measured: list[Path], example: Path, tmp_path: Path
) -> None:
    before = [listing(folder) for folder in measured]
    result = call("compare", *measured, "--against", example, *FEW, "--json").json
    assert result["reference"] == {"name": str(example), "backend": "torch"}
    assert result["peak_memory_bytes"] > 10e6
    by_name = {entry["bundle"]: entry for entry in result["bundles"]}
    for folder in measured:
        recorded, entry = quality_of(folder), by_name[str(folder)]
        assert result["text"] == recorded["text"]
        assert {key: entry[key] for key in SHARED} == {key: recorded[key] for key in SHARED}
        assert entry["ran_on"] == "onnx cpu"
    assert result["perplexity_reference"] == quality_of(measured[0])["perplexity_reference"]
    assert [listing(folder) for folder in measured] == before, "compare records nothing"
    assert list((tmp_path / "cache").iterdir()) == [], "the logits' file is gone"


def test_the_original_is_run_once_and_one_model_is_open_at_a_time(
    call: Call,
    float_bundle: Path,
    int4_bundle: Path,
    example: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwen2x.runtimes import runtime

    opened: list[str] = []
    closed: list[str] = []
    original = runtime.open_runtime

    def watched(path: Path, **options: Any) -> runtime.Runtime:
        assert len(opened) == len(closed), "two models are open"
        opened.append(Path(path).name if path == example else str(path))
        found = original(path, **options)
        close = found.close
        monkeypatch.setattr(found, "close", lambda: (closed.append(str(path)), close())[1])
        return found

    monkeypatch.setattr(runtime, "open_runtime", watched)
    assert call("compare", float_bundle, int4_bundle, "--against", example, *FEW).code == 0
    assert opened.count(example.name) == 1
    assert len(opened) == len(closed) == 5


def test_people_see_one_table_by_size_with_what_is_smaller_and_closer(
    call: Call, float_bundle: Path, int4_bundle: Path, int8_bundle: Path, example: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    coarse = export(example, out=tmp_path / "coarse", bits=4, method="rtn", group_size=128).bundle
    # It is the farthest, and made the largest.
    manifest = json.loads((coarse / "qwen2x.json").read_text())
    padding = bytes(10_000_000)
    (coarse / "padding.bin").write_bytes(padding)
    sha256 = hashlib.sha256(padding).hexdigest()
    manifest["files"]["padding.bin"] = {"bytes": len(padding), "sha256": sha256}
    (coarse / "qwen2x.json").write_text(json.dumps(manifest))
    folders = [float_bundle, coarse, int8_bundle, int4_bundle]
    done = call("compare", *folders, "--against", example, *FEW)
    assert done.code == 0
    head, titles, *rows = done.out.splitlines()
    assert head.startswith(f"{example} (PyTorch): perplexity ")
    assert head.endswith(" on 96 tokens of built-in text in windows of 48")
    assert titles.split()[:4] == ["scheme", "bits", "size", "KL"]
    assert titles.endswith("smaller and closer")
    assert [row.split()[0] for row in rows] == [
        str(folder) for folder in (int4_bundle, int8_bundle, float_bundle, coarse)
    ]
    assert [row.endswith(str(float_bundle)) for row in rows] == [False, False, False, True]
    assert "int8-g32 rtn" in rows[1]
    assert f"reading with {int8_bundle}" in done.err
    as_json = call("compare", *folders, "--against", example, *FEW, "--json")
    assert as_json.err == ""
    better = [entry["smaller_and_closer"] for entry in as_json.json["bundles"]]
    assert better == [None, None, None, str(float_bundle)]


def test_targets_are_compared_with_each_other(
    call: Call, int4_bundle: Path, example: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    folder = int4_bundle.parent / "mlx"
    if not folder.exists():
        export(example, "mlx", out=folder, bits=4, method="rtn", dtype="float32")
    few = ("--tokens", "24", "--window", "24")
    args = ("compare", int4_bundle, folder, "--against", example, *few, "--json")
    entries = call(*args).json["bundles"]
    assert {entry["target"] for entry in entries} == {"onnx", "mlx"}
    one, other = (entry["kl_mean"] for entry in entries)
    assert one == pytest.approx(other, rel=0.3)


def test_another_bundle_may_stand_in_for_pytorch(
    call: Call, float_bundle: Path, int4_bundle: Path
) -> None:
    result = call("compare", int4_bundle, "--against", float_bundle, *FEW, "--json").json
    assert result["reference"] == {"name": str(float_bundle), "backend": "onnx"}
    assert call("compare", int4_bundle, "--against", float_bundle, *FEW).out.startswith(
        f"{float_bundle} (onnx): "
    )


def test_a_checkpoint_with_other_weights_is_told_and_one_of_another_shape_refused(
    call: Call, tmp_path: Path
) -> None:
    one = write_tiny_checkpoint(tmp_path / "one", seed=1)
    other = write_tiny_checkpoint(tmp_path / "other", seed=2)
    deeper = write_tiny_checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    bundle = export(one, out=tmp_path / "bundle").bundle
    done = call("compare", bundle, "--against", other, *FEW)
    assert done.code == 0
    assert f"{other} is not the checkpoint that {bundle} was made of" in done.err
    said = call("compare", bundle, "--against", deeper, *FEW).complaint
    assert "whose num_hidden_layers is 2, that of" in said
    assert "deeper is 3; compare bundles with the checkpoint that they were made of" in said


def test_what_cannot_be_run_is_told_before_anything_runs(
    call: Call, float_bundle: Path, int4_bundle: Path, example: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(int4_bundle, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"")
    for folder, said in ((broken, "has 0 bytes"), (tmp_path, "is no bundle")):
        done = call("compare", float_bundle, folder, "--against", example, *FEW)
        assert said in done.complaint
        assert "reading" not in done.err
    done = call("compare", float_bundle, "--against", example, *FEW, "--graph")
    assert "leave out --graph" in done.complaint
    assert "reading" not in done.err


def test_a_disk_without_room_is_one_line(
    call: Call, float_bundle: Path, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    said = call("compare", float_bundle, "--against", example, *FEW).complaint
    assert "0.00 GB are free; ask for fewer --tokens, or set QWEN2X_CACHE" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "no-such.txt"], "no-such.txt cannot be read"),
        (["--tokens", "1"], "got 1"),
        (["--window", "0"], "0"),
        (["--html", "{tmp_path}/no/page.html"], "mkdir"),
        (["--html", "{tmp_path}"], "is a folder; name a file"),
        (["--revision", "main"], "revision"),
    ],
)
def test_what_does_not_fit_is_one_line(
    options: list[str], said: str, call: Call, float_bundle: Path, example: Path, tmp_path: Path
) -> None:
    chosen = [option.format(tmp_path=tmp_path) for option in options]
    assert said in call("compare", float_bundle, "--against", example, *FEW, *chosen).complaint


def test_without_a_source_it_asks_for_one(call: Call, float_bundle: Path) -> None:
    said = call("compare", float_bundle).complaint
    assert "--against is missing; give the checkpoint" in said
    assert "--stored" in said
    assert "Missing argument" in call("compare").complaint


# Recorded earlier


def test_recorded_figures_are_shown_without_running_anything(
    call: Call, measured: list[Path], example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = call("compare", *measured, "--against", example, *FEW, "--json").json
    from qwen2x.runtimes import runtime

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is opened")

    monkeypatch.setattr(runtime, "open_runtime", refuse)
    for args in ((), ("--against", example)):
        stored = call("compare", *measured, "--stored", *args, "--json").json
        assert stored["bundles"] == live["bundles"]
        assert stored["text"] == live["text"]
        assert stored["reference"] == {"name": example.name, "backend": "torch"}
    shown = call("compare", *measured, "--stored")
    assert shown.out.splitlines()[0].endswith("on 96 tokens of built-in text in windows of 48")


def test_what_was_not_recorded_is_one_line(
    call: Call, measured: list[Path], int4_bundle: Path, tmp_path: Path
) -> None:
    fresh = shutil.copytree(int4_bundle, tmp_path / "fresh")
    set_quality(fresh, {})
    said = call("compare", *measured, fresh, "--stored").complaint
    assert f"{fresh} has no recorded figures that name their text" in said
    assert f"qwen2x validate {fresh} --against SOURCE" in said
    quality = quality_of(measured[0])
    for broken in (
        {key: value for key, value in quality.items() if key != "text"},
        {"estimate": {"kl_mean": 1}},
        quality | {"text": "prose"},
        quality | {"kl_mean": "small"},
    ):
        set_quality(fresh, broken)
        assert "no recorded figures" in call("compare", fresh, "--stored").complaint


def test_records_of_other_texts_windows_or_sources_are_not_compared(
    call: Call, measured: list[Path], example: Path, tmp_path: Path
) -> None:
    one, other = measured
    call("validate", other, "--against", example, "--tokens", "96", "--window", "96")
    said = call("compare", one, other, "--stored").complaint
    assert f"{one} was measured on 96 tokens of built-in in windows of 48" in said
    assert f"{other} on 96 tokens of built-in in windows of 96" in said
    assert "leave out --stored" in said
    source = write_tiny_checkpoint(tmp_path / "source")
    stranger = export(source, out=tmp_path / "stranger").bundle
    set_quality(stranger, quality_of(one))
    said = call("compare", one, stranger, "--stored").complaint
    assert "were made of different checkpoints (tiny-qwen2, source)" in said
    deeper = write_tiny_checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    said = call("compare", one, "--stored", "--against", deeper).complaint
    assert "compare bundles with the checkpoint" in said


def test_stored_takes_no_options_of_running(call: Call, measured: list[Path]) -> None:
    said = call("compare", *measured, "--stored", "--tokens", "96", "--kv-bits", "8").complaint
    assert "--stored runs nothing; leave out --tokens and --kv-bits, or --stored" in said


def test_a_figure_that_was_no_number_is_shown_as_such(call: Call, measured: list[Path]) -> None:
    set_quality(measured[1], quality_of(measured[1]) | {"kl_mean": None, "perplexity": None})
    done = call("compare", *measured, "--stored")
    assert done.out.count("not finite") == 2
    entries = call("compare", *measured, "--stored", "--json").json["bundles"]
    assert [entry["kl_mean"] is None for entry in entries] == [True, False]


# The page


def test_the_page_of_a_comparison_needs_nothing_else(
    call: Call, measured: list[Path], example: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert call("compare", *measured, "--against", example, *FEW, "--html", page).code == 0
    text = page.read_text(encoding="utf-8")
    seen = Elements()
    seen.feed(text)
    assert {"svg", "rect", "table", "style"} <= seen.tags
    assert not seen.tags & {"script", "link", "img", "iframe"}
    assert seen.addresses == []
    assert "http" not in text
    assert "url(" not in text
    assert "2 bundles against tiny-qwen2" in text
    assert "Where it differs most" in text
    for folder in measured:
        assert f"{quality_of(folder)['kl_mean']:.3g}" in text


def test_a_folder_of_another_program_is_compared_but_records_nothing(
    call: Call, measured: list[Path], example: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    made = export(example, "mlx", out=tmp_path / "mlx", bits=4, method="rtn", dtype="float32")
    (made.bundle / "qwen2x.json").unlink()
    said = call("compare", *measured, made.bundle, "--stored").complaint
    assert f"{made.bundle} was made by another program and records nothing" in said
    few = ("--tokens", "24", "--window", "24")
    done = call("compare", made.bundle, "--against", example, *few, "--json")
    (entry,) = done.json["bundles"]
    assert entry["method"] == "unknown"
    assert entry["kl_mean"] > 0


def test_the_page_of_recorded_figures_has_no_positions(
    call: Call, measured: list[Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert call("compare", *measured, "--stored", "--html", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert 'id="sizes-title"' in text
    assert "along the text" not in text
    assert "Where it differs most" not in text
