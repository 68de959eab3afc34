"""Looks models up on a hub that a test serves.

huggingface_hub reads its environment when it is imported, so each look-up runs in a process of
its own, with a cache of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAM = """
import json, sys
from qwen2x.exporters.hub import resolve_source
from qwen2x.quantize.errors import SourceError
source, options, prelude = json.loads(sys.argv[1])
exec(prelude)
try:
    print(resolve_source(source, **options))
except SourceError as error:
    print("SourceError:", error)
"""


@dataclass(frozen=True, kw_only=True)
class Client:
    """Runs resolve_source in a process with an environment of its own."""

    endpoint: str
    home: Path

    def start(
        self, source: str, variables: dict[str, str], prelude: str, **options: object
    ) -> subprocess.Popen[str]:
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_", "HTTPS_", "ALL_PROXY")
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(foreign)}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home)}
        argument = json.dumps([source, options, prelude])
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, argument],
            env={**kept, **own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        source: str,
        variables: dict[str, str] | None = None,
        prelude: str = "",
        **options: object,
    ) -> tuple[str, str]:
        process = self.start(source, variables or {}, prelude, **options)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.count("\n") == 1, out
        return out.strip(), err

    def folder(self, source: str, variables: dict[str, str] | None = None, **options: str) -> Path:
        out, _ = self.run(source, variables, **options)
        assert not out.startswith("SourceError"), out
        return Path(out)

    def error(self, source: str, variables: dict[str, str] | None = None, **options: str) -> str:
        out, _ = self.run(source, variables, **options)
        assert out.startswith("SourceError: "), out
        return out.removeprefix("SourceError: ")


def partials(client: Client) -> dict[str, int]:
    """What is there of files that are not complete: sha256 to bytes."""
    found = client.home.rglob("blobs/*.incomplete")
    return {path.name.removesuffix(".incomplete"): path.stat().st_size for path in found}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
