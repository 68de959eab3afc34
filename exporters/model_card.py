"""``README.md`` of a bundle: the tags that hubs and LM Studio look for, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2x.exporters.bundle import write_file
from qwen2x.exporters.quality_section import quality_section, replace_section

CARD_FILE = "README.md"
_NAMES = {"onnx": "ONNX Runtime", "mlx": "MLX"}
_LIBRARIES = {"onnx": "onnx", "mlx": "mlx"}
_OTHERS = {
    "onnx": "onnxruntime-genai opens the folder as it is.",
    "mlx": 'mlx-lm opens the folder as it is: `mlx_lm.generate --model . --prompt "Hello"`',
}
_CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags:
- {library}
- qwen2
{base}---

# {title}

Made of `{source}` by qwen2x {version}.

| | |
|---|---|
| bits per weight | {bits_per_weight:.2f} |
| quantization | {scheme} |
| method | {method} |
| float type | {dtype} |
| context | {max_context} tokens |

{quality}

```sh
qwen2x run . "Hello"
qwen2x validate . --against {source}
```

{others}
{notes}"""


def model_card(manifest: Mapping[str, Any]) -> str:
    """The text, for a manifest that names its files."""
    source, target = str(manifest["source"]["id"]), str(manifest["target"])
    schemes = [f"{kind} {name}" for kind, name in manifest["schemes"].items()]
    return _CARD.format(
        library=_LIBRARIES[target],
        # Only a hub id is a base model that a hub can link to.
        base=f"base_model: {source}\n" if source.count("/") == 1 else "",
        title=f"{source.rsplit('/', 1)[-1]} for {_NAMES[target]}, {manifest['scheme']}",
        source=source,
        version=manifest["versions"]["qwen2x"],
        bits_per_weight=manifest["bits_per_weight"],
        scheme="none" if manifest["scheme"] == "float" else ", ".join(schemes),
        method=manifest["method"],
        dtype=manifest["dtype"],
        max_context=manifest["rope"]["max_context"],
        quality=quality_section(manifest),
        others=_OTHERS[target],
        notes="".join(
            f"\nNote: {note}; qwen2x follows the checkpoint.\n" for note in manifest["notes"]
        ),
    )


def update_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the part on quality anew, in one step; a card without that part is let be."""
    path = folder / CARD_FILE
    if not path.is_file():
        return
    card = path.read_bytes()
    updated = replace_section(card, manifest)
    if updated != card:
        write_file(path, updated)
