"""Runs in onnxruntime-genai's environment: texts through ``og.Tokenizer`` and back."""

from __future__ import annotations

import json
import sys
from typing import Any

import onnxruntime_genai as og


def main(folder: str, texts: list[str]) -> dict[str, Any]:
    tokenizer = og.Tokenizer(folder)
    token_ids = [[int(token) for token in tokenizer.encode(text)] for text in texts]
    stream = tokenizer.create_stream()
    return {
        "token_ids": token_ids,
        "texts": [tokenizer.decode(row) for row in token_ids],
        "streamed": "".join(stream.decode(token) for row in token_ids for token in row),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
