"""Qwen2 in MLX: the forward pass, over a cache that is handed to it, and its weights from a folder.

Modules are named as in the checkpoint. Axes: B batch, S new tokens, H query heads, K key-value
heads, D head size, C positions that a cache has room for. Arithmetic follows transformers
(``modeling_qwen2.py``); angles, rotation, scores and softmax are in float32 whatever the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.mlx_attention import attention
from qwen2x.quantize.errors import BundleError

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_NAMED = 3


class Cache(Protocol):
    """Takes a layer's new keys and values, and gives what its queries make of all of them."""

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """What queries [B, H, R, D], of the last R new tokens, get: [B, H, R, D].

        Keys and values are [B, K, S, D]; queries and keys are rotated.
        """
        ...


class Place(Protocol):
    """Where new positions go in buffers [B, K, C, columns], and who may see which position."""

    def mask(self, count: int) -> mx.array | str | None:
        """For the last ``count`` new positions, as ``scaled_dot_product_attention`` takes it."""
        ...

    def write(self, buffers: list[mx.array], index: int, new: mx.array) -> mx.array:
        """Puts new [B, K, S, columns] into a buffer; gives the positions that there are to see."""
        ...


class Slices:
    """Positions start..stop, written in place; what is seen ends with them. For eager runs."""

    def __init__(self, start: int, stop: int) -> None:
        self._start, self._stop = start, stop

    def mask(self, count: int) -> mx.array | str | None:
        """See ``Place``."""
        return "causal" if count > 1 else None

    def write(self, buffers: list[mx.array], index: int, new: mx.array) -> mx.array:
        """See ``Place``."""
        buffers[index][:, :, self._start : self._stop] = new
        return buffers[index][:, :, : self._stop]


class Whole:
    """Positions from offset (int32 [1]) on; all C are seen, under a mask. For traced functions."""

    def __init__(self, offset: mx.array, count: int, capacity: int) -> None:
        self._offset = offset
        # bool [S, C]
        self._mask = mx.arange(capacity) <= (offset + mx.arange(count))[:, None]

    def mask(self, count: int) -> mx.array | str | None:
        """See ``Place``."""
        return self._mask[-count:]

    def write(self, buffers: list[mx.array], index: int, new: mx.array) -> mx.array:
        """See ``Place``; the list gets another array, the old one stays as it was."""
        buffers[index] = mx.slice_update(buffers[index], new, self._offset, axes=(2,))
        return buffers[index]


class FloatCache:
    """Keys and values as they are: buffers 2i and 2i + 1, [B, K, C, D], belong to layer i."""

    def __init__(self, buffers: list[mx.array], place: Place) -> None:
        self.buffers = buffers
        self._place = place

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """See ``Cache``."""
        keys = self._place.write(self.buffers, 2 * layer, keys)
        values = self._place.write(self.buffers, 2 * layer + 1, values)
        return attention(queries, keys, values, self._place.mask(queries.shape[2]))


class Rotary(NamedTuple):
    """Factors of ``rotate``: float32 [S, 1, 2, D/2] each, cosines twice, and sines with signs."""

    cosines: mx.array
    sines: mx.array


