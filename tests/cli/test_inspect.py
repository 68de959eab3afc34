from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen2x.exporters.exporter import export
from tests.cli.conftest import Call
from tests.tiny_checkpoint import write_tiny_checkpoint

KEYS = {
    "kind", "architecture", "parameters", "bytes", "bits_per_weight", "rope", "max_context",
    "target", "scheme", "by_kind",
}  # fmt: skip
KINDS = {"embedding", "norms", "attention", "biases", "mlp"}


def test_a_checkpoint(call: Call, example: Path) -> None:
    done = call("inspect", example, "--json")
    facts = done.json
    assert facts.keys() >= KEYS
    assert facts["kind"] == "checkpoint"
    assert facts["architecture"] == "Qwen2ForCausalLM"
    assert facts["bits_per_weight"] == 16
    assert facts["rope"]["theta"] == 10000
    assert facts["rope"]["type"] == "default"
    assert facts["max_context"] == 2048
    assert (facts["target"], facts["scheme"]) == (None, "float")
    assert facts["by_kind"].keys() == KINDS
    assert sum(part["parameters"] for part in facts["by_kind"].values()) == facts["parameters"]
    assert sum(part["bytes"] for part in facts["by_kind"].values()) == facts["bytes"]
    assert facts["bytes"] == 2 * facts["parameters"]
    assert done.err == ""


def test_a_bundle(call: Call, int4_bundle: Path, example: Path) -> None:
    facts = call("inspect", int4_bundle, "--json").json
    assert facts.keys() >= KEYS | {"inputs", "outputs", "source", "quality", "versions", "cache"}
    assert facts["kind"] == "bundle"
    assert (facts["target"], facts["scheme"]) == ("onnx", "int4-g32")
    assert 4 < facts["bits_per_weight"] < 8
    assert facts["parameters"] == call("inspect", example, "--json").json["parameters"]
    assert facts["bytes"] == sum(
        path.stat().st_size
        for path in int4_bundle.iterdir()
        if path.name not in ("qwen2x.json", "README.md")
    )
    assert facts["inputs"][:3] == ["input_ids", "attention_mask", "position_ids"]
    assert "present.0.key" in facts["outputs"]
    assert facts["source"]["id"] == example.name
    assert facts["by_kind"].keys() == KINDS
    # Keys and values, 6 layers of 2 heads of 32 in float32.
    assert facts["cache_bytes_per_token"] == 2 * 6 * 2 * 32 * 4


def test_people_see_a_table(call: Call, example: Path, int4_bundle: Path) -> None:
    text = call("inspect", example).out
    for word in ("1.4 million", "2.89 MB", "16.00 (float)", "tied head", "chat template    yes"):
        assert word in text
    text = call("inspect", int4_bundle).out
    for word in (
        "int4-g32", "embedding", "attention", "onnx for cpu", "per token",
        f"made of          {example.name} (sha256 ", "by qwen2x", "12 of the KV cache",
    ):  # fmt: skip
        assert word in text


def test_recorded_quality_is_one_line(call: Call, int4_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(int4_bundle, tmp_path / "bundle")
    path = bundle / "qwen2x.json"
    manifest = json.loads(path.read_text())
    figures = {
        "kl_mean": 0.01234, "kl_p99": None, "top1_agreement": 0.9375, "perplexity": 12.5,
        "perplexity_reference": 12.25,
    }  # fmt: skip
    text = {"name": "prose.txt", "tokens": 1024, "window": 512, "sha256": "0"}
    shown = "KL 0.0123 (p99 not finite), same top token 93.8%, perplexity 12.50 (original 12.25)"
    for quality, line in (
        ({}, "not validated yet: qwen2x validate"),
        ({"estimate": figures}, f"estimated while exporting: {shown}"),
        ({"estimate": {"kl_mean": 1}}, "estimated while exporting: KL 1 (p99 not finite), same"),
        (figures | {"verdict": "fail"}, f"fail, {shown}"),
        (
            figures | {"verdict": "pass", "text": text, "estimate": {"kl_mean": 1}},
            f"pass, {shown}, on 1024 tokens of prose.txt text",
        ),
    ):
        path.write_text(json.dumps(manifest | {"quality": quality}))
        (row,) = [row for row in call("inspect", bundle).out.splitlines() if "quality  " in row]
        assert row.split(maxsplit=1)[1].startswith(line)


def test_a_graph_for_prompts_is_shown(call: Call, example: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    planned = call("export", example, "--prefill-int8", "--dry-run", "--json").json
    call("export", example, "--prefill-int8", "-o", bundle)
    facts = call("inspect", bundle, "--json").json
    added = facts["prefill"]["weight_bytes"]
    files = {file["name"]: file["bytes"] for file in planned["files"]}
    assert files["prefill.onnx_data"] == facts["files"]["prefill.onnx_data"]["bytes"] >= added > 0
    assert files["prefill.onnx"] == facts["files"]["prefill.onnx"]["bytes"]
    assert "prompts" in call("inspect", bundle).out
    long_prompt = "word " * 60
    answer = call("run", bundle, long_prompt, "--max-tokens", "4", "--raw", "--json").json
    assert answer["prompt_tokens"] > 32
    assert answer["token_ids"]


def test_yarn_is_shown(call: Call, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    source = write_tiny_checkpoint(tmp_path / "yarn", rope_scaling=yarn)
    facts = call("inspect", source, "--json").json
    assert facts["rope"]["type"] == "yarn"
    assert facts["rope"]["factor"] == 4
    assert facts["max_context"] == 2048
    assert "YaRN factor 4 over 512" in call("inspect", source).out
    bundle = export(source, out=tmp_path / "bundle").bundle
    assert "YaRN factor 4 over 512" in call("inspect", bundle).out


def test_verify_finds_one_changed_byte(call: Call, int4_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(int4_bundle, tmp_path / "bundle")
    assert call("inspect", bundle, "--verify", "--json").json["is_verified"] is True
    flip(bundle / "model.onnx_data")
    said = call("inspect", bundle, "--verify").complaint
    assert "model.onnx_data" in said
    assert "export" in said


def test_verify_finds_a_byte_that_no_sample_touches(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are only sampled when a bundle is opened without --verify."""
    from qwen2x.exporters import bundle as bundles

    monkeypatch.setattr(bundles, "_SMALL", 1 << 19)
    source = write_tiny_checkpoint(tmp_path / "source", num_hidden_layers=4)
    bundle = export(source, out=tmp_path / "bundle").bundle
    flip(bundle / "model.onnx_data")
    assert call("inspect", bundle).code == 0
    assert "model.onnx_data" in call("inspect", bundle, "--verify").complaint


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 + 1234] ^= 1
    path.write_bytes(content)


def test_what_does_not_fit_is_one_line(
    call: Call, example: Path, int4_bundle: Path, tmp_path: Path
) -> None:
    assert "--verify" in call("inspect", example, "--verify").complaint
    assert "--revision" in call("inspect", int4_bundle, "--revision", "main").complaint
    assert "revision" in call("inspect", example, "--revision", "main").complaint
    assert "./nowhere" in call("inspect", "./nowhere").complaint
    assert "config.json" in call("inspect", tmp_path).complaint
    config = json.loads((example / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "llama" in call("inspect", tmp_path).complaint
