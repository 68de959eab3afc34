"""Tiny GPTQ and AWQ checkpoints, packed one code after the other as the formats' programs do.

Sources: ``QuantLinear.pack`` of AutoGPTQ 0.7.1, ``WQLinear_GEMM.from_linear`` of AutoAWQ 0.2.9, and
for gptq_v2 ``convert_gptq_v1_to_v2_format`` of GPTQModel: zero points as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.tiny_checkpoint import write_tiny_checkpoint, write_weights

Ints = NDArray[np.int64]
Tensors = dict[str, NDArray[Any]]
MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
# Modules that GPTQ orders by one and the same input.
SAME_INPUT = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj",
              "mlp.up_proj": "mlp.gate_proj"}  # fmt: skip
AWQ_SLOTS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized matrix: codes [outputs, inputs], scales and zeros [groups, outputs],
    group_of [inputs]."""

    codes: Ints
    scales: NDArray[Any]
    zeros: Ints
    group_of: Ints

    @property
    def weight(self) -> NDArray[np.float32]:
        """Float32 [outputs, inputs], by the formats' definition."""
        scales = self.scales.astype(np.float32)[self.group_of].T
        return scales * (self.codes - self.zeros[self.group_of].T).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A quantized folder, what is in it, and the float checkpoint that it stands for."""

    folder: Path
    floats: Path
    layers: dict[str, Layer] = field(default_factory=dict)

    def change(self, change: Callable[[Tensors], None]) -> None:
        """Lets a test damage the stored tensors."""
        tensors = load_file(self.folder / "model.safetensors")
        change(tensors)
        write_weights(self.folder, tensors)

    def configure(self, **changes: Any) -> None:
        """Changes ``quantization_config``; None removes a key."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text("utf-8"))
        settings = config["quantization_config"] | changes
        config["quantization_config"] = {k: v for k, v in settings.items() if v is not None}
        path.write_text(json.dumps(config), "utf-8")


def write_packed_checkpoint(
    root: Path,
    *,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    order: str = "plain",
    scale_dtype: Any = np.float16,
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> Packed:
    """Writes the quantized folder and the float one.

    Args:
        root: gets both.
        method: ``gptq`` or ``awq``.
        bits: of a code.
        group_size: inputs that share a scale, -1 for all.
        sym: zero points in the middle.
        order: ``plain`` groups; ``shared``: scattered ones, the same for modules with one input, as
            GPTQ's desc_act gives; ``own``: others for every module.
        scale_dtype: of the scales.
        settings: more keys of ``quantization_config``.
        **config: see ``write_tiny_checkpoint``.
    """
    folder = write_tiny_checkpoint(root / "packed", dtype="float16", **config)
    tensors = load_file(folder / "model.safetensors")
    written = quantization_config(method, bits, group_size, sym, order) | (settings or {})
    offset = 1 if method == "gptq" and written.get("checkpoint_format") != "gptq_v2" else 0
    random = np.random.default_rng(5)
    layers: dict[str, Layer] = {}
    floats = dict(tensors)
    orders: dict[str, Ints] = {}
    for name in [name for name in tensors if name.startswith("model.layers") and "proj.w" in name]:
        module = name.removesuffix(".weight")
        outputs, inputs = tensors[name].shape
        size = inputs if group_size == -1 else group_size
        group_of = np.arange(inputs) // size
        if order != "plain":
            inner = module.split(".", 3)[3]
            key = module.replace(inner, SAME_INPUT.get(inner, inner)) if order == "shared" else name
            group_of = orders.setdefault(key, random.permutation(group_of))
        layers[module] = _layer(random, outputs, group_of, bits, sym, scale_dtype, offset)
        del tensors[name]
        tensors |= _stored(module, layers[module], method, bits, offset)
        floats[name] = layers[module].weight
    write_weights(folder, tensors)
    path = folder / "config.json"
    raw = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(raw | {"quantization_config": written}), "utf-8")
    judge = write_tiny_checkpoint(root / "floats", dtype="float32", **config)
    write_weights(judge, {name: value.astype(np.float32) for name, value in floats.items()})
    return Packed(folder=folder, floats=judge, layers=layers)