def rotate(x: mx.array, rotary: Rotary) -> mx.array:
    """Rotates pairs (i, i + D/2) of [B, S, heads, D], in float32; the type stays."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    # A view from back to front: the other half beside each half, without a copy.
    turned: mx.array = _fused(_turn)(halves, halves[..., ::-1, :], *rotary)
    return turned.reshape(x.shape)


def _turn(halves: mx.array, others: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    turned = halves.astype(mx.float32) * cosines + others.astype(mx.float32) * sines
    return turned.astype(halves.dtype)


def _rotary(
    places: mx.array, frequencies: mx.array, magnitude: mx.array, signs: mx.array
) -> tuple[mx.array, mx.array]:
    angles = places.astype(mx.float32) * frequencies
    return mx.cos(angles) * magnitude, mx.sin(angles) * magnitude * signs


def _gate(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = mx.compile(function, shapeless=True)
    return compiled


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for an elementwise function, but on the CPU, where building it takes long.

    A step on a GPU is bound by the number of its kernels.
    """
    return function if mx.default_device().type == mx.cpu else _compiled(function)


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention; q, k and v have biases.

    ``join_projections`` may have made one product, ``qkv_proj``, of these three.
    """

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, config.query_size)
        self.k_proj = nn.Linear(hidden, config.key_value_size)
        self.v_proj = nn.Linear(hidden, config.key_value_size)
        self.o_proj = nn.Linear(config.query_size, hidden, bias=False)

    def __call__(self, x: mx.array, rotary: Rotary, cache: Cache, rows: slice) -> mx.array:
        """Gives [B, R, hidden] for x [B, S, hidden]: what the last R rows, ``rows``, gather."""
        queries, keys, values = self._projected(x, rotary, rows)
        by_head = (part.transpose(0, 2, 1, 3) for part in (queries, keys, values))
        mixed = cache.attend(self.layer, *by_head).transpose(0, 2, 1, 3)
        gathered: mx.array = self.o_proj(mixed.reshape(*mixed.shape[:2], -1))
        return gathered

    def _projected(
        self, x: mx.array, rotary: Rotary, rows: slice
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Queries [B, R, H, D], keys and values [B, S, K, D]; the first two are rotated."""
        batch, count, _ = x.shape
        if "qkv_proj" in self:
            heads = self.qkv_proj(x).reshape(batch, count, -1, self.head_dim)
            turned = rotate(heads[:, :, : -self.key_value_heads], rotary)
            queries, keys = turned[:, rows, : self.heads], turned[:, :, self.heads :]
            return queries, keys, heads[:, :, -self.key_value_heads :]
        asking = self.q_proj(x[:, rows]).reshape(batch, -1, self.heads, self.head_dim)
        queries = rotate(asking, Rotary(*(part[rows] for part in rotary)))
        shape = (batch, count, self.key_value_heads, self.head_dim)
        keys = rotate(self.k_proj(x).reshape(shape), rotary)
        return queries, keys, self.v_proj(x).reshape(shape)


class Mlp(nn.Module):  # type: ignore[misc]
    """The gated feed-forward block; gate and up may be one product, ``gate_up_proj``."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Gives [B, S, hidden] for x [B, S, hidden]."""
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        mixed: mx.array = self.down_proj(_fused(_gate)(gate, up))
        return mixed


