"""Options that several commands share, and what they open."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2x.cli.output import byte_progress, layer_progress, log
from qwen2x.quantize.errors import BackendError, RequestError

if TYPE_CHECKING:
    from qwen2x.runtimes.runtime import Runtime
    from qwen2x.runtimes.sampler import Sampling

MEGABYTE = 1_000_000
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

reading_options = _together(
    click.option(
        "--text", type=click.Path(path_type=Path), help="The text to read. Default: a built-in mix."
    ),
    click.option(
        "--tokens", type=int, default=1024, show_default=True, help="How many to compare."
    ),
    click.option("--window", type=int, default=512, show_default=True, help="Tokens read at once."),
)

quantize_options = _together(
    click.option(
        "--bits",
        type=click.Choice(["4", "8"]),
        help="Quantize. 4: mostly; what loses most by it has 8. Default: float weights.",
    ),
    click.option(
        "--group-size",
        type=click.Choice(["32", "64", "128"]),
        help="Weights that share a scale. Default: what measurements say for 4 bits, else 32 (64 "
        "for gate and up).",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        help="Float type. Default: for onnx float32 on cpu, bfloat16 on cuda; for mlx the "
        "checkpoint's own.",
    ),
)

place_options = _together(
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda", "metal"]),
        default="auto",
        show_default=True,
        help="Where it runs. auto: what an ONNX bundle was made for, if it is here; a GPU for MLX.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        help="Threads on the CPU. Default: one per physical core. MLX decides itself.",
    ),
    click.option(
        "--graph", is_flag=True, help="Run an MLX folder's decode.mlxfn (export --to mlx --graph)."
    ),
    click.option(
        "--kv-bits",
        type=click.Choice(["8"]),
        help="Keep the KV cache in 8 bits; an ONNX bundle must be exported so. Default: as the "
        "bundle has it, floats for a checkpoint.",
    ),
)

prompt_cache_option = click.option(
    "--prompt-cache",
    type=click.Path(path_type=Path),
    help="A file that keeps the KV cache of a long prompt: what another prompt with this bundle "
    "begins with as well is not read again. It is written where it is missing, and when another "
    "long text takes its place. Default: none.",
)

model_options = _together(
    click.option(
        "--backend",
        type=click.Choice(["onnx", "mlx", "torch"]),
        help="What runs the model. Default: what the bundle is for; for a checkpoint mlx on a Mac "
        "with Apple silicon, else onnx.",
    ),
    place_options,
    click.option(
        "--revision", help="Branch, tag or commit, when MODEL is a hub id. Default: main."
    ),
    click.option(
        "--prefill-memory",
        type=click.IntRange(1),
        default=512,
        show_default=True,
        help="MB that reading a prompt may take beside weights and KV cache: what is read at once "
        "becomes smaller far into a long one.",
    ),
)

sampling_options = _together(
    click.option(
        "--max-tokens",
        type=click.IntRange(1),
        help="New tokens at most. Default: until it ends, or the context that goes with the prompt "
        "is full.",
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


def read_yarn(context: click.Context, option: object, text: str) -> float | str:
    """``auto``, or a factor."""
    if text == "auto":
        return text
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor < float("inf"):
        raise click.UsageError(
            f"--yarn must be auto or a factor of 1 or more, got {text!r}", context
        )
    return factor


yarn_option = click.option(
    "--yarn",
    default="auto",
    show_default=True,
    callback=read_yarn,
    help="YaRN factor. auto: the smallest of the bundle's that reaches over prompt and answer; a "
    "conversation that outgrows it is read again with the next one. Or one of them, such as 4.",
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
    graph: bool = False,
    kv_bits: str | None = None,
    yarn: float | str = "auto",
    prefill_memory: int,
    room: int | None = None,
    **making: Any,
) -> Runtime:
    """A runtime for a bundle, or for a checkpoint, whose bundle is made once and kept.

    Args:
        model: a bundle, a Hugging Face folder, or a hub id.
        backend: ``onnx``, ``mlx``, or ``torch``, which runs checkpoints as they are.
        device: ``auto``, ``cpu``, ``cuda`` or ``metal``.
        threads: on the CPU; None is the backend's own choice.
        graph: run an MLX folder's ``decode.mlxfn``.
        kv_bits: of the KV cache; None is the bundle's own, floats for a checkpoint.
        yarn: a factor that there must be, or ``auto``.
        prefill_memory: MB for reading a prompt.
        room: positions that will be used at most, where that is known.
        **making: revision, bits, group_size, dtype: of the bundle that a checkpoint becomes.
    """
    from qwen2x.runtimes.runtime import open_runtime

    folder = find_model(
        model, backend=backend, device=device, graph=graph, kv_bits=kv_bits, **making
    )
    return open_runtime(
        folder,
        backend=backend,
        device=device,
        threads=threads,
        graph=graph,
        kv_bits=int(kv_bits) if kv_bits else None,
        yarn=() if isinstance(yarn, str) else (yarn,),
        prefill_memory=prefill_memory * MEGABYTE,
        room=room,
    )


def find_model(
    model: str,
    *,
    backend: str | None,
    device: str,
    graph: bool,
    kv_bits: str | None,
    **making: Any,
) -> Path:
    """The folder that ``open_model`` opens; a bundle of a checkpoint is made if there is none."""
    from qwen2x.exporters.bundle import is_bundle
    from qwen2x.exporters.hub import resolve_source
    from qwen2x.runtimes.runtime import default_backend

    folder = Path(model)
    if backend == "torch" and not is_bundle(folder):
        _refuse(making, ("bits", "dtype"), "backend torch runs a checkpoint as it is, in float32")
        folder = open_source(model, making["revision"])
    else:
        is_local = is_bundle(folder)
        if not is_local:
            folder = resolve_source(model, revision=making["revision"])
        if is_bundle(folder):
            names = ("bits", "dtype", *(("revision",) if is_local else ()))
            _refuse(making, names, f"{model} is a bundle, which is made")
        else:
            target = backend or default_backend()
            _require_runnable(model, target, device, graph)
            baked = int(kv_bits) if kv_bits and target == "onnx" else None
            folder = _bundle_of(model, target, device, kv_bits=baked, **making)
    return folder


def open_source(
    source: str | Path, revision: str | None, original_context: int | None = None
) -> Path:
    """The local folder of a checkpoint whose config and tensors' headers are those of a Qwen2.

    Raises:
        InputError: it is none, or not whole.
    """
    from qwen2x.exporters.bundle import is_bundle
    from qwen2x.exporters.checkpoint import open_checkpoint
    from qwen2x.exporters.hub import resolve_source

    if is_bundle(Path(source)):
        raise RequestError(f"expected a checkpoint, got the bundle {source}; give what it is of")
    folder = resolve_source(source, revision=revision)
    with open_checkpoint(folder, original_context) as checkpoint:
        return checkpoint.folder


def _refuse(making: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    given = [f"--{name}" for name in names if making[name] is not None]
    if given:
        raise RequestError(f"{reason}; leave out {' and '.join(given)}")


def _require_runnable(model: str, target: str, device: str, graph: bool) -> None:
    """Raises what opening the bundle of a checkpoint would, before it is made."""
    if graph:
        raise RequestError(
            f"--graph runs a bundle's decode.mlxfn, and {model} is a checkpoint; make one first: "
            f"qwen2x export {model} --to mlx --graph -o FOLDER"
        )
    if target == "mlx":
        with suppress(ImportError):  # what is not installed is told when the bundle is opened
            from qwen2x.runtimes.mlx_runtime import choose_device

            choose_device(device)


def _usable_devices() -> list[str]:
    """What onnxruntime offers here; nothing without it, which opening the bundle will say."""
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    from qwen2x.runtimes.onnx_provider import available_devices

    return available_devices()


def _bundle_of(
    model: str,
    target: str,
    device: str,
    *,
    kv_bits: int | None,
    revision: str | None,
    bits: str | None,
    group_size: str | None,
    dtype: str | None,
) -> Path:
    from qwen2x.exporters.bundle_cache import cached_bundle
    from qwen2x.exporters.options import Options

    options = Options(
        target=target,
        device=_graph_device(device) if target == "onnx" else None,
        dtype=dtype,
        bits=int(bits) if bits else None,
        group_size=int(group_size) if group_size else None,
        kv_bits=kv_bits,
    )
    with byte_progress("exporting (once)") as progress:
        folder = cached_bundle(
            model, options, revision=revision, progress=progress, on_layer=layer_progress()
        )
    log(f"using {folder}")
    return folder


def _graph_device(device: str) -> str:
    """What an ONNX graph is built for when it is to run on a device."""
    if device == "metal":
        raise BackendError("onnxruntime has no device metal; use --backend mlx, or --device cpu")
    usable = _usable_devices()
    if device == "auto":
        return "cuda" if "cuda" in usable else "cpu"
    if usable and device not in usable:
        raise BackendError(
            f'onnxruntime has no {device} here; pip install "qwen2x[{device}]" (and uninstall the '
            "other onnxruntime first)"
        )
    return device
