"""What a user may choose about an export, as a value."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from itertools import pairwise

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.rope import Rope
from qwen2x.quantize.errors import BackendError, ConfigError, SchemeError
from qwen2x.quantize.plan import BitPlan, units_of
from qwen2x.quantize.scheme import Scheme

TARGETS = ("onnx", "mlx")
# For all layers alike. Plans use 6 as well.
BITS = (4, 8)
DEFAULT_GROUP_SIZE = 32
LARGEST_FACTOR = 256
# auto: gptq for 4 bits and for budgets, else rtn.
METHODS = ("auto", "rtn", "gptq")
PREFERENCES = ("quality", "speed")

# What loses most by rounding, and what least at 8 bits, by the end of its path.
_SENSITIVE = ("qkv_proj", "embed_tokens", "lm_head")
_ROBUST = "gate_up_proj"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything but the source that decides a bundle's content; part of its cache key.

    Attributes:
        target: ``onnx`` or ``mlx``.
        device: ``cpu`` or ``cuda``, which an ONNX graph is built for (None: cpu). An MLX folder is
            for every device.
        dtype: float type of what is not quantized, and of activations; None is the target's choice.
        bits: 4 or 8, or None for floats (or for what a budget decides).
        group_size: weights that share a scale; None leaves it to a plan (with 4 bits) or is 32, and
            64 for gate and up with 8 bits.
        bits_per_weight: a budget of all stored bytes over all weights, which a plan of 4 and 8 bits
            spends.
        max_bytes: the same, for weights and what describes them to their runtime.
        asymmetric: a plan may also choose 4-bit groups with zero points of their own.
        prefer: ``quality``, or ``speed``: fewer bytes in what multiplies fastest, 4 or 8 bits in
            groups of 128.
        method: ``auto``, ``rtn`` or ``gptq``.
        calibration: the text file to measure with and to fit to; None is the mix that ships with
            qwen2x.
        kv_bits: 8 builds an ONNX graph whose KV cache holds codes of 8 bits; None is its float
            type. An MLX folder's cache is chosen when it runs.
        max_context: positions to prepare for; None is all that the model can.
        yarn: YaRN factors, rising, 1 first if there are several; None is the checkpoint's own.
        original_context: positions that the model was trained with, where its config is silent.
        graph: also trace an MLX folder's forward pass into ``decode.mlxfn``, which needs mlx.
        prefill_int8: also write an ONNX graph for the CPU that reads prompts by products of int8,
            with a copy of the layers' weights.
    """

    target: str = "onnx"
    device: str | None = None
    dtype: str | None = None
    bits: int | None = None
    group_size: int | None = None
    bits_per_weight: float | None = None
    max_bytes: int | None = None
    asymmetric: bool = False
    prefer: str = "quality"
    method: str = "auto"
    calibration: str | None = None
    kv_bits: int | None = None
    max_context: int | None = None
    yarn: tuple[float, ...] | None = None
    original_context: int | None = None
    graph: bool = False
    prefill_int8: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BackendError(f"target must be {' or '.join(TARGETS)}, got {self.target!r}")
        if self.bits not in (None, *BITS):
            words = ", ".join(str(bits) for bits in BITS)
            raise SchemeError(f"bits must be one of {words}, got {self.bits}")
        if self.method not in METHODS:
            raise SchemeError(f"method must be {' or '.join(METHODS)}, got {self.method!r}")
        self._require_sound_budget()
        self._require_sound_preference()
        self._require_kv_bits()
        self._require_factors()
        if self.calibration is not None and not self.reads_text:
            raise SchemeError(
                "--calibration is for --bits 4, --method gptq, budgets and --kv-bits; add one, or "
                "leave it out"
            )
        if self.graph and self.target != "mlx":
            raise BackendError("--graph is for --to mlx; an ONNX bundle is a graph: leave it out")
        if self.prefill_int8 and (self.target != "onnx" or self.device == "cuda"):
            place = "MLX" if self.target == "mlx" else "CUDA"
            raise BackendError(
                f"--prefill-int8 is for --to onnx on the CPU, got {place}; leave it out"
            )

    def _require_factors(self) -> None:
        if self.yarn is None:
            return
        factors = ",".join(f"{factor:g}" for factor in self.yarn)
        is_sound = all(1 <= factor <= LARGEST_FACTOR for factor in self.yarn)
        rises = all(low < high for low, high in pairwise(self.yarn))
        if not self.yarn or not is_sound or not rises:
            raise ConfigError(
                f"YaRN factors must rise within 1..{LARGEST_FACTOR}, such as 1,2,4; got {factors!r}"
            )
        if len(self.yarn) > 1 and self.yarn[0] != 1:
            raise ConfigError(
                f"several YaRN factors need 1 among them, for short prompts and other runtimes; "
                f"got {factors}, expected 1,{factors} or one factor"
            )

    def _require_sound_budget(self) -> None:
        budgets = {"--bits-per-weight": self.bits_per_weight, "--max-bytes": self.max_bytes}
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) == 2:
            raise SchemeError(f"{' and '.join(given)} are two budgets; give one of them")
        for name in given:
            if not budgets[name] > 0:  # type: ignore[operator]  # NaN too
                raise SchemeError(f"{name} must be above 0, got {budgets[name]}")
            if self.bits == 8 or self.group_size is not None:
                other = "--bits 8" if self.bits == 8 else f"--group-size {self.group_size}"
                raise SchemeError(f"{name} chooses bits and groups itself; leave out {other}")
        if self.asymmetric and not self.is_planned:
            raise SchemeError(
                "--asymmetric is for --bits 4 without --group-size, or a budget; leave it out"
            )

    def _require_sound_preference(self) -> None:
        if self.prefer not in PREFERENCES:
            raise SchemeError(f"prefer must be {' or '.join(PREFERENCES)}, got {self.prefer!r}")
        if self.prefer == "quality":
            return
        if not self.is_planned and (self.bits != 8 or self.group_size is not None):
            raise SchemeError(
                "--prefer speed is for --bits 4 and --bits 8 without --group-size (and with 4 bits "
                "without --method rtn), or a budget; leave it out"
            )

    def _require_kv_bits(self) -> None:
        if self.kv_bits is None:
            return
        if self.kv_bits != 8:
            raise BackendError(
                f"--kv-bits must be 8, got {self.kv_bits!r}; fewer spoil the keys of Qwen2, leave "
                "it out for floats"
            )
        if self.target == "mlx":
            raise BackendError(
                "an MLX folder's cache is chosen when it runs; leave --kv-bits out here, and give "
                "it to qwen2x run"
            )

    @property
    def has_budget(self) -> bool:
        """Whether bytes are limited."""
        return self.bits_per_weight is not None or self.max_bytes is not None

    @property
    def is_quantized(self) -> bool:
        """Whether matrices become integers."""
        return self.bits is not None or self.has_budget

    @property
    def scheme(self) -> Scheme | None:
        """For the layers' matrices but q, k and v, as far as no plan decides; None is float."""
        if not self.is_quantized:
            return None
        preferred = 128 if self.prefer == "speed" else DEFAULT_GROUP_SIZE
        return Scheme(
            bits=4 if self.bits is None else self.bits,
            group_size=preferred if self.group_size is None else self.group_size,
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether rounding is fitted to a text."""
        if self.method == "auto":
            return self.bits == 4 or self.has_budget
        return self.is_quantized and self.method == "gptq"

    @property
    def is_planned(self) -> bool:
        """Whether measurements decide which matrix gets which scheme."""
        is_preset = self.bits == 4 and self.group_size is None and self.is_calibrated
        return self.has_budget or is_preset

    @property
    def reads_text(self) -> bool:
        """Whether a text is read, to measure or to round, or for the cache."""
        return self.is_calibrated or self.is_planned or self.kv_bits is not None

    def bit_plan(self, config: Qwen2Config) -> BitPlan:
        """The scheme of every matrix, as far as no measurement decides."""
        units = units_of(config.num_hidden_layers, is_tied=config.is_tied)
        schemes: dict[str, Scheme | None] = dict.fromkeys(units, self.scheme)
        sensitive, robust = self._sensitive_scheme(config), self._robust_scheme(config)
        for unit in units:
            if unit.endswith(_SENSITIVE):
                schemes[unit] = sensitive
            elif unit.endswith(_ROBUST):
                schemes[unit] = robust
        return BitPlan(schemes=schemes)

    def _sensitive_scheme(self, config: Qwen2Config) -> Scheme | None:
        """8 bits for what loses most by rounding: q, k, v, embedding and head.

        With 4 bits there, the 0.5B checkpoint's divergence from PyTorch is nearly twice as large,
        for a sixth fewer bytes. Groups of 64 where they fit, of which products of several rows give
        the numbers of one row: at 8 bits smaller ones gain little.
        """
        if self.scheme is None or self.bits == 8:
            return self.scheme
        fits = config.hidden_size % 64 == 0
        return Scheme(bits=8, group_size=64 if fits else self.scheme.group_size)

    def _robust_scheme(self, config: Qwen2Config) -> Scheme | None:
        """Of gate and up with 8 bits: groups of 64, unless a size was asked for.

        So a bundle is smaller than llama.cpp's Q8_0 of the model. On the 0.5B checkpoint that costs
        a twentieth of the divergence from PyTorch; of any other matrix it costs more per byte.
        """
        is_preset = self.bits == 8 and self.group_size is None and self.prefer == "quality"
        if not is_preset or config.hidden_size % 64:
            return self.scheme
        return Scheme(bits=8, group_size=64)

    def ropes_of(self, config: Qwen2Config) -> tuple[Rope, ...]:
        """One per YaRN factor; the first is what other runtimes get.

        Raises:
            ConfigError: a factor that this model cannot have.
        """
        if self.yarn is None:
            return (config.rope,)
        return tuple(config.rope.with_factor(factor) for factor in self.yarn)

    def context_of(self, config: Qwen2Config) -> int:
        """Positions to prepare for.

        Raises:
            ConfigError: more than the model can be used for.
        """
        ropes = self.ropes_of(config)
        reach = max(rope.max_positions for rope in ropes)
        wanted = reach if self.max_context is None else self.max_context
        if not 1 <= wanted <= reach:
            factors = ",".join(f"{rope.factor:g}" for rope in ropes)
            raise ConfigError(
                f"--max-context must be in 1..{reach} for this model with --yarn {factors}, got "
                f"{wanted}; choose fewer positions, or a larger factor"
            )
        return wanted

    @property
    def key(self) -> str:
        """A short hash, for names in a cache; another version of qwen2x gives another."""
        text = json.dumps(asdict(self), sort_keys=True) + version()
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def version() -> str:
    """Of qwen2x."""
    return importlib.metadata.version("qwen2x")