class Layer(nn.Module):  # type: ignore[misc]
    """Attention and feed-forward, each behind a norm and beside the residual."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, rotary: Rotary, cache: Cache, rows: slice) -> mx.array:
        """Gives [B, R, hidden], the last R rows, for x [B, S, hidden]."""
        x = x[:, rows] + self.self_attn(self.input_layernorm(x), rotary, cache, rows)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):  # type: ignore[misc]
    """What the checkpoint calls ``model``: embedding, layers, last norm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, index) for index in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen2(nn.Module):  # type: ignore[misc]
    """A Qwen2 model. A tied head is the embedding, used as a linear layer."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = Decoder(config)
        if not config.is_tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        rope = config.rope
        self.use_rope(mx.array(rope.inverse_frequencies()), rope.attention_factor)

    def __call__(
        self,
        token_ids: mx.array,
        positions: mx.array,
        cache: Cache,
        keep: int | mx.array,
        seen: list[mx.array] | None = None,
    ) -> mx.array:
        """Logits float32 [B, keep, V] of the last rows.

        Args:
            token_ids: int32 [B, S].
            positions: int32 [S], of the columns.
            cache: gets the keys and values.
            keep: rows whose logits are wanted: so many of the last, or their indices int32 [keep].
            seen: gets the residual stream [B, S, hidden]: the embedding, then behind each layer;
                behind the last one, the rows that are wanted.
        """
        x = self.model.embed_tokens(token_ids)
        rotary = Rotary(*_fused(_rotary)(positions[:, None, None, None], *self._rope))
        states = [x]
        *layers, last = self.model.layers
        for layer in layers:
            x = layer(x, rotary, cache, slice(None))
            states.append(x)
        # Of the other rows, the last layer gives the cache its keys and values.
        x = last(x, rotary, cache, slice(-keep if isinstance(keep, int) else None, None))
        if seen is not None:
            seen.extend([*states, x])
        kept = x if isinstance(keep, int) else mx.take(x, keep, axis=1)
        head = self.lm_head if "lm_head" in self else self.model.embed_tokens.as_linear
        logits: mx.array = head(self.model.norm(kept))
        return logits.astype(mx.float32)

    def use_rope(self, frequencies: mx.array, attention_factor: float | mx.array) -> None:
        """Takes a YaRN factor's frequencies, float32 [D/2], and magnitude, from here on."""
        both, signs = mx.stack([frequencies, frequencies]), mx.array([[-1.0], [1.0]])
        self._rope = both, mx.array(attention_factor), signs

    def angles(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Cosines and sines of int32 [S] positions, float32 [S, D/2], times the YaRN magnitude.

        The product of position and frequency is rounded to float32, as transformers does.
        """
        cosines, sines = _rotary(positions[:, None, None], *self._rope)
        return cosines[:, 1], sines[:, 1]


def build_model(config: Qwen2Config, quantization: Mapping[str, Any] | None, dtype: str) -> Qwen2:
    """A model whose parameters have their shapes and types, and no values worth having.

    Nothing is computed until a parameter is evaluated.

    Raises:
        BundleError: settings of the quantization that MLX or this model cannot take.
    """
    model = Qwen2(config)
    model.set_dtype(DTYPES[dtype])
    if quantization is None:
        return model

    def settings_of(path: str, module: nn.Module) -> dict[str, Any] | bool:
        if not hasattr(module, "to_quantized"):
            return False
        settings = quantization.get(path, quantization)
        if settings is False:
            return False
        mode = settings.get("mode", "affine")
        if mode != "affine":
            raise BundleError(f"{path} has quantization mode {mode!r}; expected 'affine'")
        return {"group_size": settings["group_size"], "bits": settings["bits"], "mode": mode}

    try:
        nn.quantize(model, class_predicate=settings_of)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"the quantization settings do not fit the model: {error!r}") from None
    return model


def load_model(
    folder: Path, config: Qwen2Config, quantization: Mapping[str, Any] | None, dtype: str
) -> Qwen2:
    """The model with the weights of ``model*.safetensors``, evaluated.

    Raises:
        BundleError: tensors that are missing, surplus, of another shape, or integers where floats
            belong. Floats of another size are converted.
    """
    model = build_model(config, quantization, dtype)
    expected = dict(tree_flatten(model.parameters()))
    tensors: dict[str, mx.array] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            loaded: Any = mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
        tensors |= loaded
    _require_fit(folder, expected, tensors)
    typed = [(name, tensor.astype(expected[name].dtype)) for name, tensor in tensors.items()]
    del tensors
    model.update(tree_unflatten(typed))
    mx.eval(model.parameters())
    return model


def _require_fit(folder: Path, expected: dict[str, mx.array], found: dict[str, mx.array]) -> None:
    unlike = [
        f"{name} ({_kind(found[name])}, expected {_kind(expected[name])})"
        for name in sorted(expected.keys() & found.keys())
        if _kind(found[name]) != _kind(expected[name])
    ]
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "surplus": sorted(found.keys() - expected.keys()),
        "unlike": unlike,
    }
    if any(wrong.values()):
        listed = "; ".join(f"{how}: {_enumerate(names)}" for how, names in wrong.items() if names)
        raise BundleError(f"{folder} does not hold the tensors of its model; {listed}")


def _kind(array: mx.array) -> str:
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return f"{'float' if is_float else str(array.dtype).split('.')[-1]} {list(array.shape)}"


def _enumerate(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
