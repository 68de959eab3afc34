"""``qwen2x`` as a process of its own, where exit codes, streams, signals or imports matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.executable).with_name("qwen2x")


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output of a command that ended well, or failed a check."""
        assert self.code in (0, 1), self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def complaint(self) -> str:
        """The one line of a command that refused."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        *logs, line = self.err.splitlines()
        assert not any("Traceback" in log for log in logs)
        assert line.startswith("qwen2x: error: ")
        return line


def environment(**changes: str) -> dict[str, str]:
    """This process's, changed; without what a test run may have put into it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | changes


def run_program(*args: object, stdin: bytes = b"", cwd: Path | None = None, **env: str) -> Done:
    """Runs it to its end."""
    done = subprocess.run(
        [PROGRAM, *map(str, args)],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=environment(**env),
        timeout=120,
        check=False,
    )
    return Done(code=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())
