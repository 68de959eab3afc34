"""``--method gptq``: the text, the walk through the layers, and what is kept on disk meanwhile.

Only one layer's weights and the activations of the text are in memory. After every layer its codes
and the activations behind it are on disk, so that an interrupted export goes on there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer

from qwen2x.exporters.checkpoint import Checkpoint
from qwen2x.exporters.config import Qwen2Config
from qwen2x.quantize.calibrate import SchemeOf, Streams, calibrate_layer
from qwen2x.quantize.decoder import Shape
from qwen2x.quantize.errors import RequestError
from qwen2x.quantize.groups import QuantizedMatrix, dequantize, quantize
from qwen2x.quantize.packing import pack_bytes, unpack_bytes
from qwen2x.quantize.scheme import Scheme

Windows = NDArray[np.int64]
OnLayer = Callable[[int, int], None]
PREFIX = "calibration-"
_STREAMS = f"{PREFIX}streams.safetensors"
_WINDOW = 512
_MOST_WINDOWS = 48
_LEAST_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Windows of text int64 [windows, tokens] that quantization is fitted to.

    ``name`` is what the manifest calls it.
    """

    windows: Windows
    name: str

    @property
    def sha256(self) -> str:
        """Of the token ids."""
        return hashlib.sha256(np.ascontiguousarray(self.windows).tobytes()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"text": self.name, "tokens": int(self.windows.size), "sha256": self.sha256}


