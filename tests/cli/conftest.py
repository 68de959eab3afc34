"""Bundles that the command line's tests share, and ways to call it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen2x.cli.main import main
from qwen2x.exporters.exporter import export
from tests.cli.command import Done
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

Call = Callable[..., Done]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2X_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """``qwen2x`` in this process, through its own ``main``."""

    def run(*args: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "argv", ["qwen2x", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        code = end.value.code or 0
        assert isinstance(code, int)
        return Done(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def example() -> Path:
    """The small trained checkpoint."""
    return EXAMPLE


@pytest.fixture(scope="session")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the example; not to be changed."""
    return export(EXAMPLE, out=tmp_path_factory.mktemp("float") / "bundle").bundle


@pytest.fixture(scope="session")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the example; not to be changed."""
    return export(
        EXAMPLE, out=tmp_path_factory.mktemp("int4") / "bundle", bits=4, method="rtn"
    ).bundle


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random one of the test's own, which never ends a text in earnest."""
    return write_tiny_checkpoint(tmp_path / "random-qwen2")
