"""Options that several commands share, and what they open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from qwen2x.cli.output import byte_progress, log
from qwen2x.quantize.errors import BackendError
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.sampler import Sampling, read_sampling

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _together(*decorators: Decorator) -> Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

quantize_options = _together(
    click.option(
        "--bits", type=click.Choice(["4", "8"]), help="Quantize to 4 or 8 bits. Absent: float."
    ),
    click.option(
        "--group-size",
        type=click.Choice(["32", "64", "128"]),
        default="32",
        show_default=True,
        help="Weights that share a scale.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        help="Float type of the graph. Default: float32 for cpu, bfloat16 for cuda.",
    ),
)

model_options = _together(
    click.option(
        "--backend",
        type=click.Choice(["onnx", "mlx", "torch"]),
        help="What runs the model. Default: onnx.",
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where it runs. auto: what the bundle was made for, if it is here.",
    ),
    click.option("--threads", type=click.IntRange(1, 1024), help="Default: one per physical core."),
    click.option("--revision", help="Branch, tag or commit, when MODEL is a hub id."),
)

sampling_options = _together(
    click.option("--max-tokens", type=int, help="New tokens at most. Default: until it ends."),
    click.option("--temperature", type=float, help="0 is greedy. Default: the checkpoint's own."),
    click.option("--top-p", type=float, help="Default: the checkpoint's own."),
    click.option("--top-k", type=int, help="Default: the checkpoint's own."),
    click.option("--min-p", type=float, help="Default: the checkpoint's own."),
    click.option("--repetition-penalty", type=float, help="Default: the checkpoint's own."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
)
SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Removes the sampling options from a command's options and gives them."""
    return {name: options.pop(name) for name in SAMPLING_NAMES}


def sampling_for(runtime: Runtime, given: dict[str, Any]) -> Sampling:
    """The checkpoint's defaults, changed by what was given."""
    from qwen2x.runtimes.generate import read_text_files

    return read_sampling(read_text_files(runtime.folder).generation, **given)


def open_model(
    model: str,
    *,
    backend: str | None,
    device: str,
    threads: int | None,
    revision: str | None,
    bits: str | None = None,
    group_size: str = "32",
    dtype: str | None = None,
) -> Runtime:
    """A runtime for a bundle, or for a checkpoint, whose bundle is made once and kept."""
    from qwen2x.exporters.bundle import is_bundle

    if backend == "mlx":
        raise BackendError("backend mlx is not in this version; expected onnx or torch")
    folder = Path(model)
    if backend == "torch":
        from qwen2x.exporters.hub import resolve_source

        if is_bundle(folder):
            raise BackendError(
                f"{model} is a bundle, which torch cannot run; give the checkpoint it was made of"
            )
        folder = resolve_source(model, revision=revision)
    elif not is_bundle(folder):
        folder = _bundle_of(model, device, revision, bits, int(group_size), dtype)
    return open_runtime(folder, backend=backend, device=device, threads=threads)


def _bundle_of(
    model: str,
    device: str,
    revision: str | None,
    bits: str | None,
    group_size: int,
    dtype: str | None,
) -> Path:
    from qwen2x.exporters.bundle_cache import cached_bundle
    from qwen2x.exporters.onnx_export import Options

    options = Options(
        device="cuda" if device == "cuda" else "cpu",
        dtype=dtype,
        bits=int(bits) if bits else None,
        group_size=group_size,
    )
    with byte_progress("exporting (once)") as progress:
        folder = cached_bundle(model, options, revision=revision, progress=progress)
    log(f"using {folder}")
    return folder
