"""Where the time of a prefill and of a decode step goes.

Operators come from the runtime's own record (ONNX Runtime's profiler, which stretches short ones by
about a microsecond each); what is left of the measured time is sampling, and Python around both.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.runtime import Runtime
from qwen2x.runtimes.sampler import Sampler, Sampling

# Large enough to be in no cache.
_BLOCK = 128 * 2**20
_MICROSECOND = 1e-6
_NODE_SUFFIX = "_kernel_time"
# Of a product whose activations go in two parts of 8 bits, and of attention in two ways.
_PARTS = ("first", "second", "tiles", "whole")


@dataclass(frozen=True, kw_only=True)
class GraphRun:
    """One run of a graph: its seconds, and those of its nodes by path and operator.

    ``started`` is in seconds, and tells which of several graphs ran first.
    """

    seconds: float
    nodes: tuple[tuple[str, str, float], ...]
    started: float = 0.0


@runtime_checkable
class RecordsRuns(Protocol):
    """A runtime that was opened to record what its graph does."""

    def recorded_runs(self) -> list[GraphRun]:
        """All runs so far, in order; recording ends."""
        ...


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Nodes of one operator and one place in a layer: how many, and their seconds in all."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One prefill, or the median decode step.

    Attributes:
        seconds: from the tokens to the choice of the next one.
        graph_s: of them in the graph; without a record, in the runtime as a whole.
        sampling_s: of them in choosing.
        operators: the graph's, the longest first.
    """

    seconds: float
    graph_s: float
    sampling_s: float
    operators: tuple[Operator, ...]

    @property
    def host_s(self) -> float:
        """In Python and the calls around graph and sampling."""
        return max(0.0, self.seconds - self.graph_s - self.sampling_s)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """See ``profile``. ``read_bandwidth`` is bytes per second."""

    prefill: Stage
    decode: Stage
    read_bandwidth: float

    @property
    def stages(self) -> dict[str, Stage]:
        """By name."""
        return {"prefill": self.prefill, "decode": self.decode}

    def weights_share(self, weight_bytes: int) -> float:
        """What part of the read bandwidth a decode step uses for its weights alone."""
        return weight_bytes / self.decode.seconds / self.read_bandwidth


def profile(
    runtime: Runtime, text_ids: Sequence[int], prompt_tokens: int, new_tokens: int, threads: int
) -> Profile:
    """Measures one prefill and the decode steps behind it, after a run to warm up.

    Args:
        runtime: with a record, if it is opened for one; see ``RecordsRuns``.
        text_ids: tokens of any text, repeated where it is too short.
        prompt_tokens: length of the prompt.
        new_tokens: steps, of which the median counts, and one more.
        threads: that read memory at once to measure its bandwidth.

    Raises:
        RequestError: the lengths do not fit the context.
    """
    if prompt_tokens + new_tokens > runtime.max_context:
        raise RequestError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens do not fit the context of "
            f"{runtime.max_context}; ask for fewer"
        )
    prompt = (list(text_ids) * math.ceil(prompt_tokens / len(text_ids)))[:prompt_tokens]
    bandwidth = measure_read_bandwidth(threads)
    _timed_run(runtime, prompt, min(2, new_tokens))
    times = _timed_run(runtime, prompt, new_tokens)
    runtime.reset()
    runs = runtime.recorded_runs() if isinstance(runtime, RecordsRuns) else []
    steps = len(times) - 1
    decoding, before = runs[len(runs) - steps :], runs[: len(runs) - steps]
    # The runs of the last prefill are behind those of the first prefill and its steps. With a graph
    # for prompts, a piece of the prompt is a run of either.
    chunks = (len(before) - min(2, new_tokens) + 1) // 2
    middle = sorted(range(steps), key=lambda step: times[1 + step][0])[steps // 2]
    return Profile(
        prefill=_stage(*times[0], before[-chunks:] if runs else []),
        decode=_stage(*times[1 + middle], [decoding[middle]] if runs else []),
        read_bandwidth=bandwidth,
    )


def _timed_run(
    runtime: Runtime, prompt: list[int], new_tokens: int
) -> list[tuple[float, float, float]]:
    """Per pass (the prefill, then steps) its seconds, those in the runtime, those in sampling."""
    runtime.reset()
    sampler = Sampler(Sampling())
    times: list[tuple[float, float, float]] = []
    running, started = prompt, time.perf_counter()
    for _ in range(new_tokens):
        logits = runtime.append(running)[-1]
        computed = time.perf_counter()
        running = [sampler.choose(logits)]
        chosen = time.perf_counter()
        times.append((chosen - started, computed - started, chosen - computed))
        started = chosen
    return times


def _stage(seconds: float, running: float, sampling: float, runs: list[GraphRun]) -> Stage:
    groups: dict[str, list[float]] = {}
    for run in runs:
        for path, operator, taken in run.nodes:
            groups.setdefault(_label(path, operator), []).append(taken)
    operators = [
        Operator(name=name, calls=len(taken), seconds=sum(taken)) for name, taken in groups.items()
    ]
    return Stage(
        seconds=seconds,
        graph_s=sum(run.seconds for run in runs) if runs else running,
        sampling_s=sampling,
        operators=tuple(sorted(operators, key=lambda operator: -operator.seconds)),
    )


def _label(path: str, operator: str) -> str:
    """``MatMulNBits gate_up_proj`` for such a node of any layer."""
    places = [part for part in path.split("/")[:-1] if part and part not in _PARTS]
    return f"{operator} {places[-1]}" if places else operator


def read_runs(path: Path, began: float = 0.0) -> list[GraphRun]:
    """The runs in a file that ONNX Runtime's profiler wrote, whose clock ``began`` at so many s.

    Events: ``model_run`` is a run, and a node's kernel time lies within its run (docs/
    performance/tune-performance/profiling-tools of onnxruntime.ai). Times are microseconds.
    """
    events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    runs = sorted(
        (event for event in events if event.get("name") == "model_run"),
        key=lambda event: event["ts"],
    )
    starts = [event["ts"] for event in runs]
    nodes: list[list[tuple[str, str, float]]] = [[] for _ in runs]
    for event in events:
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith(_NODE_SUFFIX):
            continue
        run = int(np.searchsorted(starts, event["ts"], side="right")) - 1
        operator = event["args"]["op_name"]
        # The nodes of a branch have events of their own, beside that of the branching.
        if run >= 0 and operator != "If":
            node = (name.removesuffix(_NODE_SUFFIX), operator, event["dur"] * _MICROSECOND)
            nodes[run].append(node)
    return [
        GraphRun(
            seconds=event["dur"] * _MICROSECOND,
            nodes=tuple(found),
            started=began + event["ts"] * _MICROSECOND,
        )
        for event, found in zip(runs, nodes, strict=True)
    ]


def measure_read_bandwidth(threads: int, repeat: int = 5) -> float:
    """Bytes per second that so many threads read from memory together; the best of repeats."""
    blocks = [np.ones(_BLOCK // 4, np.float32) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeat):
            started = time.perf_counter()
            list(pool.map(np.max, blocks))
            best = min(best, time.perf_counter() - started)
    return threads * _BLOCK / best
