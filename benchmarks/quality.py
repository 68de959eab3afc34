"""Size against KL divergence of 4-bit and 8-bit variants of a checkpoint: our bundles beside what
onnxruntime-genai, mlx-lm and llama.cpp make, against transformers in float32 on the same tokens.

    python -m benchmarks.quality CHECKPOINT                       # all, half an hour on two cores
    python -m benchmarks.quality CHECKPOINT --only qwen2x         # the peers' figures as recorded
    python -m benchmarks.quality CHECKPOINT --ours-only FOLDER... # bundles that lie there

ONNX graphs run in onnxruntime and GGUF files in llama.cpp, whose CPU kernels round activations to
8 bits; MLX folders run as float32 weights in transformers (see quality_mlx).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.fidelity import GenaiGraph
from benchmarks.measure import (
    QWEN2X,
    RESULTS,
    TEXTS,
    build_with_genai,
    genai_environment,
    run_measured,
    write_result,
)
from benchmarks.quality_llama import LlamaFile, llama_environment, quantize_with_llama
from benchmarks.quality_mlx import convert_with_mlx_lm, is_mlx, write_dequantized
from benchmarks.quality_page import Line, line_through, markdown_row, write_pages
from benchmarks.quality_reference import Reference
from qwen2x.runtimes.compare import GivesLogits, windows_of
from qwen2x.runtimes.runtime import open_runtime
from qwen2x.runtimes.tokenizer import Tokenizer
from tests.foreign.environments import CannotInstallError

Windows = dict[str, list[list[int]]]

# Flags of `qwen2x export`.
OURS: dict[str, tuple[str, ...]] = {
    "qwen2x 4 bits": ("--bits", "4"),
    "qwen2x for speed, 4 bits": ("--bits", "4", "--prefer", "speed"),
    "qwen2x for speed, 392 MB": ("--max-bytes", "392000000", "--prefer", "speed"),
    "qwen2x for speed, 455 MB": ("--max-bytes", "455000000", "--prefer", "speed"),
    "qwen2x 4.6 bits per weight": ("--bits-per-weight", "4.6"),
    "qwen2x 360 MB": ("--max-bytes", "360000000", "--asymmetric"),
    "qwen2x 392 MB": ("--max-bytes", "392000000", "--asymmetric"),
    "qwen2x 430 MB": ("--max-bytes", "430000000", "--asymmetric"),
    "qwen2x 470 MB": ("--max-bytes", "470000000", "--asymmetric"),
    "qwen2x 500 MB": ("--max-bytes", "500000000", "--asymmetric"),
    "qwen2x 525 MB": ("--max-bytes", "525000000", "--asymmetric"),
    "qwen2x 530 MB": ("--max-bytes", "530000000", "--asymmetric"),
    "qwen2x 8 bits": ("--bits", "8"),
    "qwen2x for speed, 8 bits": ("--bits", "8", "--prefer", "speed"),
    "qwen2x onnx int4 g32": ("--bits", "4", "--group-size", "32", "--method", "rtn"),
    "qwen2x 4 bits, groups of 32": ("--bits", "4", "--group-size", "32", "--method", "gptq"),
    "qwen2x onnx int4 g64": ("--bits", "4", "--group-size", "64", "--method", "rtn"),
    "qwen2x onnx int4 g128": ("--bits", "4", "--group-size", "128", "--method", "rtn"),
    "qwen2x onnx int8 g32": ("--bits", "8", "--group-size", "32"),
    "qwen2x onnx int8 g128": ("--bits", "8", "--group-size", "128"),
    "qwen2x mlx int4 g32": ("--to", "mlx", "--bits", "4", "--group-size", "32", "--method", "rtn"),
    "qwen2x mlx int4 g64": ("--to", "mlx", "--bits", "4", "--group-size", "64", "--method", "rtn"),
    "qwen2x mlx int8 g64": ("--to", "mlx", "--bits", "8", "--group-size", "64"),
}
GENAI = "onnxruntime-genai int4"
# Flags of `mlx_lm convert -q`.
MLX_LM: dict[str, tuple[str, ...]] = {
    "mlx-lm 4 bits g32": ("--q-bits", "4", "--q-group-size", "32"),
    "mlx-lm 4 bits g64": ("--q-bits", "4", "--q-group-size", "64"),
    "mlx-lm 8 bits g64": ("--q-bits", "8", "--q-group-size", "64"),
}
# Types of quality_llama_run.
LLAMA: dict[str, str] = {
    f"llama.cpp {kind}": kind for kind in ("Q4_0", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q8_0")
}
VARIANTS = (*OURS, GENAI, *MLX_LM, *LLAMA)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of each text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--only", default="", help="variants whose names begin so")
    parser.add_argument("--ours-only", type=Path, nargs="+", default=[], metavar="FOLDER")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.checkpoint)
    windows = {
        text: windows_of(
            tokenizer.encode((TEXTS / f"{text}.txt").read_text(encoding="utf-8")),
            args.tokens,
            args.window,
        )
        for text in ("prose", "code")
    }
    judge = Judge(args.checkpoint, windows)
    if args.ours_only:
        print_folders(judge, args.ours_only)
        return
    setting = {"tokens": args.tokens, "window": args.window, "parameters": judge.parameters}
    variants = recorded(setting) if args.only else {}
    variants |= measure_variants(judge, args.checkpoint, args.only)
    ordered = {name: variants[name] for name in VARIANTS if name in variants}
    lines = compare_with_line(ordered)
    write_pages(ordered, lines, setting)
    line = {text: asdict(line) for text, line in lines.items()}
    write_result("quality", {**setting, "llama_cpp_line": line, "variants": ordered})


class Judge:
    """Measures whatever gives logits against the reference."""

    def __init__(self, checkpoint: Path, windows: Windows) -> None:
        self.parameters = count_parameters(checkpoint)
        self.checkpoint = checkpoint
        self._reference = Reference(checkpoint)
        self._windows = windows

    def measure(self, candidate: GivesLogits, size: int) -> dict[str, Any]:
        """Bytes of the files that hold weights, and figures by text."""
        figures = {
            text: asdict(self._reference.figures(candidate, windows))
            for text, windows in self._windows.items()
        }
        return {"bytes": size, "bits_per_weight": 8 * size / self.parameters, **figures}


def measure_variants(judge: Judge, checkpoint: Path, prefix: str) -> dict[str, dict[str, Any]]:
    """Makes and measures the variants whose names begin with ``prefix``."""
    measured: dict[str, dict[str, Any]] = {}
    missing: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for name in VARIANTS:
            maker = name.split()[0]
            if not name.startswith(prefix) or maker in missing:
                continue
            try:
                with variant(name, checkpoint, Path(folder)) as made:
                    figures = judge.measure(made.candidate, made.size) | made.cost
            except CannotInstallError as error:
                print(f"{maker} is not installed: {error}", file=sys.stderr)
                missing.add(maker)
                continue
            day = datetime.now(UTC).date().isoformat()
            measured[name] = {"version": made.version, "date": day, **figures}
            print(markdown_row(name, measured[name]), file=sys.stderr, flush=True)
    return measured


@dataclass(frozen=True, kw_only=True)
class Made:
    """A variant.

    Attributes:
        candidate: its logits; size: bytes of its weights; version: of its maker.
        cost: of making it, if it was measured.
    """

    candidate: GivesLogits
    size: int
    version: str
    cost: dict[str, Any] = field(default_factory=dict)


@contextmanager
def variant(name: str, checkpoint: Path, folder: Path) -> Iterator[Made]:
    """Makes a variant."""
    if name in LLAMA:
        environment = llama_environment()
        out = folder / f"{LLAMA[name]}.gguf"
        quantize_with_llama(environment, checkpoint, out, LLAMA[name])
        version = version_in(environment.python, "llama-cpp-python")
        candidate = LlamaFile(environment=environment, path=out)
        yield Made(candidate=candidate, size=out.stat().st_size, version=version)
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / "model"
        if name == GENAI:
            genai = genai_environment()
            build_with_genai(genai, checkpoint, out)
            version = version_in(genai.python, "onnxruntime-genai")
            graph = GenaiGraph(out, checkpoint)
            yield Made(candidate=graph, size=weight_bytes(out), version=version)
            return
        cost: dict[str, Any] = {}
        if name in MLX_LM:
            convert_with_mlx_lm(checkpoint, out, MLX_LM[name])
        else:
            run = run_measured([*QWEN2X, "export", checkpoint, *OURS[name], "-o", out])
            cost = {"seconds": run.seconds, "peak_memory_bytes": run.peak_memory_bytes}
        version = metadata.version("mlx-lm" if name in MLX_LM else "qwen2x")
        with open_folder(out, checkpoint) as opened:
            yield Made(candidate=opened, size=weight_bytes(out), version=version, cost=cost)


@contextmanager
def open_folder(folder: Path, checkpoint: Path) -> Iterator[GivesLogits]:
    """A bundle of ours, or any MLX folder."""
    if not is_mlx(folder):
        with open_runtime(folder) as runtime:
            yield runtime
        return
    with tempfile.TemporaryDirectory() as place:
        floats = Path(place) / "float32"
        write_dequantized(folder, checkpoint, floats)
        with open_runtime(floats, backend="torch") as runtime:
            yield runtime


def print_folders(judge: Judge, folders: Sequence[Path]) -> None:
    """One line per folder, against the recorded line through llama.cpp's points."""
    path = RESULTS / "quality.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = {text: Line(**line) for text, line in result.get("llama_cpp_line", {}).items()}
    for folder in folders:
        with open_folder(folder, judge.checkpoint) as candidate:
            measured = judge.measure(candidate, weight_bytes(folder))
        against = {text: line.compare(measured, text) for text, line in lines.items()}
        print(markdown_row(folder.name, measured | {"against_line": against}), flush=True)


