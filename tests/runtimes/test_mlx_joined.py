"""Projections of one input as one product: the same numbers, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.exporters.exporter import export
from qwen2x.runtimes.runtime import Runtime, open_runtime
from tests.runtimes.conftest import MakeBundle

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

IDS = np.random.default_rng(5).integers(0, 2000, (1, 40))
# Sums of the same products in another order.
FLOAT32 = 2e-5
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({}, {}),
    "int4": ({"bits": 4, "method": "rtn"}, {}),
    "int8 cache": ({}, {"kv_bits": 8}),
}


def opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, *, is_joined: bool, **options: Any
) -> Any:
    from qwen2x.runtimes import mlx_runtime

    with monkeypatch.context() as patch:
        if not is_joined:
            patch.setattr(mlx_runtime, "join_projections", lambda model: None)
        return open_runtime(bundle, **options)


def projections(runtime: Any) -> set[str]:
    """Names of the modules in the first layer that multiply."""
    layer = runtime._model.model.layers[0]
    return {name for part in (layer.self_attn, layer.mlp) for name in part if "proj" in name}


def answers(runtime: Runtime) -> list[Any]:
    """Logits of a text at once, of a prompt in two pieces, and of three steps behind it."""
    ids = IDS[0].tolist()
    whole = runtime.logits(IDS)[0]
    runtime.reset()
    steps = [runtime.prefill(ids[:30]), *(runtime.decode(token) for token in ids[30:33])]
    return [whole, np.stack(steps)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_and_apart_they_give_the_same_logits(
    variant: str, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, cache = VARIANTS[variant]
    bundle = make_bundle(target="mlx", dtype="float32", **options)
    with (
        opened(bundle, monkeypatch, is_joined=True, **cache) as joined,
        opened(bundle, monkeypatch, is_joined=False, **cache) as apart,
    ):
        assert projections(joined) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
        assert projections(apart) >= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
        for found, expected in zip(answers(joined), answers(apart), strict=True):
            np.testing.assert_allclose(found, expected, atol=FLOAT32 * np.abs(expected).max())


@pytest.fixture
def mixed(tmp_path: Path, random_checkpoint: Path) -> Path:
    """A folder whose first layer's q has fewer bits than its k and v, as mlx-lm can make them."""
    from mlx_lm import convert

    def bits_of(path: str, module: Any, config: Any = None) -> Any:
        return {"group_size": 32, "bits": 4 if path.endswith("0.self_attn.q_proj") else 8}

    folder = tmp_path / "mixed"
    convert(
        str(random_checkpoint), str(folder), quantize=True, quant_predicate=bits_of, dtype="float32"
    )
    return folder


def test_parts_in_different_bits_stay_apart(mixed: Path, random_checkpoint: Path) -> None:
    with open_runtime(mixed) as runtime:
        names = projections(runtime)
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
        second: Any = runtime._model.model.layers[1].self_attn  # type: ignore[attr-defined]
        assert "qkv_proj" in second
        found = runtime.logits(IDS)[0]
    with open_runtime(random_checkpoint, backend="torch", threads=1) as judge:
        expected = judge.logits(IDS)[0]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.2


def test_joining_takes_no_memory_that_stays(tmp_path: Path, random_checkpoint: Path) -> None:
    export(random_checkpoint, "mlx", out=tmp_path / "bundle", dtype="float32")
    with open_runtime(tmp_path / "bundle") as runtime:
        from mlx.utils import tree_flatten

        parameters = tree_flatten(runtime._model.parameters())  # type: ignore[attr-defined]
        assert sum(array.nbytes for _, array in parameters) == runtime.weight_bytes
