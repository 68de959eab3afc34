"""Options that several commands share, and what they open."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2x.cli.output import byte_progress, log
from qwen2x.quantize.errors import BackendError, RequestError

if TYPE_CHECKING:
    from qwen2x.runtimes.runtime import Runtime
    from qwen2x.runtimes.sampler import Sampling

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _together(*decorators: Decorator) -> Decorator:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


system_option = click.option(
    "--system", help="The system message. Default: the chat template's own."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")

quantize_options = _together(
    click.option(
        "--bits",
        type=click.Choice(["4", "8"]),
        help="Quantize; with 4, q, k, v, embedding and head have 8. Default: float weights.",
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

place_options = _together(
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where it runs. auto: what the bundle was made for, if it is here.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        help="Threads on the CPU. Default: one per physical core.",
    ),
)

model_options = _together(
    click.option(
        "--backend",
        type=click.Choice(["onnx", "mlx", "torch"]),
        help="What runs the model. Default: onnx.",
    ),
    place_options,
    click.option(
        "--revision", help="Branch, tag or commit, when MODEL is a hub id. Default: main."
    ),
)

sampling_options = _together(
    click.option(
        "--max-tokens", type=click.IntRange(1), help="New tokens at most. Default: until it ends."
    ),
    click.option("--temperature", type=float, help="0 is greedy. Default: the checkpoint's own."),
    click.option(
        "--top-p",
        type=float,
        help="Only the likeliest tokens that reach this probability together. "
        "Default: the checkpoint's own.",
    ),
    click.option(
        "--top-k",
        type=int,
        help="Only this many of the likeliest tokens, 0 for all. Default: the checkpoint's own.",
    ),
    click.option(
        "--min-p",
        type=float,
        help="Only tokens at least this likely, relative to the likeliest. "
        "Default: the checkpoint's own.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help="Above 1, what was said becomes less likely. Default: the checkpoint's own.",
    ),
    click.option("--seed", type=int, help="Makes sampling repeatable. Default: another each time."),
)
SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Removes the sampling options from a command's options and gives them.

    Raises:
        RequestError: one of them is out of range, before anything is loaded.
    """
    from qwen2x.runtimes.sampler import read_sampling

    given = {name: options.pop(name) for name in SAMPLING_NAMES}
    read_sampling({}, **given)
    return given


def sampling_for(runtime: Runtime, given: dict[str, Any]) -> Sampling:
    """The checkpoint's defaults, changed by what was given."""
    from qwen2x.runtimes.generate import read_text_files
    from qwen2x.runtimes.sampler import read_sampling

    return read_sampling(read_text_files(runtime.folder).generation, **given)


def open_model(
    model: str,
    *,
    backend: str | None,
    device: str,
    threads: int | None,
    **making: Any,
) -> Runtime:
    """A runtime for a bundle, or for a checkpoint, whose bundle is made once and kept.

    Args:
        model: a bundle, a Hugging Face folder, or a hub id.
        backend: ``onnx`` (also by default), or ``torch``, which runs checkpoints as they are.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: on the CPU; None is the backend's own choice.
        **making: revision, bits, group_size, dtype: of the bundle that a checkpoint becomes.
    """
    from qwen2x.exporters.bundle import is_bundle
    from qwen2x.runtimes.runtime import open_runtime

    if backend == "mlx":
        raise BackendError("backend mlx is not in this version; expected onnx or torch")
    folder = Path(model)
    if is_bundle(folder):
        if backend == "torch":
            raise BackendError(
                f"{model} is a bundle, which torch cannot run; give the checkpoint it was made of"
            )
        _refuse(making, ("bits", "dtype", "revision"), f"{model} is a bundle, which is made")
    elif backend == "torch":
        _refuse(making, ("bits", "dtype"), "backend torch runs a checkpoint as it is, in float32")
        folder = open_source(model, making["revision"])
    else:
        folder = _bundle_of(model, device, **making)
    return open_runtime(folder, backend=backend, device=device, threads=threads)


def open_source(source: str, revision: str | None) -> Path:
    """The local folder of a checkpoint whose config and tensors' headers are those of a Qwen2.

    Raises:
        InputError: it is none, or not whole.
    """
    from qwen2x.exporters.bundle import is_bundle
    from qwen2x.exporters.checkpoint import open_checkpoint
    from qwen2x.exporters.hub import resolve_source

    if is_bundle(Path(source)):
        raise RequestError(f"expected a checkpoint, got the bundle {source}; give what it is of")
    with open_checkpoint(resolve_source(source, revision=revision)) as checkpoint:
        return checkpoint.folder


def _refuse(making: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    given = [f"--{name}" for name in names if making[name] is not None]
    if given:
        raise RequestError(f"{reason}; leave out {' and '.join(given)}")


def _usable_devices() -> list[str]:
    """What onnxruntime offers here; nothing without it, which opening the bundle will say."""
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    from qwen2x.runtimes.onnx_runtime import available_devices

    return available_devices()


def _bundle_of(
    model: str,
    device: str,
    revision: str | None,
    bits: str | None,
    group_size: str,
    dtype: str | None,
) -> Path:
    from qwen2x.exporters.bundle_cache import cached_bundle
    from qwen2x.exporters.options import Options

    if device == "auto":
        device = "cuda" if "cuda" in _usable_devices() else "cpu"
    options = Options(
        device=device,
        dtype=dtype,
        bits=int(bits) if bits else None,
        group_size=int(group_size),
    )
    with byte_progress("exporting (once)") as progress:
        folder = cached_bundle(model, options, revision=revision, progress=progress)
    log(f"using {folder}")
    return folder
