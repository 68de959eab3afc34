"""Small bundles and runtimes, made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.exporter import export
from qwen2x.runtimes.runtime import Runtime, open_runtime
from tests.tiny_checkpoint import EXAMPLE, write_tiny_checkpoint

MakeBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that make every part of the model matter; vocabulary rows without text."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("random") / "source", dtype="float32")


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Exports a source once per set of options."""
    made: dict[Any, Path] = {}

    def make(source: Path = EXAMPLE, **options: Any) -> Path:
        key = (source, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundle") / "bundle"
            export(source, out=made[key], **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def example_runtime(make_bundle: MakeBundle) -> Iterator[Runtime]:
    """The trained small model in float32; a test that uses it resets it first."""
    with open_runtime(make_bundle(), threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def example_torch() -> Iterator[Runtime]:
    """The trained small model in transformers."""
    with open_runtime(EXAMPLE, backend="torch", threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def random_torch(random_checkpoint: Path) -> Iterator[Runtime]:
    """The random model in transformers."""
    with open_runtime(random_checkpoint, backend="torch", threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    """The 0.5B checkpoint that the environment names."""
    named = os.environ.get("QWEN2X_REAL_CHECKPOINT")
    if not named:
        pytest.skip("QWEN2X_REAL_CHECKPOINT does not name the 0.5B checkpoint's folder")
    return Path(named)
