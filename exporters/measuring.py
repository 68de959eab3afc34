"""What each of a checkpoint's units loses by rounding, and what is kept on disk of it.

States are kept beside the bundle until all layers are measured; the result is kept in the user's
cache, so that another budget, or another target, need not measure again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qwen2x.exporters.calibration import (
    PREFIX,
    Calibration,
    OnLayer,
    embedding_rows,
    save_arrays,
    shape_of,
    window_of,
)
from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.config import Qwen2Config
from qwen2x.quantize.decoder import norm
from qwen2x.quantize.divergence import Head
from qwen2x.quantize.groups import Float
from qwen2x.quantize.scheme import Scheme, parse_scheme
from qwen2x.quantize.sensitivity import (
    Losses,
    Probes,
    measure_losses,
    probe_embedding,
    probe_layer,
)

_PROBES = f"{PREFIX}probes.safetensors"
# Raised when other numbers would come out.
_REVISION = 1
# Windows whose exact states the head is fitted to, of which the first few are also probed.
_WINDOWS, _PROBED_WINDOWS, _PROBED_TOKENS = 16, 4, 256
# The probed states of all units together; of larger models fewer tokens are probed.
_PROBED_BYTES = 2 << 30
_UNITS_PER_LAYER = 4
_SECONDS_BETWEEN_SAVES = 60


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Losses by unit and scheme, and of the head's inputs the sum of x x^T [hidden, hidden]."""

    losses: Losses
    head_products: Float


def measure(
    checkpoint: Checkpoint,
    calibration: Calibration,
    schemes: Sequence[Scheme],
    staging: Path,
    kept_in: Path,
    on_layer: OnLayer,
) -> Measurement:
    """Measures every unit, or goes on where an interrupted run stopped.

    Args:
        checkpoint: the float weights.
        calibration: the text.
        schemes: between which a plan will choose.
        staging: where states are kept meanwhile.
        kept_in: the folder for results.
        on_layer: told of layers that are done.
    """
    layers = checkpoint.config.num_hidden_layers
    place = kept_in / f"{_key(checkpoint, calibration, schemes)}.safetensors"
    found = _restore_measurement(place)
    if found is not None:
        on_layer("measured", layers, layers)
        return found
    done, probes = _restore(staging) or (0, None)
    if probes is None:
        probes = _begin(checkpoint, calibration)
    on_layer("measured", done, layers)
    saved = time.monotonic()
    for layer in range(done, layers):
        prefix = f"model.layers.{layer}."
        probe_layer(prefix, checkpoint.rows, schemes, shape_of(checkpoint.config), probes)
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES and layer + 1 < layers:
            _save(staging, layer + 1, probes)
            saved = time.monotonic()
        on_layer("measured", layer + 1, layers)
    measurement = _conclude(checkpoint, probes, schemes)
    _save_measurement(place, measurement)
    return measurement


