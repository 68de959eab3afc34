"""The judge of GPTQ and AWQ checkpoints: transformers' Qwen2 with dequantized weights.

Transformers itself opens such folders with gptqmodel alone, which does not install beside this
PyTorch. So the formats' definition is written out here in PyTorch, apart from the exporters', which
this is to judge. Sources: ``QuantLinear.forward`` of AutoGPTQ 0.7.1
(``nn_modules/qlinear/qlinear_cuda_old.py``), ``dequantize_gemm`` of AutoAWQ 0.2.9
(``awq/utils/packing_utils.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from qwen2x.quantize.errors import CheckpointError

# Where the code of output 0, 1, ... lies in an AWQ word, counted in 4 bits from the low end.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def load_packed(folder: Path, settings: Mapping[str, Any]) -> Any:
    """The float32 model; a matrix at a time is dequantized into it.

    Args:
        folder: with ``config.json`` and safetensors files.
        settings: the config's ``quantization_config``.

    Raises:
        CheckpointError: a tensor of the model that is not there.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    del config.quantization_config
    with no_init_weights():
        model = Qwen2ForCausalLM(config).float()
    model.tie_weights()
    with ExitStack() as stack, torch.no_grad():
        stored = _Stored(folder, stack)
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight")
            if name in stored:
                parameter.copy_(stored[name])
            elif f"{module}.qweight" in stored:
                parameter.copy_(_dequantize(stored, module, settings))
            else:
                raise CheckpointError(f"{folder} does not hold {name}; fetch it again")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


class _Stored:
    """The tensors of all shards, read when they are asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def _dequantize(stored: _Stored, module: str, settings: Mapping[str, Any]) -> torch.Tensor:
    """Float32 [outputs, inputs]: scale * (code - zero point)."""
    qweight, qzeros = stored[f"{module}.qweight"], stored[f"{module}.qzeros"]
    scales = stored[f"{module}.scales"].float()
    groups = scales.shape[0]
    if settings["quant_method"] == "awq":
        shifts = 4 * torch.tensor(_AWQ_PLACES)
        codes, zeros = _along_columns(qweight, shifts, 15), _along_columns(qzeros, shifts, 15)
    else:
        bits = settings["bits"]
        shifts, mask = torch.arange(0, 32, bits), (1 << bits) - 1
        codes = (qweight[:, None, :] >> shifts[None, :, None]) & mask
        codes = codes.reshape(-1, qweight.shape[1])
        zeros = _along_columns(qzeros, shifts, mask)
        version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        zeros = zeros if version == "gptq_v2" else zeros + 1
    if f"{module}.g_idx" in stored:
        group_of = stored[f"{module}.g_idx"].long()
    else:
        group_of = torch.arange(len(codes)) // (len(codes) // groups)
    return (scales[group_of] * (codes - zeros[group_of])).T


def _along_columns(words: torch.Tensor, shifts: torch.Tensor, mask: int) -> torch.Tensor:
    """Codes [n, outputs] of words [n, outputs*bits/32]."""
    return ((words[:, :, None] >> shifts) & mask).reshape(len(words), -1)
