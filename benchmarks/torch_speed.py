"""Prefill and decode speed of transformers in float32.

python -m benchmarks.torch_speed CHECKPOINT TOKEN_IDS_JSON NEW_TOKENS REPEAT THREADS
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from qwen2x.runtimes.bench import bench
from qwen2x.runtimes.runtime import open_runtime


def main() -> None:
    ids, new_tokens, repeat, threads = map(json.loads, sys.argv[2:6])
    with open_runtime(sys.argv[1], backend="torch", threads=threads) as runtime:
        print(json.dumps(asdict(bench(runtime, ids, len(ids), new_tokens, repeat))))


if __name__ == "__main__":
    main()
