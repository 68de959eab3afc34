"""Prefill and decode on an NVIDIA GPU: our ONNX and MLX runtimes, transformers, mlx-lm.

    python -m benchmarks.cuda_speed FOLDER [--shape 0.5b] [--only onnx] [--out cuda.json]

FOLDER takes a checkpoint of random weights in the shapes of a released one, and what is exported
from it; what lies there is used again. Every row is measured in a process of its own, one after the
other: greedy tokens, medians of the repeats after one to warm up. Speed does not depend on the
values of the weights. Logits are compared with those of transformers in float32 on the same GPU; so
random weights give flat logits, the relative error says more than which token leads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cuda_rows import WAYS, Row, Sizes

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "examples" / "tiny-qwen2"
_LIMIT_S = 150

_COMMON = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21,
    "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
# Of the released configs.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192,
        "tie_word_embeddings": True, "bos_token_id": 2013, "eos_token_id": 2015,
    },
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def _onnx(dtype: str, bits: int | None = None, group_size: int | None = None) -> dict[str, Any]:
    options: dict[str, Any] = {"target": "onnx", "device": "cuda", "dtype": dtype}
    if bits is not None:
        options |= {"bits": bits, "method": "rtn", "group_size": group_size}
    return options


_MLX_INT4 = {"target": "mlx", "dtype": "bfloat16", "bits": 4, "method": "rtn", "group_size": 64}
_BF16, _INT4 = _onnx("bfloat16"), _onnx("bfloat16", 4, 128)
ROWS = (
    Row(name="onnx bfloat16", way="onnx", export=_BF16),
    Row(name="onnx bfloat16, no CUDA graph", way="onnx", export=_BF16,
        settings={"is_captured": False}),
    Row(name="onnx int4-g128", way="onnx", export=_INT4),
    Row(name="onnx int4-g128, no CUDA graph", way="onnx", export=_INT4,
        settings={"is_captured": False}),
    Row(name="onnx int4-g128, fpA_intB asked for", way="onnx", export=_INT4,
        settings={"fpa_intb": "1"}),
    Row(name="onnx int4-g64", way="onnx", export=_onnx("bfloat16", 4, 64)),
    Row(name="onnx int4-g32", way="onnx", export=_onnx("bfloat16", 4, 32)),
    Row(name="onnx int8-g128", way="onnx", export=_onnx("bfloat16", 8, 128)),
    Row(name="onnx float16", way="onnx", export=_onnx("float16")),
    Row(name="onnx int4-g128 float16", way="onnx", export=_onnx("float16", 4, 128)),
    Row(name="onnx int4-g32 float16", way="onnx", export=_onnx("float16", 4, 32)),
    Row(name="onnx int4-g32 float16, fpA_intB", way="onnx",
        export=_onnx("float16", 4, 32), settings={"fpa_intb": "1"}),
    Row(name="mlx bfloat16", way="mlx", export={"target": "mlx", "dtype": "bfloat16"}),
    Row(name="mlx int4-g64", way="mlx", export=_MLX_INT4),
    Row(name="mlx-lm bfloat16", way="mlx_lm", export={"target": "mlx", "dtype": "bfloat16"}),
    Row(name="mlx-lm int4-g64", way="mlx_lm", export=_MLX_INT4),
    Row(name="transformers bfloat16", way="torch", settings={"cache": None}),
    Row(name="transformers bfloat16, static cache, torch.compile", way="torch",
        settings={"cache": "static"}),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--only", action="append", help="measure rows whose name begins so")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--speed-only", action="store_true", help="leave logits uncompared")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cuda.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = Sizes(
        prompt=args.prompt_tokens,
        new=args.new_tokens,
        repeat=args.repeat,
        is_compared=not args.speed_only,
    )
    if args.row:
        row = Row(**json.loads(args.row))
        print(json.dumps(WAYS[row.way](args.folder, row, sizes, args.device)))
        return
    rows = [row for row in ROWS if not args.only or row.name.startswith(tuple(args.only))]
    result: dict[str, Any] = {
        "gpu": gpu_name(),
        "shape": args.shape,
        "prompt_tokens": sizes.prompt,
        "new_tokens": sizes.new,
        "repeats": sizes.repeat,
        "versions": versions(),
        "rows": {},
    }
    prepare(args.folder, SHAPES[args.shape], rows)
    command = ["--shape", args.shape, "--device", args.device]
    if args.speed_only:
        command.append("--speed-only")
    command += ["--prompt-tokens", str(sizes.prompt), "--new-tokens", str(sizes.new)]
    command += ["--repeat", str(sizes.repeat)]
    is_there = args.speed_only or (args.folder / "reference.npy").is_file()
    reference = [] if is_there else [Row(name="reference", way="reference")]
    for row in [*reference, *rows]:
        result["rows"][row.name] = found = run_row(args.folder, row, command)
        say(f"{row.name}: {json.dumps(found)}")
        keep(args.out, result)
    print(table(result))


def keep(path: Path, result: dict[str, Any]) -> None:
    """Writes a shape's rows into a file that may hold others."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = kept.get(result["shape"], {"rows": {}})
    kept[result["shape"]] = {**before, **result, "rows": before["rows"] | result["rows"]}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_row(folder: Path, row: Row, command: list[str]) -> dict[str, Any]:
    """What a process of its own found, or the end of what it said."""
    words = [sys.executable, "-m", "benchmarks.cuda_speed", str(folder), *command]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*words, "--row", json.dumps(vars(row))],
            capture_output=True, text=True, timeout=_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {_LIMIT_S} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-1500:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"row_s": round(time.perf_counter() - started, 1)}


def prepare(folder: Path, config: dict[str, Any], rows: list[Row]) -> None:
    """Writes the checkpoint and exports what is not there."""
    started = time.perf_counter()
    if not (folder / "source").is_dir():
        write_checkpoint(folder / "source", _COMMON | config)
        say(f"checkpoint written after {time.perf_counter() - started:.1f} s")
    bundles = {row.bundle: row for row in rows if row.export is not None}

    def make(name: str) -> str:
        if (folder / name).is_dir():
            return f"{name}: there"
        code = (
            "import json, sys; from qwen2x.exporters.exporter import export;"
            "export(sys.argv[1], out=sys.argv[2], **json.loads(sys.argv[3]))"
        )
        options = json.dumps(bundles[name].export)
        words = [sys.executable, "-c", code, str(folder / "source"), str(folder / name), options]
        done = subprocess.run(words, capture_output=True, text=True)
        took = time.perf_counter() - started
        return f"{name}: {done.stderr.strip()[-500:] or 'exported'} after {took:.1f} s"

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        for said in pool.map(make, bundles):
            say(said)


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Random weights; layers weigh more than the embedding, or a text would repeat its token."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(**{key: value for key, value in config.items() if key != "torch_dtype"}),
            dtype=torch.bfloat16,
        )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.5)
            elif name.endswith("proj.weight"):
                value.mul_(1.5)
    model.save_pretrained(folder, max_shard_size="4GB")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, folder / name)


# What is told


def gpu_name() -> str:
    try:
        words = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "none"


def versions() -> dict[str, str]:
    found = {}
    for name in ("onnxruntime-gpu", "onnxruntime", "mlx", "mlx-lm", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | prefill | decode | relative error |", "|---|---|---|---|"]
    for name, row in result["rows"].items():
        if "decode_tokens_per_s" in row:
            cells = (
                f"{row['prefill_tokens_per_s']:,.0f}",
                f"{row['decode_tokens_per_s']:,.1f}",
                f"{row['relative_error']:.4f}" if "relative_error" in row else "",
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
