"""``quantization_config`` of a GPTQ or AWQ checkpoint: read, checked, refused.

Keys as transformers 5.24 has them (``utils/quantization_config.py``), and GPTQModel 7
(``quantization/config.py``) beyond these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen2x.quantize.errors import ConfigError
from qwen2x.quantize.plan import LAYER_UNITS
from qwen2x.quantize.scheme import GROUP_SIZES, Scheme

Shapes = dict[str, tuple[int, ...]]
WORD_BITS = 32
_BITS = {"gptq": (4, 8), "awq": (4,)}
# What is added to a stored zero point. AutoGPTQ's format, now called gptq, stores them minus one.
_ZERO_OFFSETS = {"gptq": {"gptq": 1, "gptq_v2": 0}, "awq": {"gemm": 0}}
# Keys that change what the tensors mean: the values that change nothing.
_UNCHANGED: dict[str, tuple[Any, ...]] = {
    "dynamic": (None, {}),
    "lm_head": (None, False),
    "pack_dtype": (None, "int32", "torch.int32"),
    "is_marlin_format": (None, False),
    "rotation": (None, ""),
    "adapter": (None, {}),
}


@dataclass(frozen=True, kw_only=True)
class StoredQuantization:
    """How another program has quantized the matrices within layers.

    Attributes:
        method: ``gptq`` or ``awq``.
        bits: of a code.
        group_size: inputs that share a scale; None: all of a matrix.
        is_symmetric: whether all zero points are said to be ``2**(bits - 1)``.
        is_ordered: whether groups are said to be of scattered inputs, which ``g_idx`` then names.
        zero_offset: to be added to stored zero points.
        chosen: ends of the paths of quantized modules; None: all.
        skipped: parts of the paths of modules that stay float.
    """

    method: str
    bits: int
    group_size: int | None
    is_symmetric: bool
    is_ordered: bool
    zero_offset: int
    chosen: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For example ``gptq int4-g128``."""
        size = "all" if self.group_size is None else self.group_size
        return f"{self.method} int{self.bits}-g{size}" + ("" if self.is_symmetric else "-zp")

    def packs(self, module: str) -> bool:
        """Whether a module's matrix is quantized, by its path."""
        inner = module.partition(".layers.")[2].partition(".")[2]
        if not any(inner in modules for modules in LAYER_UNITS.values()):
            return False
        if self.chosen is not None and inner not in self.chosen:
            return False
        return not any(part in module for part in self.skipped)

    def scheme(self, columns: int, scale_type: str, *, is_symmetric: bool) -> Scheme:
        """Ours for a matrix. A larger group is several of ours with one scale."""
        size = columns if self.group_size is None else self.group_size
        fitting = max(ours for ours in GROUP_SIZES if size % ours == 0)
        return Scheme(
            bits=self.bits, group_size=fitting, is_symmetric=is_symmetric, scale_type=scale_type
        )

    def needed_tensors(self, tensors: Mapping[str, tuple[int, ...]]) -> Shapes:
        """Names and shapes as they are stored, for those of the float model."""
        stored: Shapes = {}
        for name, shape in tensors.items():
            module = name.removesuffix(".weight")
            if module == name or not self.packs(module):
                stored[name] = shape
                continue
            outputs, inputs = shape
            groups = self._groups(module, inputs)
            words = outputs * self.bits // WORD_BITS
            along_inputs = (inputs * self.bits // WORD_BITS, outputs)
            stored[f"{module}.qweight"] = along_inputs if self.method == "gptq" else (inputs, words)
            stored[f"{module}.qzeros"] = (groups, words)
            stored[f"{module}.scales"] = (groups, outputs)
            if self.is_ordered:
                stored[f"{module}.g_idx"] = (inputs,)
        return stored

    def optional_tensors(self, tensors: Mapping[str, tuple[int, ...]]) -> Shapes:
        """What may be stored as well: the order of inputs, and a bias of zeros (AutoGPTQ does)."""
        optional: Shapes = {}
        for name, shape in tensors.items():
            module = name.removesuffix(".weight")
            if module == name or not self.packs(module):
                continue
            if f"{module}.bias" not in tensors:
                optional[f"{module}.bias"] = (shape[0],)
            if self.method == "gptq" and not self.is_ordered:
                optional[f"{module}.g_idx"] = (shape[1],)
        return optional

    def widest_matrix_bytes(self, tensors: Mapping[str, tuple[int, ...]]) -> int:
        """Stored bytes of the largest matrix's codes."""
        stored = self.needed_tensors(tensors)
        words = [math.prod(stored[name]) for name in stored if name.endswith(".qweight")]
        return max(words) * WORD_BITS // 8

    def _groups(self, module: str, inputs: int) -> int:
        if self.group_size is None:
            return 1
        if inputs % self.group_size:
            raise ConfigError(
                f"quantization_config: group_size {self.group_size} does not divide the {inputs} "
                f"inputs of {module}; expected groups of one size, give the float checkpoint"
            )
        return inputs // self.group_size


def read_stored_quantization(raw: Any, layers: int) -> StoredQuantization:
    """The value of ``quantization_config``, for a model of so many layers.

    Raises:
        ConfigError: another format, or a variant that is not carried over, named.
    """
    method = raw.get("quant_method", "by MLX") if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping) or not isinstance(method, str) or method not in _BITS:
        raise ConfigError(
            f"the checkpoint is already quantized ({method}); give the float checkpoint, or one "
            "quantized by gptq or awq"
        )
    for key, unchanged in _UNCHANGED.items():
        if raw.get(key) not in unchanged:
            raise _refusal(key, "left out", raw[key])
    found = StoredQuantization(
        method=method,
        bits=_bits(raw, method),
        group_size=_group_size(raw),
        is_symmetric=_flag(raw, "sym", True) if method == "gptq" else False,
        is_ordered=_flag(raw, "desc_act", False) if method == "gptq" else False,
        zero_offset=_zero_offset(raw, method),
        chosen=_chosen(raw) if method == "gptq" else None,
        skipped=tuple(_names(raw, "modules_to_not_convert")) if method == "awq" else (),
    )
    _require_whole_units(found, layers)
    return found


