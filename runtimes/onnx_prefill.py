"""Prompts through a bundle's second graph, whose integer products are faster with many rows."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from qwen2x.runtimes.onnx_cache import BindsCache
from qwen2x.runtimes.onnx_session import recorded_runs
from qwen2x.runtimes.profile import GraphRun

# Shorter pieces gain nothing.
LEAST_ROWS = 32


class PromptGraph:
    """The session that fills the cache; it is opened when the first long prompt comes."""

    def __init__(self, open_session: Callable[[], Any]) -> None:
        self._open = open_session
        self._session: Any = None
        self._binding: Any = None
        self._bound_to: weakref.ref[BindsCache] | None = None

    def run(self, inputs: dict[str, Any], cache: BindsCache, past: int, total: int) -> None:
        """Puts keys and values of the tokens behind those of ``past`` positions.

        Args:
            inputs: as ``graph_inputs`` gives them, and those that choose a YaRN factor.
            cache: that of the other graph.
            past: positions that are there.
            total: positions that will be there.
        """
        if self._session is None:
            self._session = self._open()
        if self._bound_to is None or self._bound_to() is not cache:
            # A cache that is bound already may not bind itself again, whoever was bound since.
            self._binding = self._session.io_binding()
            self._bound_to = weakref.ref(cache)
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        cache.bind(self._binding, past, total)
        self._session.run_with_iobinding(self._binding)

    def recorded_runs(self) -> list[GraphRun]:
        """See ``RecordsRuns``; for a session that was opened with a record."""
        return [] if self._session is None else recorded_runs(self._session)

    def forget(self) -> None:
        """Lets go of the cache's memory, which a binding would hold."""
        self._binding = self._bound_to = None
