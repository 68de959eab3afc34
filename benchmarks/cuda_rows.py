"""What ``cuda_speed`` measures of one row, in a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

CHECKED, STEPPED, GREEDY = 256, 64, 32


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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every row is measured at."""

    prompt: int
    new: int
    repeat: int
    is_compared: bool


def prompt_ids(folder: Path, count: int) -> list[int]:
    vocab_size = json.loads((folder / "source" / "config.json").read_text())["vocab_size"]
    ids: list[int] = np.random.default_rng(0).integers(0, vocab_size, count).tolist()
    return ids


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


WAYS = {
    "reference": measure_reference,
    "onnx": measure_onnx,
    "mlx": measure_mlx,
    "mlx_lm": measure_mlx_lm,
    "torch": measure_torch,
}
