"""Our MLX folders in mlx-lm: it computes what transformers does with the same weights.

One process of mlx-lm (``mlx_lm_generate.py``) opens all of them. The judge's weights are the
checkpoint's, where ours are integers their dequantized values.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen2x.exporters import mlx_export
from qwen2x.exporters.exporter import export
from qwen2x.exporters.mlx_weights import MAX_SHARD_BYTES, lay_out
from qwen2x.quantize.groups import dequantize, quantize
from qwen2x.quantize.scheme import Scheme
from qwen2x.runtimes.runtime import open_runtime
from tests.exporters.judge import judge_logits, load_judge
from tests.exporters.test_mlx_values import codes_of_words
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None or importlib.util.find_spec("mlx") is None,
    reason="mlx-lm is not installed",
)

NEW_TOKENS = 64
PROMPT = np.random.default_rng(5).integers(0, 2016, 40)
TEXT = "And it came to pass; isn't it 1234?\n  大型 🙂<|im_end|>"
# Two float32 implementations over two layers: sums in other orders, logits of size 1 to 5.
LOGITS = 1e-4
# mlx-lm computes angles' periods in float32, transformers their reciprocals.
FREQUENCY = 1e-5

THETA = {"rope_theta": 500000.0, "rope_type": "default"}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 8.0, "beta_slow": 2.0,
}  # fmt: skip
V5 = {"rope_theta": None, "torch_dtype": None}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, what its config does not name, and how it is exported (float32 if untold)."""

    checkpoint: Mapping[str, Any]
    options: Mapping[str, Any]
    max_shard_bytes: int
    unnamed: str
    has_generation_config: bool


def case(
    checkpoint: Mapping[str, Any] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    unnamed: str = "",
    has_generation_config: bool = True,
    **options: Any,
) -> Case:
    return Case(
        checkpoint=checkpoint or {},
        options={"dtype": "float32"} | options,
        max_shard_bytes=max_shard_bytes,
        unnamed=unnamed,
        has_generation_config=has_generation_config,
    )


