"""What the tests of one topic share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters.exporter import export
from tests.exporters.graphs import VARIANTS, Make
from tests.exporters.hub_client import Client
from tests.small_hub import SmallHub
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "bundles"
    folder.mkdir()
    return folder / "bundle"


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    with SmallHub() as hub:
        yield hub


@pytest.fixture
def client(hub: SmallHub, tmp_path: Path) -> Client:
    return Client(endpoint=hub.endpoint, home=tmp_path / "home")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives the bundle of a variant and options, made once; the source lies beside it."""
    root = tmp_path_factory.mktemp("graphs")
    known: dict[str, Path] = {}

    def make(variant: str = "tied", **options: Any) -> Path:
        key = f"{variant}-{'-'.join(Path(str(value)).name for value in options.values())}"
        if key not in known:
            source = root / variant / "source"
            if not source.exists():
                write_tiny_checkpoint(source, **VARIANTS[variant])
            # The config's own factor alone, which is then in the graph without a choice.
            factors = {"yarn": (4.0,)} if variant.startswith("yarn") else {}
            export(source, out=source.parent / key, **factors, **options)
            known[key] = source.parent / key
        return known[key]

    return make