def read_calibration(folder: Path, path: Path | None, config: Qwen2Config) -> Calibration:
    """The user's text, or the mix that ships with qwen2x, as a checkpoint's tokens.

    Args:
        folder: of the checkpoint, with its ``tokenizer.json``.
        path: a text file; None is the mix.
        config: of the model.

    Raises:
        RequestError: no tokenizer, a text that cannot be read, or one that is too short.
    """
    tokenizer = _open_tokenizer(folder / "tokenizer.json")
    texts = _built_in() if path is None else [_read(path)]
    window = min(_WINDOW, config.rope.max_position_embeddings)
    rows: list[list[int]] = []
    count = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        count += len(ids)
        rows += [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    if count < _LEAST_TOKENS or not rows:
        raise RequestError(
            f"the calibration text has {count} tokens, expected {_LEAST_TOKENS} or more; "
            "add to it, or use --method rtn"
        )
    # Of every part of the mix a share, in an order that is always the same.
    order = np.random.default_rng(0).permutation(len(rows))[:_MOST_WINDOWS]
    windows = np.array([rows[index] for index in sorted(order)], np.int64)
    return Calibration(windows=windows, name="built-in mix" if path is None else path.name)


def _open_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise RequestError(f"{path.parent} has no {path.name}, which --method gptq needs; use rtn")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise RequestError(f"{path} cannot be read ({error}); fetch it again") from None
    # It may carry the settings of some training run; the text is taken whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(f"--calibration {path} cannot be read as UTF-8 text: {error}") from None


def _built_in() -> list[str]:
    """Prose, code, and conversations in the form that Qwen2's chat template gives them."""
    folder = resources.files("qwen2x.quantize") / "calibration"
    texts = []
    for part in sorted(folder.iterdir(), key=lambda item: item.name):
        text = part.read_text(encoding="utf-8")
        if part.name.endswith(".txt"):
            texts.append(text)
        elif part.name.endswith(".jsonl"):
            talks = [json.loads(line)["messages"] for line in text.splitlines() if line.strip()]
            texts.append("".join(_turn(turn) for talk in talks for turn in talk))
    return texts


def _turn(turn: Mapping[str, str]) -> str:
    return f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"


class CalibratedMatrices:
    """Codes and scales of all layers, on disk beside the bundle that is being written."""

    def __init__(self, staging: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in staging.glob(f"{PREFIX}layer-*.safetensors"):
            with safe_open(path, framework="numpy") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor was calibrated."""
        return f"{name}.codes" in self._files

    def rows(self, name: str, start: int, stop: int, scheme: Scheme) -> QuantizedMatrix:
        """Rows of a matrix, as ``quantize`` gives them."""
        # Opened anew each time: pages of an open file stay in memory, and Windows cannot delete it.
        with safe_open(self._files[f"{name}.codes"], framework="numpy") as file:
            packed = file.get_slice(f"{name}.codes")[start:stop]
            scales = file.get_slice(f"{name}.scales")[start:stop]
            zero_points = (
                None if scheme.is_symmetric else file.get_slice(f"{name}.zero_points")[start:stop]
            )
        return QuantizedMatrix(
            codes=unpack_bytes(packed, scheme.bits),
            scales=scales,
            scheme=scheme,
            zero_points=zero_points,
        )


def calibrate(
    checkpoint: Checkpoint,
    calibration: Calibration,
    scheme_of: SchemeOf,
    staging: Path,
    on_layer: OnLayer,
) -> CalibratedMatrices:
    """Rounds every layer, or those that an interrupted run left to do.

    Args:
        checkpoint: the float weights.
        calibration: the text.
        scheme_of: gives a matrix's scheme by its module path.
        staging: where codes and activations are kept.
        on_layer: told how many layers are done, and how many there are.
    """
    config = checkpoint.config
    shape = Shape(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        inverse_frequencies=config.rope.inverse_frequencies(),
        attention_factor=config.rope.attention_factor,
    )
    done, streams = _restore(staging) or (0, None)
    if streams is None:
        streams = _embed(checkpoint, calibration, scheme_of)
    on_layer(done, config.num_hidden_layers)
    for layer in range(done, config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        matrices = calibrate_layer(prefix, checkpoint.rows, scheme_of, shape, streams)
        _save(_layer_file(staging, layer), _stored(matrices))
        states = {"exact": streams.exact, "rounded": streams.rounded}
        _save(staging / _STREAMS, states | {"layers": np.array([layer + 1])})
        on_layer(layer + 1, config.num_hidden_layers)
    return CalibratedMatrices(staging)


def calibration_memory(config: Qwen2Config) -> int:
    """An estimate of the bytes that calibration holds at its peak, with the longest text."""
    window = min(_WINDOW, config.rope.max_position_embeddings)
    hidden = config.hidden_size
    widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim, hidden)
    # Both streams, their inputs and outputs; moments and their factor; a matrix and its trials.
    activations = 4 * _MOST_WINDOWS * window * (7 * hidden + 6 * widest)
    return activations + 40 * widest**2 + 64 * hidden * widest


def is_calibration_file(name: str) -> bool:
    """Whether a file is kept for calibration alone."""
    return name.startswith(PREFIX)


def _layer_file(staging: Path, layer: int) -> Path:
    return staging / f"{PREFIX}layer-{layer:03}.safetensors"


def _restore(staging: Path) -> tuple[int, Streams] | None:
    """Layers that are done and the streams behind them, if all that they left is there."""
    path = staging / _STREAMS
    if not path.is_file():
        return None
    states = load_file(path)
    done = int(states["layers"][0])
    if not all(_layer_file(staging, layer).is_file() for layer in range(done)):
        return None
    return done, Streams(exact=states["exact"], rounded=states["rounded"])


def _embed(checkpoint: Checkpoint, calibration: Calibration, scheme_of: SchemeOf) -> Streams:
    """The rows of the embedding that the text names, as floats and rounded."""
    name = "model.embed_tokens.weight"
    used, places = np.unique(calibration.windows, return_inverse=True)
    rows = np.concatenate([checkpoint.rows(name, int(token), int(token) + 1) for token in used])
    scheme = scheme_of("model.embed_tokens")
    rounded = rows if scheme is None else dequantize(quantize(rows, scheme))
    places = places.reshape(calibration.windows.shape)
    return Streams(exact=rows[places], rounded=rounded[places])


def _stored(matrices: Mapping[str, QuantizedMatrix]) -> dict[str, NDArray[Any]]:
    stored: dict[str, NDArray[Any]] = {}
    for name, matrix in matrices.items():
        stored[f"{name}.codes"] = pack_bytes(matrix.codes, matrix.scheme.bits)
        stored[f"{name}.scales"] = matrix.scales
        if matrix.zero_points is not None:
            stored[f"{name}.zero_points"] = matrix.zero_points
    return stored


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Written beside its place and renamed, so that a killed run leaves whole files."""
    temporary = path.with_name(f"{path.name}.new")
    # Not save_file, whose errors do not tell a full disk from a fault.
    with temporary.open("wb") as file:
        file.write(save(dict(arrays)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