def _key(checkpoint: Checkpoint, calibration: Calibration, schemes: Sequence[Scheme]) -> str:
    """A short hash of all that a result depends on."""
    names = [scheme.name for scheme in schemes]
    parts = [_REVISION, names, calibration.sha256, checkpoint.identity()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def probed_tokens(config: Qwen2Config, window: int) -> int:
    """Tokens of each probed window, so that the states of all units stay within bounds."""
    units = _UNITS_PER_LAYER * config.num_hidden_layers + 1
    fitting = _PROBED_BYTES // (units * config.hidden_size * 4 * _PROBED_WINDOWS)
    return max(1, min(_PROBED_TOKENS, window, fitting))


def measuring_memory(config: Qwen2Config) -> int:
    """An estimate of the bytes that measuring holds at its peak, with the longest text."""
    window = window_of(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    states = _PROBED_WINDOWS * probed_tokens(config, window) * hidden * 4
    activations = 4 * _WINDOWS * window * (6 * hidden + 3 * inner)
    return (
        states * (_UNITS_PER_LAYER * config.num_hidden_layers + 8)
        + activations
        + (4 * 6 * hidden * inner)
    )


def _begin(checkpoint: Checkpoint, calibration: Calibration) -> Probes:
    windows = _spread(calibration.windows)
    rows, places = embedding_rows(checkpoint, windows)
    probes = Probes(
        exact=rows[places],
        windows=min(_PROBED_WINDOWS, len(windows)),
        tokens=probed_tokens(checkpoint.config, windows.shape[1]),
    )
    probe_embedding(rows, places, probes)
    return probes


def _spread(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Some windows of all parts of the text, the first few of them as different as may be."""
    count = min(_WINDOWS, len(windows))
    chosen = np.linspace(0, len(windows) - 1, count).astype(np.int64)
    step = max(1, count // _PROBED_WINDOWS)
    order = [index for start in range(step) for index in range(start, count, step)]
    spread: NDArray[np.int64] = windows[chosen[order]]
    return spread


def _conclude(checkpoint: Checkpoint, probes: Probes, schemes: Sequence[Scheme]) -> Measurement:
    config = checkpoint.config
    final_norm = checkpoint.rows("model.norm.weight")
    normed = norm(probes.exact, final_norm, config.rms_norm_eps).reshape(-1, config.hidden_size)
    losses = measure_losses(probes, final_norm, head_of(checkpoint), schemes, config.rms_norm_eps)
    return Measurement(losses=losses, head_products=normed.T @ normed)


def head_of(checkpoint: Checkpoint) -> Head:
    """The head's rows, which may be the embedding's."""
    config = checkpoint.config
    name = "model.embed_tokens.weight" if config.is_tied else "lm_head.weight"
    return Head(
        vocab_size=config.vocab_size, read=lambda start, stop: checkpoint.rows(name, start, stop)
    )


def _save(staging: Path, layers: int, probes: Probes) -> None:
    """One file with everything; errors by unit and scheme are in its header's place, as JSON."""
    arrays: dict[str, NDArray[Any]] = {
        f"rounded.{unit}": states for unit, states in probes.rounded.items()
    }
    errors = json.dumps(_named(probes.errors)).encode()
    arrays |= {
        "exact": probes.exact,
        "sizes": np.array([layers, probes.windows, probes.tokens]),
        "errors": np.frombuffer(errors, np.uint8),
    }
    save_arrays(staging / _PROBES, arrays)


def _restore(staging: Path) -> tuple[int, Probes] | None:
    path = staging / _PROBES
    if not path.is_file():
        return None
    arrays = load_file(path)
    layers, windows, tokens = (int(size) for size in arrays["sizes"])
    start = "rounded."
    return layers, Probes(
        exact=arrays["exact"],
        windows=windows,
        tokens=tokens,
        rounded={
            name.removeprefix(start): states
            for name, states in arrays.items()
            if name.startswith(start)
        },
        errors=_parsed(json.loads(arrays["errors"].tobytes())),
    )


def _save_measurement(path: Path, measurement: Measurement) -> None:
    """A cache that cannot be written costs time alone."""
    losses = np.frombuffer(json.dumps(_named(measurement.losses)).encode(), np.uint8)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, {"products": measurement.head_products, "losses": losses})


def _restore_measurement(path: Path) -> Measurement | None:
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError):
        return None
    return Measurement(
        losses=_parsed(json.loads(arrays["losses"].tobytes())), head_products=arrays["products"]
    )


def _named(losses: Losses) -> dict[str, dict[str, float]]:
    return {
        unit: {scheme.name: loss for scheme, loss in of_unit.items()}
        for unit, of_unit in losses.items()
    }


def _parsed(losses: dict[str, dict[str, float]]) -> Losses:
    return {
        unit: {parse_scheme(name): loss for name, loss in of_unit.items()}
        for unit, of_unit in losses.items()
    }
