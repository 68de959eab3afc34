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
from qwen2x.exporters.rope import Rope
from qwen2x.quantize.calibrate import SchemeOf, Streams, calibrate_layer
from qwen2x.quantize.decoder import Shape
from qwen2x.quantize.errors import RequestError
from qwen2x.quantize.gptq import moments_memory
from qwen2x.quantize.groups import Float, QuantizedMatrix
from qwen2x.quantize.packing import pack_bytes, unpack_bytes
from qwen2x.quantize.plan import EMBEDDING
from qwen2x.quantize.scheme import Scheme

Windows = NDArray[np.int64]
# Gives an embedding's rows of some tokens, as floats that were rounded.
RoundedRows = Callable[[Windows], Float]
# Told what is done to layers ("measured" or "rounded"), how many are done, and of how many.
OnLayer = Callable[[str, int, int], None]
PREFIX = "calibration-"
_STREAMS = f"{PREFIX}streams.safetensors"
_WINDOW = 512
_MOST_WINDOWS = 48
_LEAST_TOKENS = 2048
# Windows that nothing is fitted to, so that they tell what was lost: one of so many, few in all.
_HELD_OUT_SHARE, _MOST_HELD_OUT = 5, 4


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Windows of text int64 [windows, tokens] that quantization is fitted to.

    Attributes:
        windows: the text.
        held_out: windows that nothing is fitted to, int64 [some, tokens].
        name: what the manifest calls it.
    """

    windows: Windows
    held_out: Windows
    name: str

    @property
    def sha256(self) -> str:
        """Of the token ids."""
        both = np.concatenate([self.windows, self.held_out])
        return hashlib.sha256(np.ascontiguousarray(both).tobytes()).hexdigest()

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
    window = window_of(config)
    rows: list[list[int]] = []
    count = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        count += len(ids)
        rows += [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    if count < _LEAST_TOKENS or not rows:
        raise RequestError(
            f"the calibration text has {count} tokens, expected {_LEAST_TOKENS} or more; "
            "add to it, or use --method rtn without --kv-bits"
        )
    # Of every part of the mix a share, in an order that is always the same.
    order = np.random.default_rng(0).permutation(len(rows))
    held_out = min(_MOST_HELD_OUT, len(rows) // _HELD_OUT_SHARE)
    used = order[held_out : held_out + _MOST_WINDOWS]
    all_rows = np.array(rows, np.int64)
    return Calibration(
        windows=all_rows[np.sort(used)],
        held_out=all_rows[np.sort(order[:held_out])],
        name="built-in mix" if path is None else path.name,
    )


def _open_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise RequestError(
            f"{path.parent} has no {path.name}, which --method gptq and --kv-bits need; use rtn "
            "without --kv-bits"
        )
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
    rounded_rows: RoundedRows,
    staging: Path,
    on_layer: OnLayer,
) -> tuple[CalibratedMatrices, Streams]:
    """Rounds every layer, or those that an interrupted run left to do.

    Args:
        checkpoint: the float weights.
        calibration: the text.
        scheme_of: gives a matrix's scheme by its module path.
        rounded_rows: of the embedding.
        staging: where codes and activations are kept.
        on_layer: told of layers that are done.

    Returns:
        The matrices, and both streams of the windows that were held out, behind the last layer.
    """
    layers, shape = checkpoint.config.num_hidden_layers, shape_of(checkpoint.config)
    done, streams = _restore(staging) or (0, None)
    if streams is None:
        streams = _embed(checkpoint, calibration, rounded_rows)
    on_layer("rounded", done, layers)
    for layer in range(done, layers):
        prefix = f"model.layers.{layer}."
        matrices = calibrate_layer(prefix, checkpoint.rows, scheme_of, shape, streams)
        save_arrays(_layer_file(staging, layer), _stored(matrices))
        states = {"exact": streams.exact, "rounded": streams.rounded}
        sizes = np.array([layer + 1, streams.held_out])
        save_arrays(staging / _STREAMS, states | {"sizes": sizes})
        on_layer("rounded", layer + 1, layers)
    return CalibratedMatrices(staging), streams


def shape_of(config: Qwen2Config, rope: Rope | None = None) -> Shape:
    """The numbers that a layer is computed with; the rope is the config's own unless given."""
    rope = rope or config.rope
    return Shape(
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        inverse_frequencies=rope.inverse_frequencies(),
        attention_factor=rope.attention_factor,
    )


def embedding_rows(checkpoint: Checkpoint, windows: Windows) -> tuple[Float, NDArray[np.int64]]:
    """The rows that a text uses, float32 [used, hidden], and which of them each token has."""
    used, places = np.unique(windows, return_inverse=True)
    return rows_of(checkpoint, used), places.reshape(windows.shape)


def rows_of(checkpoint: Checkpoint, tokens: Windows) -> Float:
    """The embedding's rows of some tokens, float32 [tokens, hidden]."""
    name = f"{EMBEDDING}.weight"
    return np.concatenate([checkpoint.rows(name, int(token), int(token) + 1) for token in tokens])


def save_table(staging: Path, name: str, matrix: QuantizedMatrix) -> None:
    """Keeps an embedding or head as layers are kept."""
    save_arrays(staging / f"{PREFIX}layer-table.safetensors", _stored({name: matrix}))


def window_of(config: Qwen2Config) -> int:
    """Tokens that are read at once."""
    return min(_WINDOW, config.rope.max_position_embeddings)


def calibration_memory(config: Qwen2Config) -> int:
    """An estimate of the bytes that calibration holds at its peak, with the longest text."""
    window = window_of(config)
    hidden = config.hidden_size
    widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim, hidden)
    # Both streams and their inputs, what is widest within them, moments with a factor that is
    # being made, a matrix and its trials.
    windows = _MOST_WINDOWS + _MOST_HELD_OUT
    activations = 4 * windows * window * (4 * hidden + 2 * widest)
    return activations + moments_memory(widest) + 48 * hidden * widest


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
    done, held_out = (int(size) for size in states["sizes"])
    if not all(_layer_file(staging, layer).is_file() for layer in range(done)):
        return None
    return done, Streams(exact=states["exact"], rounded=states["rounded"], held_out=held_out)


def _embed(checkpoint: Checkpoint, calibration: Calibration, rounded_rows: RoundedRows) -> Streams:
    """The rows of the embedding that the text names, as floats and rounded."""
    windows = np.concatenate([calibration.windows, calibration.held_out])
    rows, places = embedding_rows(checkpoint, windows)
    rounded = rounded_rows(np.unique(windows))
    return Streams(exact=rows[places], rounded=rounded[places], held_out=len(calibration.held_out))


def _stored(matrices: Mapping[str, QuantizedMatrix]) -> dict[str, NDArray[Any]]:
    stored: dict[str, NDArray[Any]] = {}
    for name, matrix in matrices.items():
        stored[f"{name}.codes"] = pack_bytes(matrix.codes, matrix.scheme.bits)
        stored[f"{name}.scales"] = matrix.scales
        if matrix.zero_points is not None:
            stored[f"{name}.zero_points"] = matrix.zero_points
    return stored


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Written beside its place and renamed, so that a killed run leaves whole files."""
    temporary = path.with_name(f"{path.name}.new")
    # Not save_file, whose errors do not tell a full disk from a fault.
    with temporary.open("wb") as file:
        file.write(save(dict(arrays)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
