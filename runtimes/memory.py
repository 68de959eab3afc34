"""Memory: what the host has free, what a KV cache may take of it, and how both are said."""

from __future__ import annotations

import os
from pathlib import Path

from qwen2x.quantize.errors import RequestError

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def require_memory(
    positions: int, *, taken: int, bytes_per_position: int, free: int | None, beside: int = 0
) -> None:
    """Refuses a KV cache that memory has no room for.

    Args:
        positions: that the cache shall have room for.
        taken: positions that it has room for already.
        bytes_per_position: of the cache.
        free: bytes; None where nobody says, and nothing is refused.
        beside: bytes that are needed for all else.

    Raises:
        RequestError: it takes more than is free.
    """
    needed = (positions - taken) * bytes_per_position + beside
    if free is None or needed <= free:
        return
    fitting = taken + max(0, free - beside) // bytes_per_position
    also = f" ({gigabytes(beside)} of it for weights and work)" if beside else ""
    raise RequestError(
        f"a KV cache for {positions} positions needs {gigabytes(needed)} more memory{also}, "
        f"{gigabytes(free)} are free, enough for {fitting} positions; shorten the prompt, ask for "
        "fewer tokens (--max-tokens), or use an 8-bit cache (--kv-bits 8)"
    )


def free_host_bytes() -> int | None:
    """What Linux calls available, within the control group's limit; else all of the memory."""
    found = [_meminfo_available(), _control_group_rest()]
    known = [value for value in found if value is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def gigabytes(count: int) -> str:
    """Bytes as text, in decimal gigabytes."""
    return f"{count / 1e9:.2f} GB"


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) << 10 if kilobytes else None


def _control_group_rest() -> int | None:
    """The limit less what is used; cached files that nobody reads are given back on demand."""
    try:
        limit = (_CONTROL_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CONTROL_GROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CONTROL_GROUP / "memory.stat").read_text(encoding="ascii")
        idle = {line.split()[0]: int(line.split()[1]) for line in stat.splitlines()}
    except (OSError, ValueError, IndexError):
        return None
    given_back = idle.get("inactive_file", 0)
    return None if limit == "max" else max(0, int(limit) - used + given_back)
