"""The judge: transformers' own Qwen2 in float32, behind the same protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import DynamicCache, Qwen2ForCausalLM

from qwen2x.quantize.errors import BackendError, CheckpointError
from qwen2x.runtimes.cache_bookkeeping import CacheBookkeeping
from qwen2x.runtimes.layers import Hidden
from qwen2x.runtimes.runtime import Logits, TokenIds
from qwen2x.runtimes.torch_packed import load_packed
from qwen2x.runtimes.torch_rope import TorchRopes


class TorchRuntime(CacheBookkeeping):
    """A Hugging Face folder in transformers; see ``Runtime`` for what its methods give.

    Attention runs in float32 with PyTorch's scaled dot product, weights in float32 whatever type
    they are stored in: 16-bit attention is itself wrong on Qwen2 (transformers #33317).
    """

    backend = "torch"
    dtype = "float32"

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        yarn: Sequence[float] = (),
        original_context: int | None = None,
    ) -> None:
        super().__init__()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("PyTorch sees no CUDA device here; use --device cpu")
        if threads:
            torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.folder = folder
        self.device = device
        self._model: Any = _load(folder).to(device).eval()
        config, generation = self._model.config, self._model.generation_config
        self.vocab_size = int(config.vocab_size)
        ropes = TorchRopes(config, original_context)
        factors = sorted({ropes.factor, *yarn})
        self._rotary = {factor: ropes.embedding(factor).to(device) for factor in factors}
        self._offer_ropes({factor: ropes.context(factor) for factor in factors}, ropes.factor)
        self._apply_rope()
        eos = generation.eos_token_id
        eos = config.eos_token_id if eos is None else eos
        self.eos_token_ids = tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self.weight_bytes = 4 * parameters
        self.bits_per_weight = 32.0
        self._cache: Any = DynamicCache()

    def logits(
        self,
        token_ids: TokenIds,
        *,
        lengths: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> Logits:
        """See ``Runtime.logits``."""
        valid, places = self._require_rows(token_ids, lengths, positions)
        sequence = token_ids.shape[1]
        mask = (np.arange(sequence)[None] < np.array(valid)[:, None]).astype(np.int64)
        with torch.inference_mode():
            output = self._model(
                input_ids=self._tensor(token_ids),
                attention_mask=self._tensor(mask),
                position_ids=self._tensor(np.broadcast_to(places, token_ids.shape)),
                use_cache=False,
            )
        return _to_numpy(output.logits)

    def hidden_states(self, token_ids: TokenIds) -> Hidden:
        """See ``GivesHiddenStates``. Transformers' own list ends behind the norm, hence hooks."""
        self._require_rows(token_ids, None, None)
        seen: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        decoder = self._model.model
        hooks = [
            part.register_forward_hook(keep) for part in (decoder.embed_tokens, *decoder.layers)
        ]
        try:
            with torch.inference_mode():
                self._model(input_ids=self._tensor(token_ids), use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return np.stack([_to_numpy(part[0]) for part in seen])

    def close(self) -> None:
        """Gives model and cache back."""
        self._model = None
        self._cache = None

    def _apply_rope(self) -> None:
        self._model.model.rotary_emb = self._rotary[self.rope_factor]

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=self._tensor(token_ids),
                    cache=self._cache,
                    use_cache=True,
                    logits_to_keep=keep,
                )
        except BaseException:
            # Ctrl-C between two layers leaves their caches at different lengths.
            self._truncate_cache(self.cache_length)
            raise
        return _to_numpy(output.logits[0])

    def _truncate_cache(self, length: int) -> None:
        if length == 0:
            self._cache = DynamicCache()
            return
        for layer in self._cache.layers:
            layer.crop(length - layer.get_seq_length())

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(values), device=self.device)


def _load(folder: Path) -> Any:
    """The model in float32. What is missing would otherwise be made up by transformers."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face folder")
    quantization = _quantization(folder / "config.json")
    try:
        if quantization is not None:
            return load_packed(folder, quantization)
        model, found = Qwen2ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers cannot open {folder}: {reason}") from None
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        raise CheckpointError(
            f"{folder} does not hold the tensors that its config.json names: {wrong}"
        )
    return model


def _quantization(path: Path) -> dict[str, Any] | None:
    """The settings of a GPTQ or AWQ checkpoint; others are transformers' own affair."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    is_packed = isinstance(found, dict) and found.get("quant_method") in ("gptq", "awq")
    return found if is_packed else None


def _to_numpy(tensor: Any) -> Logits:
    array: Logits = tensor.float().cpu().numpy()
    return array
