"""What the machine under the process has and gives: cores and memory."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def peak_memory_bytes() -> int:
    """This process's peak resident memory."""
    if sys.platform == "win32":
        return _windows_peak()
    with suppress(OSError):
        # Linux hands ru_maxrss of a large parent down to what it starts, but not this (proc(5)).
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def physical_cores() -> int:
    """Cores without their second threads, where Linux tells: ONNX Runtime's default of threads."""
    cores = {
        tuple((topology / name).read_text() for name in ("physical_package_id", "core_id"))
        for topology in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology")
    }
    return len(cores) or os.cpu_count() or 1


def _windows_peak() -> int:
    """PeakWorkingSetSize of GetProcessMemoryInfo (psapi.h, PROCESS_MEMORY_COUNTERS)."""

    class Counters(ctypes.Structure):
        _fields_ = (
            ("cb", ctypes.c_ulong),
            ("PageFaultCount", ctypes.c_ulong),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("rest", ctypes.c_size_t * 7),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    windll: Any = getattr(ctypes, "windll")  # noqa: B009 (absent off Windows)
    process = windll.kernel32.GetCurrentProcess()
    windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize)
