"""The likeliest tokens as outputs of a graph. The judge is a stable sort of the whole row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qwen2x.exporters.exporter import export
from qwen2x.exporters.onnx_candidates import IDS, LOGITS, graph_with_candidates
from tests.tiny_checkpoint import write_tiny_checkpoint

WEIGHTS = "session.model_external_initializers_file_folder_path"


@pytest.fixture(scope="module", params=[2048, 8192, 2043])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocabularies of few pieces, of many, and of none."""
    folder = tmp_path_factory.mktemp("candidates")
    source = write_tiny_checkpoint(
        folder / "source", vocab_size=request.param, dtype="float32", num_hidden_layers=1
    )
    export(source, out=folder / "bundle")
    return folder / "bundle"


@pytest.mark.parametrize("count", [1, 16, 64])
def test_candidates_are_the_largest_of_the_last_row(bundle: Path, count: int) -> None:
    vocab_size = onnx.load_model(bundle / "model.onnx", load_external_data=False)
    columns = vocab_size.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    options = ort.SessionOptions()
    options.add_session_config_entry(WEIGHTS, str(bundle))
    graph = graph_with_candidates(bundle / "model.onnx", columns, count)
    session = ort.InferenceSession(graph, options)
    ids = np.random.default_rng(0).integers(0, 2000, (2, 7))
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.broadcast_to(np.arange(7), (2, 7)).copy(),
    }
    for item in session.get_inputs():
        if item.name.startswith("past"):
            feed[item.name] = np.zeros((2, item.shape[1], 0, item.shape[3]), np.float32)
    for keep in (0, 1, 3):
        feed["num_logits_to_keep"] = np.array(keep)
        logits, values, found = session.run(["logits", LOGITS, IDS], feed)
        expected = np.argsort(-logits[:, -1], axis=-1, kind="stable")[:, :count]
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(logits[:, -1], expected, axis=1))


def test_a_graph_with_candidates_passes_shape_inference(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", vocab_size=8192)
    export(source, out=tmp_path / "bundle", device="cuda", dtype="bfloat16", bits=4, method="rtn")
    graph = graph_with_candidates(tmp_path / "bundle" / "model.onnx", 8192, 64)
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(graph), strict_mode=True)
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.output
    }
    assert shapes[LOGITS] == shapes[IDS] == ["batch", 64]


def test_nothing_on_the_way_to_a_slice_is_copied_from_a_device(tmp_path: Path) -> None:
    # CUDA leaves to the host what comes from a shape, from initializers or from graph inputs; a
    # copy in between would forbid a CUDA graph (fallback_cpu_capability.cc of onnxruntime 1.31).
    source = write_tiny_checkpoint(tmp_path / "source")
    export(source, out=tmp_path / "bundle", device="cuda", dtype="float16")
    graph = onnx.load_model(tmp_path / "bundle" / "model.onnx", load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    initializers = {tensor.name for tensor in graph.initializer}
    waiting = [node.input[1] for node in graph.node if node.op_type == "Slice"]
    assert len(waiting) == 2
    while waiting:
        name = waiting.pop()
        if name in initializers:
            continue
        node = makers[name]
        if node.op_type != "Shape":
            assert any(value in makers for value in node.input), node.name
            waiting.extend(node.input)