def compare_with_line(variants: dict[str, dict[str, Any]]) -> dict[str, Line]:
    """The line per text through llama.cpp's points; our variants are told where they lie."""
    theirs = [variants[name] for name in LLAMA if name in variants]
    if len(theirs) < 2:
        return {}
    lines = {text: line_through(theirs, text) for text in ("prose", "code")}
    for name in set(OURS) & set(variants):
        variants[name]["against_line"] = {
            text: line.compare(variants[name], text) for text, line in lines.items()
        }
    return lines


def recorded(setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants of the last result, if it was measured on as many tokens of such a model."""
    path = RESULTS / "quality.json"
    if not path.is_file():
        return {}
    result = json.loads(path.read_text(encoding="utf-8"))
    found = {key: result.get(key) for key in setting}
    if found != setting:
        raise SystemExit(f"{path.name} was measured with {found}, not {setting}; leave out --only")
    variants: dict[str, dict[str, Any]] = result["variants"]
    return variants


def weight_bytes(folder: Path) -> int:
    """Of the files that hold weights: a graph with its data, or safetensors."""
    files = [*folder.glob("model.onnx*"), *folder.glob("*.safetensors")]
    return sum(path.stat().st_size for path in files)


def count_parameters(checkpoint: Path) -> int:
    """Weights of a checkpoint; a head that is tied to the embedding counts once."""
    is_tied = json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"]
    total = 0
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "np") as tensors:
            names = [name for name in tensors.keys() if name != "lm_head.weight" or not is_tied]  # noqa: SIM118
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


def version_in(python: Path, package: str) -> str:
    """Of a package in a peer's environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return run_measured([python, "-c", code]).output.strip()


if __name__ == "__main__":
    main()
