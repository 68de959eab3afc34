"""Peak memory of a 4-bit export of a 7B-shaped model must not grow with its depth.

    python -m benchmarks.export_memory [--layers 2 8]

The checkpoints have random bfloat16 weights (hidden 3584, intermediate 18944, vocabulary 152064,
untied) and are written shard by shard into a temporary folder: about 6 GB for 8 layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from benchmarks.measure import QWEN2X, run_measured, write_result
from qwen2x.exporters.config import parse_config

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151643,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    args = parser.parse_args()
    runs = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            size = write_checkpoint(checkpoint, layers)
            out = Path(folder) / "bundle"
            run = run_measured(
                [*QWEN2X, "export", checkpoint, "--bits", "4", "--method", "rtn", "-o", out]
            )
            runs[str(layers)] = {
                "checkpoint_bytes": size,
                "peak_memory_bytes": run.peak_memory_bytes,
                "seconds": run.seconds,
            }
    peaks = [run["peak_memory_bytes"] for run in runs.values()]
    write_result("export_memory", {"by_layers": runs, "ratio": max(peaks) / min(peaks)})


def write_checkpoint(folder: Path, layers: int) -> int:
    """A shard per layer, and one for the rest; gives the bytes of all weights."""
    folder.mkdir(parents=True)
    config = SHAPE | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in parse_config(config, {}).expected_tensors().items():
        part = name.split(".")[2] if name.startswith("model.layers.") else name
        shards.setdefault(part, {})[name] = shape
    weight_map, total = {}, 0
    for index, shapes in enumerate(shards.values(), 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_weights(generator, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return total


def random_weights(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = generator.standard_normal(shape, np.float32)
    values *= 0.02
    return values.astype(bfloat16)


if __name__ == "__main__":
    main()
