"""What a user may choose about an export, as a value."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass

from qwen2x.exporters.config import Qwen2Config
from qwen2x.quantize.errors import BackendError, ConfigError, SchemeError
from qwen2x.quantize.plan import BitPlan, units_of
from qwen2x.quantize.scheme import Scheme

TARGETS = ("onnx", "mlx")
DEFAULT_GROUP_SIZE = 32
# auto is the best that there is: today rounding to scales of least squared error.
METHODS = ("auto", "rtn", "gptq")

# What loses most by rounding, by the end of its path.
_SENSITIVE = ("qkv_proj", "embed_tokens", "lm_head")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything but the source that decides a bundle's content; part of its cache key.

    Attributes:
        target: ``onnx`` or ``mlx``.
        device: ``cpu`` or ``cuda``, which an ONNX graph is built for (None: cpu). An MLX folder is
            for every device.
        dtype: float type of what is not quantized, and of activations; None is the target's choice.
        bits: 4 or 8, or None for floats.
        group_size: weights that share a scale.
        method: ``auto``, ``rtn`` or ``gptq``.
        calibration: the text file that gptq fits to; None is the mix that ships with qwen2x.
        max_context: positions to prepare for; None is all that the model can.
        graph: also trace an MLX folder's forward pass into ``decode.mlxfn``, which needs mlx.
    """

    target: str = "onnx"
    device: str | None = None
    dtype: str | None = None
    bits: int | None = None
    group_size: int = DEFAULT_GROUP_SIZE
    method: str = "auto"
    calibration: str | None = None
    max_context: int | None = None
    graph: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BackendError(f"target must be {' or '.join(TARGETS)}, got {self.target!r}")
        if self.method not in METHODS:
            raise SchemeError(f"method must be {' or '.join(METHODS)}, got {self.method!r}")
        if self.calibration is not None and not self.is_calibrated:
            raise SchemeError(
                "--calibration is for --method gptq with --bits; add them, or leave it out"
            )
        if self.graph and self.target != "mlx":
            raise BackendError("--graph is for --to mlx; an ONNX bundle is a graph: leave it out")

    @property
    def scheme(self) -> Scheme | None:
        """For the layers' matrices but q, k and v; None is float."""
        if self.bits is None:
            return None
        return Scheme(bits=self.bits, group_size=self.group_size)

    @property
    def is_calibrated(self) -> bool:
        """Whether rounding is fitted to a text."""
        return self.bits is not None and self.method == "gptq"

    def bit_plan(self, config: Qwen2Config) -> BitPlan:
        """The scheme of every matrix, as far as no measurement decides."""
        units = units_of(config.num_hidden_layers, is_tied=config.is_tied)
        sensitive = self._sensitive_scheme(config)
        return BitPlan(
            schemes={
                unit: sensitive if unit.endswith(_SENSITIVE) else self.scheme for unit in units
            }
        )

    def _sensitive_scheme(self, config: Qwen2Config) -> Scheme | None:
        """8 bits for what loses most by rounding: q, k, v, embedding and head.

        With 4 bits there, the 0.5B checkpoint's divergence from PyTorch is nearly twice as large,
        for a sixth fewer bytes. Groups of 128 where they fit: at 8 bits smaller ones gain nothing,
        and the head is read whole for every token.
        """
        if self.bits in (None, 8):
            return self.scheme
        fits = config.hidden_size % 128 == 0
        return Scheme(bits=8, group_size=128 if fits else self.group_size)

    def context_of(self, config: Qwen2Config) -> int:
        """Positions to prepare for.

        Raises:
            ConfigError: more than the model can be used for.
        """
        reach = config.rope.max_positions
        wanted = reach if self.max_context is None else self.max_context
        if not 1 <= wanted <= reach:
            raise ConfigError(f"--max-context must be in 1..{reach} for this model, got {wanted}")
        return wanted

    @property
    def key(self) -> str:
        """A short hash, for names in a cache; another version of qwen2x gives another."""
        text = json.dumps(asdict(self), sort_keys=True) + version()
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def version() -> str:
    """Of qwen2x."""
    return importlib.metadata.version("qwen2x")
