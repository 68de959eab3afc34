"""Prefill and decode speed of our bundles and of every peer that can be installed here, in turn.

    python -m benchmarks.peers CHECKPOINT                    # bundles are made first: half an hour
    python -m benchmarks.peers CHECKPOINT --ours FOLDER...   # bundles that lie there

Same weights, same token ids, same threads, A B C A B C: every round runs each side once (after a
run to warm up), and the medians of the rounds count. Divergence is what ``benchmarks.quality`` has
recorded of the same exports. Writes results/peers.json, peers.md and peers.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import (
    QWEN2X,
    RESULTS,
    ROOT,
    build_with_genai,
    genai_environment,
    run_json,
    run_measured,
    write_result,
)
from benchmarks.peers_page import write_peers_page
from benchmarks.quality import weight_bytes
from benchmarks.quality_llama import llama_environment, quantize_with_llama
from qwen2x.cli.judging import read_text
from qwen2x.runtimes.tokenizer import Tokenizer
from tests.foreign.environments import CannotInstallError, open_environment

# Variants of ``benchmarks.quality``, which knows their divergence. What reading the prompt in int8
# adds to it is in prefill_int8.json.
OURS: dict[str, tuple[str, ...]] = {
    "qwen2x for speed, 4 bits": ("--bits", "4", "--prefer", "speed", "--prefill-int8"),
    "qwen2x 4 bits": ("--bits", "4", "--prefill-int8"),
    "qwen2x 4 bits, groups of 32": (
        "--bits",
        "4",
        "--group-size",
        "32",
        "--method",
        "gptq",
        "--prefill-int8",
    ),
    "qwen2x for speed, 455 MB": (
        "--max-bytes",
        "455000000",
        "--prefer",
        "speed",
        "--prefill-int8",
    ),
    "qwen2x for speed, 8 bits": ("--bits", "8", "--prefer", "speed", "--prefill-int8"),
    "qwen2x 8 bits": ("--bits", "8", "--prefill-int8"),
}
LLAMA = ("Q4_0", "Q4_K_M", "Q8_0")
GENAI, _AS_IT_COMES = "onnxruntime-genai int4", ", as it comes"
SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")
KEPT = ROOT / ".cache" / "peers"


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is measured: a command that prints ``SPEEDS``, and the bytes of the weights."""

    name: str
    command: Sequence[object]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all sides have in common."""

    checkpoint: Path
    prompt: list[int]
    new_tokens: int
    threads: int

    @property
    def words(self) -> list[object]:
        """Of the peers' scripts: ids, new tokens, repeats, threads."""
        return [json.dumps(self.prompt), self.new_tokens, 1, self.threads]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--ours", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    ids = Tokenizer(args.checkpoint).encode(read_text(None))
    setting = Setting(
        checkpoint=args.checkpoint,
        prompt=(ids * (1 + args.prompt_tokens // len(ids)))[: args.prompt_tokens],
        new_tokens=args.new_tokens,
        threads=args.threads,
    )
    with tempfile.TemporaryDirectory() as folder:
        sides = [*our_sides(setting, args.ours), *peers(setting, Path(folder))]
        rounds = [
            {side.name: _told(side, run_json(side.command)) for side in sides}
            for _ in range(args.rounds)
        ]
    medians = {
        side.name: {name: median(found[side.name][name] for found in rounds) for name in SPEEDS}
        for side in sides
    }
    result = {
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "bytes": {side.name: side.bytes for side in sides},
        "kl_mean": recorded_divergence([side.name for side in sides]),
        "median": medians,
        "ratio": ratios(medians),
        "rounds": [
            {who: {name: speeds[name] for name in SPEEDS} for who, speeds in found.items()}
            for found in rounds
        ],
    }
    write_result("peers", result)
    write_peers_page(json.loads((RESULTS / "peers.json").read_text(encoding="utf-8")))


def our_sides(setting: Setting, folders: Sequence[Path]) -> list[Side]:
    """Bundles that were named, or those of ``OURS``, which are made once and kept."""
    named = {f"qwen2x {folder.name}": folder for folder in folders} or {
        name: kept_bundle(name, setting.checkpoint) for name in OURS
    }
    return [
        Side(
            name=name,
            bytes=weight_bytes(folder),
            command=[
                *QWEN2X, "bench", folder, "--prompt-tokens", len(setting.prompt), "--new-tokens",
                setting.new_tokens, "--repeat", 1, "--threads", setting.threads, "--json",
            ],
        )
        for name, folder in named.items()
    ]  # fmt: skip


def kept_bundle(name: str, checkpoint: Path) -> Path:
    """The export of that name under ``.cache``."""
    folder = KEPT / name.removeprefix("qwen2x ").replace(",", "").replace(" ", "-")
    if not folder.is_dir():
        print(f"exporting {name}", file=sys.stderr, flush=True)
        run_measured([*QWEN2X, "export", checkpoint, *OURS[name], "-o", folder])
    return folder


def peers(setting: Setting, folder: Path) -> list[Side]:
    """Those that can be installed; of the others it is said why not."""
    makers: tuple[Callable[[Setting, Path], list[Side]], ...] = (
        llama_sides,
        genai_sides,
        openvino_sides,
    )
    sides: list[Side] = []
    for make in makers:
        try:
            sides += make(setting, folder)
        except CannotInstallError as error:
            print(f"{make.__name__.removesuffix('_sides')}: {error}", file=sys.stderr)
    torch = [sys.executable, "-m", "benchmarks.torch_speed", setting.checkpoint, *setting.words]
    shards = setting.checkpoint.glob("*.safetensors")
    size = sum(shard.stat().st_size for shard in shards)
    return [*sides, Side(name="transformers float32", command=torch, bytes=2 * size)]


def llama_sides(setting: Setting, folder: Path) -> list[Side]:
    """llama.cpp, compiled for this machine, with its default cache and settings.

    Where weights that it repacks crash it, it runs without repacking, which is slower, and is named
    so.
    """
    environment = llama_environment()
    script = Path(__file__).with_name("llama_speed.py")
    sides = []
    for kind in LLAMA:
        path = folder / f"{kind}.gguf"
        quantize_with_llama(environment, setting.checkpoint, path, kind)
        name, command = f"llama.cpp {kind}", [environment.python, script, path, *setting.words]
        try:
            run_json([environment.python, script, path, "[1, 2, 3, 4]", 2, 1, setting.threads])
        except SystemExit:
            name, command = f"{name}, not repacked", [*command, "plain"]
        sides.append(Side(name=name, command=command, bytes=path.stat().st_size))
    (folder / "float32.gguf").unlink()
    return sides


def genai_sides(setting: Setting, folder: Path) -> list[Side]:
    """onnxruntime-genai on its own 4-bit export: with our number of threads, and as it comes.

    Left to itself it may choose fewer threads (one, on two virtual cores).
    """
    environment = genai_environment()
    out = folder / "genai"
    build_with_genai(environment, setting.checkpoint, out)
    command = [environment.python, Path(__file__).with_name("genai_speed.py"), out]
    *words, threads = setting.words
    ways = {GENAI: threads, f"{GENAI}{_AS_IT_COMES}": "null"}
    return [
        Side(name=name, command=[*command, *words, count], bytes=weight_bytes(out))
        for name, count in ways.items()
    ]


def openvino_sides(setting: Setting, folder: Path) -> list[Side]:
    """OpenVINO GenAI on llama.cpp's Q4_0 file, which it converts as it opens it."""
    environment = open_environment("openvino-genai")
    path = folder / "openvino.gguf"
    quantize_with_llama(llama_environment(), setting.checkpoint, path, "Q4_0", has_words=True)
    (folder / "float32-words.gguf").unlink()
    script = Path(__file__).with_name("openvino_speed.py")
    command = [environment.python, script, path, *setting.words]
    return [Side(name="OpenVINO GenAI Q4_0", command=command, bytes=path.stat().st_size)]


def ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Our speeds over every peer's."""
    ours = [name for name in medians if name.startswith("qwen2x ")]
    return {
        mine: {
            theirs: {name: medians[mine][name] / medians[theirs][name] for name in SPEEDS}
            for theirs in medians
            if theirs not in ours
        }
        for mine in ours
    }


def recorded_divergence(names: Sequence[str]) -> dict[str, float]:
    """Mean KL divergence on prose, of those sides that ``benchmarks.quality`` has measured."""
    path = RESULTS / "quality.json"
    if not path.is_file():
        return {}
    variants = json.loads(path.read_text(encoding="utf-8"))["variants"]
    measured = {name: name.removesuffix(_AS_IT_COMES) for name in names}
    return {
        name: variants[same]["prose"]["kl_mean"]
        for name, same in measured.items()
        if same in variants
    }


def _told(side: Side, speeds: dict[str, Any]) -> dict[str, Any]:
    prefill, decode = (speeds[name] for name in SPEEDS)
    print(f"{side.name}: prefill {prefill:.1f}, decode {decode:.1f}", file=sys.stderr, flush=True)
    return speeds


if __name__ == "__main__":
    main()
