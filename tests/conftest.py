"""What every test has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from, or left in, the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2X_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