UNTIED = {"is_tied": False}
CASES = {
    "float-tied": case(),
    "float-untied": case(UNTIED),
    "float-of-bfloat16": case({"dtype": "bfloat16"}),
    "int4-tied": case(bits=4, method="rtn"),
    "int4-untied-g64": case(UNTIED, bits=4, method="rtn", group_size=64),
    "int4-untied-g128": case(UNTIED, bits=4, method="rtn", group_size=128),
    "int8-tied-g128": case(bits=8, group_size=128),
    "int8-untied": case(UNTIED, bits=8),
    "int4-in-shards": case(UNTIED, bits=4, method="rtn", max_shard_bytes=100_000),
    # 8 bits for q, k and v take the layers' groups here: 128 does not divide the hidden size.
    "int4-narrow": case(
        {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3},
        bits=4,
        method="rtn",
    ),
    "planned": case(bits=4),
    "planned-with-zero-points": case(UNTIED, bits_per_weight=6.5, asymmetric=True),
    # transformers 5 writes these; mlx-lm would read none of them.
    "theta-of-rope-parameters": case(V5 | {"rope_parameters": THETA}),
    "yarn-of-rope-parameters": case(
        V5 | {"rope_parameters": YARN | THETA | YARN}, bits=4, method="rtn"
    ),
    "yarn": case({"rope_scaling": YARN}),
    "yarn-magnitude-above": case({"rope_scaling": YARN | {"attention_factor": 1.3}}),
    "yarn-magnitude-below": case({"rope_scaling": YARN | {"attention_factor": 0.8}}),
    "yarn-magnitude-one": case({"rope_scaling": YARN | {"attention_factor": 1.0}}),
    "yarn-two-mscales": case(
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.5}}, bits=8
    ),
    "yarn-one-mscale": case({"rope_scaling": YARN | {"mscale": 0.7}}),
    # mlx-lm has no default for the first, and another one than transformers for the second.
    "no-epsilon": case(unnamed="rms_norm_eps"),
    "untied-by-default": case(UNTIED, unnamed="tie_word_embeddings"),
    # transformers reads none of these, mlx-lm would follow each.
    "keys-of-mlx-lm": case(
        {
            "quantization": {"group_size": 64, "bits": 4},
            "model_file": "model.py",
            "rope_traditional": True,
        }
    ),
    "eos-of-config": case({"eos_token_id": [2014, 2015]}, has_generation_config=False),
}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What mlx-lm made of a folder, and the folder's source."""

    source: Path
    folder: Path
    logits: NDArray[np.float32]
    said: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The folder's own."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))
        return config

    def scheme_of(self, module: str) -> Scheme | None:
        """As the config says it, by its overrides."""
        settings = self.config.get("quantization")
        if settings is None:
            return None
        found = settings.get(module, settings)
        return Scheme(bits=found["bits"], group_size=found["group_size"])

    def judge(self) -> Qwen2ForCausalLM:
        """transformers' model of the source, with the values that our integers stand for."""
        model = load_judge(self.source)
        is_planned = self.folder.name.startswith("planned")
        stored = load_file(self.folder / "model.safetensors") if is_planned else {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scheme = self.scheme_of(name.removesuffix(".weight"))
                if parameter.ndim == 2 and scheme is not None:
                    values = dequantize(quantize(parameter.numpy(), scheme))
                    if is_planned:
                        values = values_of(stored, name.removesuffix(".weight"), scheme)
                    parameter.copy_(torch.from_numpy(values))
        return model


def values_of(
    stored: Mapping[str, NDArray[Any]], module: str, scheme: Scheme
) -> NDArray[np.float32]:
    """As mx.dequantize says it: scales * code + biases."""
    codes = codes_of_words(stored[f"{module}.weight"], scheme.bits)
    grouped = codes.reshape(len(codes), -1, scheme.group_size).astype(np.float32)
    scales, biases = (stored[f"{module}.{part}"][:, :, None] for part in ("scales", "biases"))
    values: NDArray[np.float32] = (grouped * scales + biases).reshape(codes.shape)
    return values


@pytest.fixture(scope="module")
def all_opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    root = tmp_path_factory.mktemp("mlx-lm")
    sources, folders = {}, {}
    for name, item in CASES.items():
        checkpoint = {"dtype": "float32"} | dict(item.checkpoint)
        sources[name] = write_tiny_checkpoint(root / f"{name}-source", **checkpoint)
        config = json.loads((sources[name] / "config.json").read_text("utf-8"))
        config.pop(item.unnamed, None)
        (sources[name] / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if not item.has_generation_config:
            (sources[name] / "generation_config.json").unlink()
        folders[name] = root / name
        with pytest.MonkeyPatch.context() as patch:
            limited = functools.partial(lay_out, max_shard_bytes=item.max_shard_bytes)
            patch.setattr(mlx_export, "lay_out", limited)
            export(sources[name], "mlx", out=folders[name], **item.options)
    request = {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "prompt": PROMPT.tolist(),
        "new_tokens": NEW_TOKENS,
        "text": TEXT,
        "out": str(root),
    }
    said = ask_mlx_lm(request)
    return {
        name: Opened(
            source=sources[name],
            folder=folders[name],
            logits=np.load(root / f"{name}.npy"),
            said=said[name],
        )
        for name in CASES
    }


@pytest.fixture(params=list(CASES))
def opened(request: pytest.FixtureRequest, all_opened: dict[str, Opened]) -> Opened:
    return all_opened[request.param]


def ask_mlx_lm(request: Mapping[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("mlx_lm_generate.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_mlx_lm_computes_the_logits_of_transformers_and_goes_on_with_its_tokens(
    opened: Opened,
) -> None:
    tokens = opened.said["token_ids"]
    assert len(tokens) == NEW_TOKENS
    read = np.concatenate([PROMPT, tokens[:-1]])[None].astype(np.int64)
    expected = judge_logits(opened.judge(), read)[0]
    difference = np.abs(opened.logits - expected[: len(PROMPT)])
    assert difference.max() <= LOGITS
    # Greedy means that each token is the best one behind those before it.
    assert tokens == expected[len(PROMPT) - 1 :].argmax(axis=-1).tolist()


def test_mlx_lm_goes_on_as_our_own_runtime_does(opened: Opened) -> None:
    with open_runtime(opened.folder, device="cpu") as runtime:
        token = int(runtime.prefill(PROMPT.tolist()).argmax())
        tokens = [token]
        while len(tokens) < NEW_TOKENS:
            token = int(runtime.decode(token).argmax())
            tokens.append(token)
    assert opened.said["token_ids"] == tokens


def test_quantized_weights_differ_from_the_floats_by_far_more(
    all_opened: dict[str, Opened],
) -> None:
    # Else the test above could not tell one from the other.
    for name, at_least in (("int4-tied", 0.1), ("int8-tied-g128", 0.01)):
        opened = all_opened[name]
        floats = judge_logits(load_judge(opened.source), PROMPT[None])[0]
        assert np.abs(opened.logits - floats).max() > at_least


def test_mlx_lm_quantizes_exactly_the_modules_that_we_did(opened: Opened) -> None:
    for path, kind in opened.said["modules"].items():
        scheme = opened.scheme_of(path)
        is_matrix = path.endswith(("_proj", "embed_tokens", "lm_head"))
        expected = [scheme.bits, scheme.group_size] if is_matrix and scheme else []
        assert kind == expected, path


def test_mlx_lm_and_transformers_read_the_same_rope_from_our_config(opened: Opened) -> None:
    rope = opened.said["rope"]
    config = {key: x for key, x in opened.config.items() if not key.startswith("quantization")}
    ours = Qwen2RotaryEmbedding(Qwen2Config.from_dict(config))
    theirs = Qwen2RotaryEmbedding(Qwen2Config.from_pretrained(opened.source))
    assert ours.attention_scaling == theirs.attention_scaling
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=0, atol=0)
    assert rope["mscale"] == pytest.approx(theirs.attention_scaling, rel=1e-12)
    if rope["kind"] == "RoPE":
        assert rope["base"] == config["rope_theta"]
    else:
        frequencies = 1 / np.array(rope["periods"])
        np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=FREQUENCY)


@pytest.mark.parametrize("name", [name for name in CASES if "yarn" in name])
def test_a_yarn_config_stays_yarn_in_mlx_lm(name: str, all_opened: dict[str, Opened]) -> None:
    assert all_opened[name].said["rope"]["kind"] == "YarnRoPE"


def test_shards_hold_what_one_file_does(all_opened: dict[str, Opened]) -> None:
    one, many = all_opened["int4-untied-g64"].folder, all_opened["int4-in-shards"].folder
    assert len(list(one.glob("*.safetensors"))) == 1
    shards = sorted(many.glob("*.safetensors"))
    assert len(shards) > 3
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(load_file(one / "model.safetensors"))


def test_mlx_lm_encodes_text_as_the_tokenizer_does(opened: Opened) -> None:
    tokenizer = Tokenizer.from_file(str(opened.folder / "tokenizer.json"))
    assert opened.said["text_ids"] == tokenizer.encode(TEXT).ids


def test_mlx_lm_ends_where_the_source_says(all_opened: dict[str, Opened]) -> None:
    assert all_opened["eos-of-config"].said["eos_token_ids"] == [2014, 2015]
    # The example's generation config, against a config that says 2015.
    assert all_opened["float-tied"].said["eos_token_ids"] == [2013, 2015]


def test_transformers_itself_opens_a_folder_of_floats(all_opened: dict[str, Opened]) -> None:
    # The files' metadata say mlx; transformers must take them all the same.
    for name in ("float-untied", "yarn-magnitude-above", "theta-of-rope-parameters"):
        opened = all_opened[name]
        ours = judge_logits(load_judge(opened.folder), PROMPT[None])
        theirs = judge_logits(load_judge(opened.source), PROMPT[None])
        np.testing.assert_array_equal(ours, theirs)
