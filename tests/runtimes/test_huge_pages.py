"""Pages of 2 MB for weights, where Linux has them."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from qwen2x.runtimes import huge_pages

SIZE = 16 << 20
needs_huge_pages = pytest.mark.skipif(
    not huge_pages.has_huge_pages(), reason="this system has no huge pages to ask for"
)


@pytest.fixture
def memory() -> np.ndarray:
    """Memory in small pages, in use."""
    area = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    numbers = np.frombuffer(area, np.uint8)
    numbers[:] = np.arange(SIZE, dtype=np.uint64).astype(np.uint8)
    return numbers


def huge_bytes(numbers: np.ndarray) -> int:
    """Bytes in huge pages of the range that holds these numbers."""
    address = numbers.ctypes.data
    return sum(item.huge for item in huge_pages.mappings() if item.start <= address < item.stop)


@needs_huge_pages
def test_memory_moves_into_huge_pages_and_keeps_its_content(memory: np.ndarray) -> None:
    before, expected = huge_bytes(memory), memory.copy()
    asked = huge_pages.collapse()
    assert before == 0
    assert asked >= SIZE - (4 << 20)
    if huge_bytes(memory) == 0:
        pytest.skip("the kernel does not move pages at once (Linux before 6.1, or no room)")
    assert np.array_equal(memory, expected)
    assert huge_pages.collapse() < asked


@needs_huge_pages
def test_small_models_are_left_alone() -> None:
    assert huge_pages.use_huge_pages(1 << 20) is None


@needs_huge_pages
def test_large_models_are_moved_beside_other_work() -> None:
    thread = huge_pages.use_huge_pages(1 << 30)
    assert thread is not None
    assert thread.daemon
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    assert huge_pages.use_huge_pages(1 << 30) is None
