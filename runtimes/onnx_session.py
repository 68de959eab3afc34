"""Sessions of a bundle's graphs, and the errors of onnxruntime in our words."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort

from qwen2x.exporters.bundle import Bundle
from qwen2x.quantize.errors import BackendError, BundleError
from qwen2x.runtimes.device_memory import is_out_of_memory, out_of_memory
from qwen2x.runtimes.onnx_provider import PROVIDERS, Start
from qwen2x.runtimes.profile import GraphRun, read_runs

GRAPH_FILE = "model.onnx"
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def not_runnable(bundle: Bundle, error: Exception, file: str = GRAPH_FILE) -> Exception:
    """The errors of onnxruntime as a BundleError or BackendError; anything else as it is."""
    kind = type(error)
    if not kind.__module__.startswith("onnxruntime") and kind is not RuntimeError:
        return error
    if is_out_of_memory(str(error)):
        return out_of_memory(bundle)
    reason = str(error).strip().splitlines()[0]
    return BundleError(f"onnxruntime cannot use {bundle.folder / file}: {reason}")


def _require_promised_shapes(bundle: Bundle, session: Any) -> None:
    """Raises BundleError where the graph is not the one that the manifest describes."""
    cache = bundle.cache
    past = [item for item in session.get_inputs() if item.name.startswith("past_key_values.")]
    wanted = (2 * cache["layers"], cache["num_key_value_heads"], cache["head_dim"])
    found = (len(past), past[0].shape[1], past[0].shape[3]) if past else (0, 0, 0)
    columns = next(item.shape[-1] for item in session.get_outputs() if item.name == "logits")
    if (*found, columns) != (*wanted, bundle.vocab_size):
        raise BundleError(
            f"{bundle.folder}: the manifest says {wanted} cache arrays, heads and head size and "
            f"{bundle.vocab_size} logits, the graph has {found} and {columns}; "
            "export the bundle again"
        )


def recorded_runs(session: Any) -> list[GraphRun]:
    """What a session that was started with a record has done; its record ends."""
    began = session.get_profiling_start_time_ns() * 1e-9
    return read_runs(Path(session.end_profiling()), began)


def open_session(bundle: Bundle, start: Start, graph: bytes | None = None) -> Any:
    """A session of the bundle's graph, or of one in memory that uses the bundle's weights."""
    session = start_session(bundle, start, graph or bundle.folder / GRAPH_FILE)
    _require_promised_shapes(bundle, session)
    return session


def start_session(bundle: Bundle, start: Start, model: bytes | Path) -> Any:
    """A session of a graph file of the bundle, or of a graph that uses its weights."""
    provider = PROVIDERS[start.device]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = start.threads or 0
    if start.record is not None:
        options.enable_profiling = True
        # A folder for each session: the profiler's names are no finer than a second.
        folder = tempfile.mkdtemp(dir=start.record)
        options.profile_file_prefix = str(Path(folder) / "runs")
    for key, value in provider.session.items():
        options.add_session_config_entry(key, value)
    graph_options = provider.graph_options if start.is_captured else {}
    providers: list[Any] = [(provider.name, {**provider.options, **graph_options})]
    if provider.has_own_memory:
        ort.preload_dlls()
        providers.append(PROVIDERS["cpu"].name)
    if isinstance(model, bytes):
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.folder))
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:
        file = model.name if isinstance(model, Path) else GRAPH_FILE
        raise not_runnable(bundle, error, file) from None
    if provider.name not in session.get_providers():
        raise BackendError(
            f"onnxruntime could not start {provider.name}; check the driver and the CUDA "
            "libraries, or use --device cpu"
        )
    return session
