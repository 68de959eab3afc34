"""Projections of one input as one product: fewer and larger kernels, the same numbers.

A decode step of a small model on a GPU is bound by the number of its kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx import nn

from qwen2x.exporters.mlx_model import Qwen2

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


def join_projections(model: Qwen2) -> None:
    """Puts ``qkv_proj`` and ``gate_up_proj`` in the place of their parts, layer by layer.

    Parts in different bits or groups stay as they are. Parameters are evaluated, one layer's at a
    time, so that no more than one layer is in memory twice.
    """
    for layer in model.model.layers:
        _join(layer.self_attn, _QKV, "qkv_proj")
        _join(layer.mlp, _GATE_UP, "gate_up_proj")
        mx.eval(layer.parameters())
        # Buffers of the parts' sizes would only be kept, never used again.
        mx.clear_cache()


def _join(module: nn.Module, names: Sequence[str], joined: str) -> None:
    parts = [module[name] for name in names]
    if len({_kind(part) for part in parts}) > 1:
        return
    whole = module.pop(names[0])
    for name in names[1:]:
        module.pop(name)
    biased = [part for part in parts if "bias" in part]
    if biased:
        dtype = biased[0].bias.dtype
        whole.bias = mx.concatenate([_bias(part, dtype) for part in parts])
    for name in ("weight", "scales", "biases"):
        if name in whole:
            setattr(whole, name, mx.concatenate([part[name] for part in parts]))
    setattr(module, joined, whole)


def _bias(part: nn.Module, dtype: mx.Dtype) -> mx.array:
    """Zeros where there is none."""
    bias: mx.array = part["bias"] if "bias" in part else mx.zeros((part.weight.shape[0],), dtype)
    return bias


def _kind(part: nn.Module) -> tuple[object, ...]:
    settings = tuple(getattr(part, name, None) for name in ("bits", "group_size", "mode"))
    return type(part), *settings, part.weight.shape[1:], part.weight.dtype
