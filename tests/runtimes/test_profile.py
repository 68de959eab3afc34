from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.profile import (
    RecordsRuns,
    measure_read_bandwidth,
    profile,
    read_runs,
)
from qwen2x.runtimes.runtime import Runtime, open_runtime
from tests.runtimes.conftest import MakeBundle

PROMPT = list(range(1, 80))


def event(kind: str, name: str, ts: int, dur: int, operator: str = "") -> dict[str, Any]:
    return {"cat": kind, "name": name, "ts": ts, "dur": dur, "args": {"op_name": operator}}


def test_a_node_belongs_to_the_run_that_it_lies_in(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    events = [
        event("Session", "session_initialization", 0, 90),
        event("Node", "/a/MatMul_kernel_time", 105, 4, "MatMul"),
        event("Node", "/a/MatMul_fence_before", 104, 1, "MatMul"),
        event("Session", "model_run", 100, 20),
        event("Node", "/a/MatMul_kernel_time", 205, 6, "MatMul"),
        event("Node", "/Add_kernel_time", 212, 2, "Add"),
        event("Session", "model_run", 200, 30),
    ]
    path.write_text(json.dumps(events))
    first, second = read_runs(path)
    assert first.seconds == pytest.approx(2e-5)
    assert first.nodes == (("/a/MatMul", "MatMul", pytest.approx(4e-6)),)
    assert [name for name, _, _ in second.nodes] == ["/a/MatMul", "/Add"]
    assert second.seconds == pytest.approx(3e-5)


def test_every_layer_s_operators_are_counted_and_nothing_twice(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    layers = json.loads((bundle / "config.json").read_text())["num_hidden_layers"]
    with open_runtime(bundle, threads=1, prefill_chunk=40, record=True) as runtime:
        found = profile(runtime, PROMPT, len(PROMPT), 6, threads=1)
        assert runtime.cache_length == 0
        # The record has ended.
        assert isinstance(runtime, RecordsRuns)
        assert runtime.recorded_runs() == []
    for stage, runs in ((found.prefill, 2), (found.decode, 1)):
        calls = {operator.name: operator.calls for operator in stage.operators}
        assert calls["GroupQueryAttention self_attn"] == runs * layers
        assert calls["FusedMatMul lm_head"] == runs
        assert 0 < sum(operator.seconds for operator in stage.operators) <= stage.graph_s
        assert stage.graph_s + stage.sampling_s + stage.host_s == pytest.approx(stage.seconds)
        longest = [operator.seconds for operator in stage.operators]
        assert longest == sorted(longest, reverse=True)
    assert found.read_bandwidth > 1e8
    assert found.weights_share(1000) == pytest.approx(
        1000 / found.decode.seconds / found.read_bandwidth
    )


def test_prompts_of_a_second_graph_are_told_by_that_graph(
    make_bundle: MakeBundle, random_checkpoint: Path
) -> None:
    bundle = make_bundle(random_checkpoint, bits=8, prefill_int8=True)
    layers = json.loads((bundle / "config.json").read_text())["num_hidden_layers"]
    with open_runtime(bundle, threads=1, record=True) as runtime:
        found = profile(runtime, PROMPT, len(PROMPT), 5, threads=1)
    calls = {
        name: {operator.name: operator.calls for operator in stage.operators}
        for name, stage in found.stages.items()
    }
    # All of the prompt but its last token, which is a run of the other graph. Activations go in two
    # parts, and of the last layer only keys and values are wanted.
    assert calls["prefill"]["MatMulIntegerToFloat o_proj"] == 2 * (layers - 1)
    assert calls["prefill"]["GroupQueryAttention self_attn"] == 2 * layers
    assert calls["prefill"]["MatMulNBits lm_head"] == 1
    assert calls["decode"]["GroupQueryAttention self_attn"] == layers
    assert not any(name.startswith("MatMulIntegerToFloat") for name in calls["decode"])


def test_what_keeps_no_record_has_the_runtime_as_a_whole(example_torch: Runtime) -> None:
    found = profile(example_torch, PROMPT, 16, 3, threads=1)
    assert found.decode.operators == ()
    assert found.decode.graph_s > 0
    assert found.decode.host_s == pytest.approx(0, abs=1e-4)


def test_what_does_not_fit_is_refused(example_runtime: Runtime) -> None:
    with pytest.raises(RequestError, match="do not fit the context"):
        profile(example_runtime, PROMPT, example_runtime.max_context, 1, threads=1)


def test_bandwidth_is_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2x.runtimes.profile._BLOCK", 1 << 20)
    assert measure_read_bandwidth(2, repeat=2) > 1e8
