"""The probed graph in plain ONNX Runtime: its extra outputs are transformers' hidden states."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from qwen2x.exporters.exporter import export
from qwen2x.exporters.onnx_probe import probed_graph
from qwen2x.quantize.errors import BundleError
from tests.exporters.judge import load_judge
from tests.tiny_checkpoint import write_tiny_checkpoint

# Relative to the length of a hidden state: float32 sums in other orders.
FLOAT32_ERROR = 1e-5
# A tiny model of random weights, in 8 bits with 8-bit activations.
INT8_ERROR = 0.05
TOKENS = np.random.default_rng(2).integers(0, 2016, (1, 24))
FOLDER = "session.model_external_initializers_file_folder_path"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "source"
    return write_tiny_checkpoint(folder, dtype="float32", num_hidden_layers=3)


@pytest.fixture(scope="module")
def expected(source: Path) -> NDArray[np.float32]:
    """Transformers' embedding, and the sum behind each layer [4, sequence, hidden]."""
    model = load_judge(source)
    seen: list[torch.Tensor] = []
    parts = [model.model.embed_tokens, *model.model.layers]
    for part in parts:
        part.register_forward_hook(
            lambda module, inputs, output: seen.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(TOKENS))
    return np.stack([part[0].numpy() for part in seen])


def probe(folder: Path, layers: int = 3) -> list[NDArray[np.float32]]:
    """The extra outputs of a run of TOKENS, in order."""
    graph, names = probed_graph(folder / "model.onnx", layers)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(FOLDER, str(folder))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    inputs: dict[str, Any] = {
        item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), types[item.type])
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }
    inputs |= {
        "input_ids": TOKENS,
        "attention_mask": np.ones_like(TOKENS),
        "position_ids": np.arange(TOKENS.shape[1])[None],
    }
    known = {item.name for item in session.get_inputs()}
    found: list[NDArray[np.float32]] = session.run(
        names, {name: value for name, value in inputs.items() if name in known}
    )
    return found


def error_of(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(wanted, axis=-1)
    return float((np.linalg.norm(found - wanted, axis=-1) / lengths).max())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_outputs_are_transformers_hidden_states_in_order(
    device: str, source: Path, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    folder = export(source, out=tmp_path / "bundle", device=device, dtype="float32").bundle
    found = probe(folder)
    assert len(found) == 4
    for index, part in enumerate(found[:-1]):
        assert error_of(part[0], expected[index]) < FLOAT32_ERROR, index
    # Without num_logits_to_keep the last layer has all rows too, or as many as logits are kept.
    rows = found[-1].shape[1]
    assert error_of(found[-1][0], expected[-1][-rows:]) < FLOAT32_ERROR


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 8, "group_size": 64}], ids=str)
def test_quantized_graphs_show_their_layers_too(
    options: dict[str, Any], source: Path, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    folder = export(source, out=tmp_path / "bundle", **options).bundle
    for index, part in enumerate(probe(folder)):
        rows = part.shape[1]
        assert FLOAT32_ERROR < error_of(part[0], expected[index][-rows:]) < INT8_ERROR


@pytest.mark.parametrize(
    ("device", "dtype", "bits"),
    [
        ("cpu", None, None),
        ("cpu", None, 4),
        ("cpu", None, 8),
        ("cuda", "float32", None),
        ("cuda", "float16", None),
        ("cuda", "float16", 8),
        ("cuda", "bfloat16", 4),
    ],
)
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_kind_of_graph_has_all_layers_by_name(
    device: str, dtype: str | None, bits: int | None, is_tied: bool, tmp_path: Path
) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", is_tied=is_tied, num_hidden_layers=11)
    folder = export(
        source, out=tmp_path / "bundle", bits=bits, method="rtn", device=device, dtype=dtype
    ).bundle
    path = folder / "model.onnx"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    content, names = probed_graph(path, 11)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    graph = onnx.load_model_from_string(content).graph
    assert [value.name for value in graph.output][-12:] == names
    assert len(set(names)) == 12
    assert "embed_tokens" in names[0]
    # By number and not by letter: layer 10 comes behind layer 9.
    for index in range(1, 11):
        assert names[index].startswith(f"/model/layers.{index}/input_layernorm/")
    assert names[11].startswith("/model/norm/")
    produced = {name for node in graph.node for name in node.output}
    assert set(names) <= produced


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_graph_of_other_layers_is_refused(layers: int, source: Path, tmp_path: Path) -> None:
    folder = export(source, out=tmp_path / "bundle").bundle
    with pytest.raises(BundleError, match=f"no residual stream for {layers} layers") as caught:
        probed_graph(folder / "model.onnx", layers)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("export the bundle again")


def test_a_graph_without_named_values_is_refused(source: Path, tmp_path: Path) -> None:
    folder = export(source, out=tmp_path / "bundle").bundle
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    del model.graph.value_info[:]
    onnx.save_model(model, tmp_path / "bare.onnx")
    with pytest.raises(BundleError, match="export the bundle again"):
        probed_graph(tmp_path / "bare.onnx", 3)
