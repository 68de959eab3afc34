"""What an export to one target will write, whatever the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qwen2x.exporters.config import Qwen2Config
from qwen2x.exporters.options import Options
from qwen2x.exporters.weights import DataFile, Weight
from qwen2x.quantize.cache_ranges import CacheRanges
from qwen2x.quantize.plan import BitPlan


class Plan(Protocol):
    """Made without reading a weight."""

    @property
    def config(self) -> Qwen2Config:
        """The model."""
        ...

    @property
    def options(self) -> Options:
        """What was chosen."""
        ...

    @property
    def bit_plan(self) -> BitPlan:
        """The scheme of every matrix."""
        ...

    @property
    def weights(self) -> Sequence[Weight]:
        """Every weight, with its place in the data files."""
        ...

    @property
    def prefill_weights(self) -> Sequence[Weight]:
        """Those of a graph for prompts, beside ``weights``; none, if there is no such graph."""
        ...

    @property
    def data_files(self) -> Sequence[DataFile]:
        """The files that hold the weights."""
        ...

    @property
    def structure_files(self) -> Mapping[str, int]:
        """Bytes of the larger files beside them: a graph, or an index."""
        ...

    def write_structure(self, staging: Path, cache_ranges: CacheRanges | None) -> dict[str, Any]:
        """Writes what describes the model to those who load it; gives what the manifest adds.

        ``cache_ranges`` are there where the options ask for a KV cache in 8 bits.
        """
        ...

    def manifest(self) -> dict[str, Any]:
        """The target's own part of the manifest."""
        ...


def planned_files(plan: Plan) -> dict[str, int]:
    """Bytes of weights and of what describes them, by file name."""
    return {**plan.structure_files, **{file.name: file.size for file in plan.data_files}}