def quantization_config(
    method: str, bits: int, group_size: int, sym: bool, order: str = "plain"
) -> dict[str, Any]:
    """As the official Qwen2 releases have it."""
    if method == "awq":
        return {
            "bits": bits, "group_size": group_size, "modules_to_not_convert": None,
            "quant_method": "awq", "version": "gemm", "zero_point": True,
        }  # fmt: skip
    return {
        "batch_size": 1, "bits": bits, "block_name_to_quantize": None,
        "cache_block_outputs": True, "damp_percent": 0.01, "dataset": None,
        "desc_act": order != "plain", "exllama_config": {"version": 1}, "group_size": group_size,
        "max_input_length": None, "model_seqlen": None, "module_name_preceding_first_block": None,
        "modules_in_block_to_quantize": None, "pad_token_id": None, "quant_method": "gptq",
        "sym": sym, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False,
        "use_exllama": True,
    }  # fmt: skip


def _layer(
    random: np.random.Generator,
    outputs: int,
    group_of: Ints,
    bits: int,
    sym: bool,
    scale_dtype: Any,
    offset: int,
) -> Layer:
    """Random codes around random zero points, all of them used somewhere."""
    middle, most = 1 << (bits - 1), (1 << bits) - 1
    groups = int(group_of.max()) + 1
    zeros = np.full((groups, outputs), middle)
    if not sym:
        zeros = np.clip(np.rint(random.normal(middle, middle / 3, zeros.shape)), offset, most)
        zeros[0, :2] = offset, most
    spread = random.normal(0, middle / 2, (outputs, len(group_of)))
    codes = np.clip(np.rint(zeros[group_of].T + spread), 0, most)
    # No bfloat16 number, so that a detour through it shows.
    steps = (1 + random.random((groups, outputs))) / (middle * math.sqrt(len(group_of)))
    return Layer(
        codes=codes.astype(np.int64),
        scales=steps.astype(scale_dtype),
        zeros=zeros.astype(np.int64),
        group_of=group_of,
    )


def _stored(module: str, layer: Layer, method: str, bits: int, offset: int) -> Tensors:
    stored: Tensors = {f"{module}.scales": layer.scales}
    if method == "awq":
        stored[f"{module}.qweight"] = pack_awq(layer.codes.T)
        stored[f"{module}.qzeros"] = pack_awq(layer.zeros)
        return stored
    stored[f"{module}.qweight"] = pack_gptq(layer.codes, bits).T.copy()
    stored[f"{module}.qzeros"] = pack_gptq(layer.zeros - offset, bits)
    stored[f"{module}.g_idx"] = layer.group_of.astype(np.int32)
    if not module.endswith(("q_proj", "k_proj", "v_proj")):
        stored[f"{module}.bias"] = np.zeros(len(layer.codes), np.float16)
    return stored


def pack_gptq(codes: Ints, bits: int) -> NDArray[np.int32]:
    """Words [rows, columns*bits/32] of codes [rows, columns], low bits first."""
    assert codes.min() >= 0
    per_word = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per_word), np.uint32)
    for column in range(codes.shape[1]):
        place = bits * (column % per_word)
        words[:, column // per_word] |= codes[:, column].astype(np.uint32) << np.uint32(place)
    return words.view(np.int32)


def pack_awq(codes: Ints) -> NDArray[np.int32]:
    """Words [rows, columns/8] of 4-bit codes [rows, columns], interleaved."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for slot, output in enumerate(AWQ_SLOTS):
            code = codes[:, 8 * word + output].astype(np.uint32)
            words[:, word] |= code << np.uint32(4 * slot)
    return words.view(np.int32)
