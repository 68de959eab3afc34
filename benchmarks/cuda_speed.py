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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "examples" / "tiny-qwen2"
CHECKED, STEPPED, GREEDY = 256, 64, 32
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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the line.
        way: the function that measures it.
        export: options of the bundle; None measures the checkpoint itself.
        settings: of the way.
    """

    name: str
    way: str
    export: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def bundle(self) -> str:
        """Name of the exported folder."""
        assert self.export is not None
        return "-".join(f"{value}" for value in self.export.values())


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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every row is measured at."""

    prompt: int
    new: int
    repeat: int
    is_compared: bool


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
        print(json.dumps(_WAYS[row.way](args.folder, row, sizes, args.device)))
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


def prompt_ids(folder: Path, count: int) -> list[int]:
    vocab_size = json.loads((folder / "source" / "config.json").read_text())["vocab_size"]
    ids: list[int] = np.random.default_rng(0).integers(0, vocab_size, count).tolist()
    return ids


# What is measured, in a process of its own


def measure_reference(folder: Path, row: Row, sizes: Sizes, device: str) -> dict[str, Any]:
    """Logits of transformers in float32, and greedy tokens, kept beside the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
    model = model.to(device)
    ids = torch.tensor([prompt_ids(folder, CHECKED)], device=device)
    with torch.no_grad():
        rows = model(ids).logits[0].float().cpu().numpy()
        greedy = model.generate(
            ids, max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, eos_token_id=None
        )
    np.save(folder / "reference.npy", rows)
    tokens = greedy[0, CHECKED:].tolist()
    (folder / "reference.json").write_text(json.dumps(tokens), encoding="utf-8")
    return {"logits_std": float(rows.std()), "greedy": tokens}


def compare(folder: Path, rows: np.ndarray) -> dict[str, float]:
    """Logits [CHECKED, V] against the reference."""
    expected = np.load(folder / "reference.npy").astype(np.float64)
    difference = rows.astype(np.float64) - expected
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected, rows.astype(float))]
    return {
        "relative_error": float(np.linalg.norm(difference) / np.linalg.norm(expected)),
        "max_abs_diff": float(np.abs(difference).max()),
        "kl_mean": float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()),
        "top1_agreement": float((rows.argmax(-1) == expected.argmax(-1)).mean()),
    }


def check_runtime(folder: Path, runtime: Any, sizes: Sizes) -> dict[str, Any]:
    """Whole rows against the reference, steps against whole rows, greedy tokens."""
    if not sizes.is_compared:
        return {}
    ids = prompt_ids(folder, CHECKED)
    rows = runtime.logits(np.array([ids]))[0]
    start = CHECKED - STEPPED
    runtime.reset()
    steps = [runtime.prefill(ids[:start]), *(runtime.decode(token) for token in ids[start:-1])]
    wanted = rows[start - 1 : -1]
    error = np.linalg.norm(np.stack(steps) - wanted) / np.linalg.norm(wanted)
    runtime.reset()
    tokens = list(greedy_tokens(runtime, ids, GREEDY))
    expected = json.loads((folder / "reference.json").read_text())
    same = next(
        (i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), GREEDY
    )
    found: dict[str, Any] = {"greedy": tokens, "greedy_like_reference": same}
    return compare(folder, rows) | found | {"steps_relative_error": float(error)}


def greedy_tokens(runtime: Any, ids: list[int], count: int) -> Iterator[int]:
    from qwen2x.runtimes.bench import _greedy

    return _greedy(runtime, ids, count)


def measure_ours(folder: Path, runtime: Any, sizes: Sizes) -> dict[str, Any]:
    from qwen2x.runtimes.bench import bench

    ids = prompt_ids(folder, sizes.prompt)
    speed = bench(runtime, ids, sizes.prompt, sizes.new, sizes.repeat)
    return {**vars(speed), "weight_bytes": runtime.weight_bytes}


def measure_onnx(folder: Path, row: Row, sizes: Sizes, device: str) -> dict[str, Any]:
    from qwen2x.exporters.bundle import open_bundle
    from qwen2x.runtimes.onnx_device import DeviceRuntime
    from qwen2x.runtimes.onnx_provider import PROVIDERS

    if kernel := row.settings.get("fpa_intb"):
        session = {**PROVIDERS[device].session, "ep.cuda.fpa_intb_gemm": kernel}
        PROVIDERS[device] = replace(PROVIDERS[device], session=session)
    is_captured = row.settings.get("is_captured", True) and device == "cuda"
    started = time.perf_counter()
    bundle = open_bundle(folder / row.bundle)
    with DeviceRuntime(bundle, device=device, is_captured=is_captured) as runtime:
        load_s = time.perf_counter() - started
        found = {"load_s": load_s} | measure_ours(folder, runtime, sizes)
        return found | check_runtime(folder, runtime, sizes)


def measure_mlx(folder: Path, row: Row, sizes: Sizes, device: str) -> dict[str, Any]:
    from qwen2x.runtimes.runtime import open_runtime

    started = time.perf_counter()
    with open_runtime(folder / row.bundle) as runtime:
        load_s = time.perf_counter() - started
        found = {"load_s": load_s, "device": runtime.device} | measure_ours(folder, runtime, sizes)
        return found | check_runtime(folder, runtime, sizes)


def measure_mlx_lm(folder: Path, row: Row, sizes: Sizes, device: str) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model = load(str(folder / row.bundle))[0]
    ids = prompt_ids(folder, sizes.prompt)

    def answer(count: int) -> Iterator[int]:
        return (int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=count))

    checked = mx.array([prompt_ids(folder, CHECKED)])
    rows = np.array(model(checked)[0].astype(mx.float32))
    return time_answers(answer, sizes) | compare(folder, rows)


def measure_torch(folder: Path, row: Row, sizes: Sizes, device: str) -> dict[str, Any]:
    """``generate`` of transformers; its static cache comes with torch.compile and CUDA graphs."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16)
    model = model.to(device)
    ids = torch.tensor([prompt_ids(folder, sizes.prompt)], device=device)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, eos_token_id=None,
                cache_implementation=row.settings["cache"],
            )  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    started = time.perf_counter()
    for count in (1, sizes.new, sizes.new):
        seconds(count)
    warm_up_s = time.perf_counter() - started
    first = median(seconds(1) for _ in range(sizes.repeat))
    whole = median(seconds(sizes.new) for _ in range(sizes.repeat))
    with torch.no_grad():
        rows = model(torch.tensor([prompt_ids(folder, CHECKED)], device=device)).logits[0]
    found = {"warm_up_s": warm_up_s} | speeds(first, whole - first, sizes)
    return found | compare(folder, rows.float().cpu().numpy())


def time_answers(answer: Callable[[int], Iterator[int]], sizes: Sizes) -> dict[str, float]:
    firsts, rests = [], []
    for run in range(sizes.repeat + 1):
        started = time.perf_counter()
        tokens = answer(sizes.new)
        next(tokens)
        first = time.perf_counter()
        for _ in tokens:
            pass
        if run:
            firsts.append(first - started)
            rests.append(time.perf_counter() - first)
    return speeds(median(firsts), median(rests), sizes)


def speeds(first: float, rest: float, sizes: Sizes) -> dict[str, float]:
    return {
        "prefill_tokens_per_s": sizes.prompt / first,
        "decode_tokens_per_s": (sizes.new - 1) / rest,
        "time_to_first_token_s": first,
    }


_WAYS = {
    "reference": measure_reference,
    "onnx": measure_onnx,
    "mlx": measure_mlx,
    "mlx_lm": measure_mlx_lm,
    "torch": measure_torch,
}


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