def _bits(raw: Mapping[str, Any], method: str) -> int:
    bits = raw.get("bits")
    if isinstance(bits, bool) or bits not in _BITS[method]:
        known = " or ".join(map(str, _BITS[method]))
        raise _refusal("bits", f"{known} for {method}", bits)
    return int(bits)


def _group_size(raw: Mapping[str, Any]) -> int | None:
    size = raw.get("group_size")
    if size == -1:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % min(GROUP_SIZES):
        raise _refusal("group_size", f"-1 or a multiple of {min(GROUP_SIZES)}", size)
    return size


def _zero_offset(raw: Mapping[str, Any], method: str) -> int:
    """Also refuses formats whose words lie in another order."""
    keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
    offsets = _ZERO_OFFSETS[method]
    named = [str(raw[key]).lower() for key in keys if raw.get(key) is not None]
    for key in keys:
        if raw.get(key) is not None and str(raw[key]).lower() not in offsets:
            raise _refusal(key, " or ".join(offsets), raw[key])
    if method == "awq" and not _flag(raw, "zero_point", True):
        raise _refusal("zero_point", "true", False)
    return offsets[named[0]] if named else next(iter(offsets.values()))


def _flag(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise _refusal(key, "true or false", value)
    return value


def _chosen(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    """``modules_in_block_to_quantize``: a list of lists of paths within a layer."""
    key = "modules_in_block_to_quantize"
    lists = raw.get(key)
    if lists is None:
        return None
    if not isinstance(lists, list):
        raise _refusal(key, "a list of lists of module names", lists)
    return tuple(name for names in lists for name in _names({key: names}, key))


def _names(raw: Mapping[str, Any], key: str) -> list[str]:
    names = raw.get(key)
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refusal(key, "a list of module names", names)
    return names


def _require_whole_units(found: StoredQuantization, layers: int) -> None:
    """Matrices that a graph multiplies at once are quantized together, or not at all."""
    if not any(found.packs(module) for unit in _units(layers) for module in unit):
        raise ConfigError("quantization_config leaves every matrix float; remove it")
    for unit in _units(layers):
        packed = [module for module in unit if found.packs(module)]
        if packed and packed != unit:
            floats = [module for module in unit if module not in packed]
            raise ConfigError(
                f"quantization_config: expected {', '.join(unit)} to be all quantized or all "
                f"float, got {', '.join(floats)} as float; give the float checkpoint"
            )


def _units(layers: int) -> Iterator[list[str]]:
    for layer in range(layers):
        for modules in LAYER_UNITS.values():
            yield [f"model.layers.{layer}.{module}" for module in modules]


def _refusal(key: str, expected: str, got: Any) -> ConfigError:
    return ConfigError(
        f"quantization_config: expected {key} to be {expected}, got {got!r}; "
        "give the float checkpoint"
    )
