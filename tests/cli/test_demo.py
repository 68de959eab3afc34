from __future__ import annotations

from pathlib import Path

from tests.cli.command import run_program
from tests.cli.conftest import Call


def test_the_demo_goes_the_whole_way_and_leaves_nothing(tmp_path: Path) -> None:
    temporary, elsewhere = tmp_path / "tmp", tmp_path / "elsewhere"
    temporary.mkdir()
    elsewhere.mkdir()
    done = run_program("demo", cwd=elsewhere, TMPDIR=str(temporary))
    assert done.code == 0, done.err
    for word in ("qwen2x export", "--bits 4", "qwen2x validate", "qwen2x run", "KL divergence"):
        assert word in done.out
    assert done.out.count("pass over") == 3
    assert done.out.splitlines()[-1].startswith("all passed in ")
    assert "And it came to pass" in done.out
    # onnxruntime and torch leave marks of their own there.
    left = {path.name for path in temporary.iterdir()} - {".ses"}
    assert not [name for name in left if not name.startswith("torchinductor")]
    assert list(elsewhere.iterdir()) == []


def test_the_demo_keeps_its_bundles_where_it_is_told(call: Call, tmp_path: Path) -> None:
    for _ in range(2):  # the second replaces its own
        assert call("demo", "--out", tmp_path / "kept").code == 0
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"float", "int4", "int4-mlx"}
    for folder in (tmp_path / "kept").iterdir():
        assert call("inspect", folder, "--verify", "--json").json["quality"]["verdict"] == "pass"


def test_the_demo_replaces_nobody_elses_folder(call: Call, tmp_path: Path) -> None:
    """It exported with force into any folder that happened to be called `float`."""
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "thesis.txt").write_text("years of work")
    done = call("demo", "--out", tmp_path)
    assert done.code == 2
    assert (tmp_path / "float" / "thesis.txt").read_text() == "years of work"
