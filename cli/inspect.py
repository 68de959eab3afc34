"""``qwen2x inspect``."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from qwen2x.cli.options import json_option
from qwen2x.cli.output import figure_text, print_json, print_table, size_text
from qwen2x.quantize.errors import RequestError

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@click.command("inspect", epilog="\b\nExample: qwen2x inspect qwen-int4")
@click.argument("path")
@click.option("--revision", help="Branch, tag or commit, when PATH is a hub id. Default: main.")
@click.option("--verify", is_flag=True, help="Hash every file of a bundle.")
@json_option
def command(path: str, revision: str | None, verify: bool, as_json: bool) -> None:
    """Show what PATH is: a checkpoint (folder or hub id) or a bundle."""
    from qwen2x.exporters.bundle import is_bundle
    from qwen2x.exporters.hub import resolve_source

    folder = Path(path)
    if not is_bundle(folder):
        if verify:
            raise RequestError(f"{path} is no bundle, only bundles have hashes; leave out --verify")
        # A hub id may be that of a folder for MLX.
        folder = resolve_source(path, revision=revision)
    elif revision is not None:
        raise RequestError(f"{path} is a bundle, which has no revisions; leave out --revision")
    facts = (
        inspect_bundle(folder, verify=verify) if is_bundle(folder) else inspect_checkpoint(folder)
    )
    if as_json:
        print_json(facts)
        return
    _print(path, facts)


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """The object that ``inspect --json`` prints for a checkpoint."""
    from qwen2x.exporters.checkpoint import open_checkpoint
    from qwen2x.exporters.weights import kind_of
    from qwen2x.runtimes.chat import read_chat_template

    with open_checkpoint(folder) as checkpoint:
        config, rope = checkpoint.config, checkpoint.config.rope
        stored: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for name, shape in config.expected_tensors().items():
            stored[kind_of(name)][0] += math.prod(shape)
        for tensor in checkpoint.tensors.values():
            stored[kind_of(tensor.name)][1] += tensor.bytes
        matrices = [part for kind, part in stored.items() if kind not in ("norms", "biases")]
        return {
            "kind": "checkpoint",
            "architecture": "Qwen2ForCausalLM",
            "parameters": config.parameters,
            "bytes": checkpoint.bytes,
            "bits_per_weight": 8 * sum(size for _, size in matrices) / sum(n for n, _ in matrices),
            "dtypes": sorted({tensor.dtype for tensor in checkpoint.tensors.values()}),
            "by_kind": _by_kind(stored),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": [config.num_attention_heads, config.num_key_value_heads],
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "is_tied": config.is_tied,
            "rope": {
                "theta": rope.theta,
                "type": "yarn" if rope.is_yarn else "default",
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_max_position_embeddings or None,
                "attention_factor": rope.attention_factor,
            },
            "max_context": rope.max_positions,
            "cache_elements_per_token": config.cache_elements_per_token,
            "eos_token_ids": list(config.eos_token_ids),
            "has_chat_template": read_chat_template(folder) is not None,
            "shards": checkpoint.shards,
            "target": None,
            "scheme": config.quantization.name if config.quantization else "float",
        }


def inspect_bundle(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    """The object that ``inspect --json`` prints for a bundle."""
    from qwen2x.exporters.bundle import open_bundle

    bundle = open_bundle(folder, verify=verify)
    if verify and not bundle.is_ours:
        raise RequestError(
            f"{folder} was made by another program and has no hashes; leave out --verify"
        )
    manifest, cache = bundle.manifest, bundle.cache
    elements = 2 * cache["layers"] * cache["num_key_value_heads"] * cache["head_dim"]
    keys = (
        "target", "device", "dtype", "scheme", "schemes", "method", "parameters",
        "bits_per_weight", "by_kind", "weight_bytes", "rope", "inputs", "optional_inputs",
        "outputs", "cache", "eos_token_ids", "source", "quality", "versions", "graph",
        "quantization", "bit_plan", "prefill",
    )  # fmt: skip
    return {
        "kind": "bundle",
        "architecture": "Qwen2ForCausalLM",
        "bytes": bundle.bytes,
        # An early bundle may lack some.
        **{key: manifest.get(key) for key in keys},
        "max_context": bundle.max_context,
        "cache_bytes_per_token": elements * _BYTES[cache["dtype"]],
        "cache_bytes_full_context": elements * _BYTES[cache["dtype"]] * bundle.max_context,
        "files": manifest["files"],
        "is_verified": verify,
    }


def _by_kind(stored: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    return {
        kind: {"parameters": count, "bytes": size, "bits_per_weight": 8 * size / count}
        for kind, (count, size) in stored.items()
    }


def _print(path: str, facts: dict[str, Any]) -> None:
    click.echo(f"{path}: {facts['kind']}, {facts['architecture']}")
    rows = [
        ("parameters", _count_text(facts["parameters"])),
        ("size", size_text(facts["bytes"])),
        ("bits per weight", f"{facts['bits_per_weight']:.2f} ({facts['scheme']})"),
    ]
    for kind, part in (facts["by_kind"] or {}).items():
        rows.append(
            (f"  {kind}", f"{part['bits_per_weight']:.2f} bits, {size_text(part['bytes'])}")
        )
    if facts.get("bit_plan"):
        rows += [(f"  {kind}", names) for kind, names in facts["schemes"].items()]
    rows.append(("context", f"{facts['max_context']} positions, {_rope_text(facts['rope'])}"))
    if facts["kind"] == "bundle":
        rows += [
            (
                "target",
                f"{facts['target']} for {facts['device']} device, {facts['dtype']}"
                if facts["device"] == "any"
                else f"{facts['target']} for {facts['device']}, {facts['dtype']}",
            ),
            ("graph", _graph_text(facts)),
            ("KV cache", _cache_text(facts["cache_bytes_per_token"], facts)),
            ("made of", _source_text(facts)),
        ]
        if facts["prefill"]:
            size = size_text(facts["prefill"]["weight_bytes"])
            rows.append(("prompts", f"in int8, with {size} of weights beside the others"))
        rows.append(("quality", _quality_text(facts["quality"])))
    else:
        rows += [
            ("layers", f"{facts['layers']}, hidden {facts['hidden_size']}, heads "
                       f"{facts['heads'][0]}/{facts['heads'][1]} of {facts['head_dim']}"),
            ("KV cache", _cache_text(4 * facts["cache_elements_per_token"], facts) + " in float32"),
            ("vocabulary", f"{facts['vocab_size']} rows, "
                           + ("tied head" if facts["is_tied"] else "own head")),
            ("stored as", f"{', '.join(facts['dtypes'])} in {len(facts['shards'])} file(s)"),
            ("chat template", "yes" if facts["has_chat_template"] else "no"),
        ]  # fmt: skip
    print_table(rows)


def _cache_text(per_token: int, facts: dict[str, Any]) -> str:
    whole = size_text(per_token * facts["max_context"])
    return f"{size_text(per_token)} per token, {whole} for the whole context"


def _count_text(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} billion"
    return f"{count / 1e6:.1f} million"


def _rope_text(rope: dict[str, Any]) -> str:
    """A checkpoint has one factor, a bundle a list of them; 1 is rope without YaRN."""
    text = f"rope theta {rope['theta']:g}"
    factors = [factor for factor in rope.get("factors", [rope.get("factor")]) if factor > 1]
    if not factors:
        return text
    times = ", ".join(f"{factor:g}" for factor in factors)
    return f"{text}, YaRN factor {times} over {rope['original_max_position_embeddings']}"


def _source_text(facts: dict[str, Any]) -> str:
    source, version = facts["source"], facts["versions"].get("qwen2x")
    if version is None:
        return f"{source['id']}, by another program"
    first, *more = [sha256 for name, sha256 in source["sha256"].items() if name != "config.json"]
    others = f" and {len(more)} more" if more else ""
    return f"{source['id']} (sha256 {first[:12]}{others}), by qwen2x {version}"


def _graph_text(facts: dict[str, Any]) -> str:
    if facts["target"] == "onnx":
        return f"inputs {_names(facts['inputs'] + facts['optional_inputs'])}; outputs " + _names(
            facts["outputs"]
        )
    graph = facts["graph"]
    if graph is None:
        return "none; run by our own modules (export --graph makes one)"
    return (
        f"decode.mlxfn, traced by mlx {graph['mlx']} on {graph['device']}, chunks of "
        f"{graph['chunk']}, caches of {', '.join(map(str, graph['capacities']))}"
    )


def _quality_text(quality: dict[str, Any]) -> str:
    """One line; older bundles recorded no text."""
    if "kl_mean" not in quality and "estimate" in quality:
        return f"estimated while exporting: {_figures_text(quality['estimate'])}"
    if "kl_mean" not in quality:
        return "not validated yet: qwen2x validate"
    text = quality.get("text")
    read = f", on {text['tokens']} tokens of {text['name']} text" if text else ""
    return f"{quality['verdict']}, {_figures_text(quality)}{read}"


def _figures_text(found: dict[str, Any]) -> str:
    text = (
        f"KL {figure_text(found.get('kl_mean'))} (p99 {figure_text(found.get('kl_p99'))}), same "
        f"top token {figure_text(found.get('top1_agreement'), '.1%')}"
    )
    if "perplexity" not in found:
        return text
    original = figure_text(found.get("perplexity_reference"), ".2f")
    return f"{text}, perplexity {figure_text(found['perplexity'], '.2f')} (original {original})"


def _names(names: list[str]) -> str:
    shown = [name for name in names if "." not in name]
    return ", ".join(shown) + f" and {len(names) - len(shown)} of the KV cache"
