"""``qwen2x demo``."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import click

from qwen2x.cli.judge import Judge
from qwen2x.cli.judging import Wish, judge_bundle
from qwen2x.cli.output import log, size_text
from qwen2x.cli.run import timings_of
from qwen2x.cli.validate import print_report

CHECKPOINT = "tiny-qwen2"
SAMPLE = "sample.txt"
PROMPT = "And it came to pass, that the king said unto"


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A bundle that the demo makes; without bits in float."""

    name: str
    target: str
    bits: int | None = None


STOPS = (
    Stop(name="float", target="onnx"),
    Stop(name="int4", target="onnx", bits=4),
    Stop(name="int4-mlx", target="mlx", bits=4),
)


@click.command("demo", epilog="\b\nExample: qwen2x demo --out demo-bundles")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Keep the bundles here. Default: a temporary folder.",
)
def command(out: Path | None) -> None:
    """The whole way on the small checkpoint that ships with qwen2x.

    Exports it as float and in 4 bits, for ONNX Runtime and for MLX, compares each with PyTorch, and
    lets them write.
    """
    with resources.as_file(resources.files("qwen2x.examples")) as examples:
        if out is not None:
            _walk(examples, out)
            return
        with tempfile.TemporaryDirectory(prefix="qwen2x-demo-") as folder:
            _walk(examples, Path(folder))


def _walk(examples: Path, out: Path) -> None:
    started = time.monotonic()
    passed = True
    for stop in STOPS:
        if stop.target == "mlx" and importlib.util.find_spec("mlx") is None:
            log(f'\n{stop.name} is left out: mlx is not installed; pip install "qwen2x[mlx]"')
            continue
        passed &= _visit(stop, examples, out / stop.name)
    click.echo(f"\n{'all passed' if passed else 'FAILED'} in {time.monotonic() - started:.1f} s")
    if not passed:
        click.get_current_context().exit(1)


def _visit(stop: Stop, examples: Path, folder: Path) -> bool:
    """Exports, validates and generates; gives whether the validation passed."""
    from qwen2x.exporters.bundle import is_bundle
    from qwen2x.exporters.exporter import export

    source, sample = examples / CHECKPOINT, examples / SAMPLE
    flags = f"--bits {stop.bits} " if stop.bits else ""
    click.echo(f"\n$ qwen2x export {source} --to {stop.target} {flags}-o {folder}")
    # An earlier demo's bundles are replaced, nobody else's folder is.
    done = export(source, stop.target, out=folder, bits=stop.bits, force=is_bundle(folder))
    size = sum(entry["bytes"] for entry in done.manifest["files"].values())
    click.echo(f"  {size_text(size)}, {done.manifest['bits_per_weight']:.2f} bits per weight")
    click.echo(f"$ qwen2x validate {folder} --against {source} --text {sample}")
    judge = Judge(name=str(source), folder=source)
    wish = Wish(text=sample.read_text(encoding="utf-8"), text_name=SAMPLE)
    report = judge_bundle(folder, judge, wish).report
    print_report(folder, report)
    click.echo(f'$ qwen2x run {folder} --raw "{PROMPT}" --max-tokens 60 --seed 1')
    _write(folder)
    return report.verdict == "pass"


def _write(folder: Path) -> None:
    from dataclasses import replace

    from qwen2x.runtimes.generate import generate, read_text_files
    from qwen2x.runtimes.runtime import open_runtime
    from qwen2x.runtimes.sampler import read_sampling

    with open_runtime(folder) as runtime:
        sampling = replace(read_sampling(read_text_files(runtime.folder).generation), seed=1)
        answer = generate(runtime, PROMPT, max_tokens=60, sampling=sampling, raw=True).run()
        speed = timings_of(answer, 0.0)["decode_tokens_per_s"]
    click.echo(f"  {PROMPT}{answer.text}\n  ({len(answer.token_ids)} tokens at {speed:.0f}/s)")
