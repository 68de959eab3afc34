"""Weights in pages of 2 MB, where Linux gives them.

A decode step walks through all weights once. In pages of 4 KB their addresses do not fit the
processor's table of recent ones, and each miss waits for memory: the 0.5B model decoded 15 % faster
(4 bits) and 9 % faster (8 bits) once its weights lay in pages of 2 MB (docs/performance.md). The
allocator of ONNX Runtime does not ask for such pages, so they are asked for afterwards: the kernel
copies the memory over, page by page, at the addresses that it has.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Of <linux/mman.h>: advice for later, and (since Linux 6.1) at once.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE_PAGE = 2 << 20
_MAPS, _SETTING = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)")
_SMALLEST_MODEL = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """A private writable range of addresses with no file behind it.

    Attributes:
        start, stop: its addresses.
        resident: bytes of it that are in memory; huge: those in huge pages.
    """

    start: int
    stop: int
    resident: int
    huge: int


def use_huge_pages(weight_bytes: int) -> threading.Thread | None:
    """Starts to move this process's large ranges of memory into huge pages, beside other work.

    Nothing is done for small models, nor where the system has no huge pages to ask for.

    Args:
        weight_bytes: of the model that was just loaded.

    Returns:
        The thread that does it, some tenths of a second per 500 MB; None if nothing is done.
    """
    if weight_bytes < _SMALLEST_MODEL or not has_huge_pages():
        return None
    thread = threading.Thread(target=collapse, name="huge pages", daemon=True)
    thread.start()
    return thread


def has_huge_pages() -> bool:
    """Whether Linux gives huge pages to who asks."""
    try:
        return sys.platform == "linux" and "[never]" not in _SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def collapse() -> int:
    """Asks for huge pages for every large range; gives the bytes that were asked for.

    A range that another thread gives back meanwhile, and a kernel that does not know the request,
    refuse it; then everything stays as it is.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    asked = 0
    for mapping in list(mappings()):
        start = -(-mapping.start // _HUGE_PAGE) * _HUGE_PAGE
        size = mapping.stop // _HUGE_PAGE * _HUGE_PAGE - start
        is_done = 2 * mapping.huge > mapping.resident
        # Ranges that are mostly unused would grow.
        if size <= 0 or is_done or 2 * mapping.resident < mapping.stop - mapping.start:
            continue
        address, length = ctypes.c_void_p(start), ctypes.c_size_t(size)
        if libc.madvise(address, length, _MADV_HUGEPAGE) == 0:
            libc.madvise(address, length, _MADV_COLLAPSE)
            asked += size
    return asked


def mappings() -> Iterator[Mapping]:
    """This process's private writable ranges without a file, of a huge page or more."""
    found: dict[str, int] = {}
    is_ours = False
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        header = _HEADER.match(line)
        if header:
            start, stop = int(header[1], 16), int(header[2], 16)
            is_ours = header[3] == "rw-p" and header[4] == "0" and stop - start >= _HUGE_PAGE
            found = {"start": start, "stop": stop}
        elif is_ours and line.startswith("Rss:"):
            found["resident"] = 1024 * int(line.split()[1])
        elif is_ours and line.startswith("AnonHugePages:"):
            yield Mapping(**found, huge=1024 * int(line.split()[1]))
