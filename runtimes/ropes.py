"""The YaRN factors of a runtime: which there are, how far each reaches, which one is in use."""

from __future__ import annotations

from collections.abc import Mapping

from qwen2x.quantize.errors import RequestError


class OffersRopes:
    """What every runtime does alike about its factors.

    A subclass calls ``_offer_ropes``, or sets ``max_context`` if it has none but 1; it implements
    ``reset`` (empty the cache), and may implement ``_apply_rope`` (take the one in use).
    """

    max_context: int
    rope_factor: float = 1.0

    def __init__(self) -> None:
        self._contexts: Mapping[float, int] = {}

    @property
    def rope_contexts(self) -> Mapping[float, int]:
        """See ``Runtime``."""
        return self._contexts or {self.rope_factor: self.max_context}

    @property
    def rope_context(self) -> int:
        """See ``Runtime``."""
        return self.rope_contexts[self.rope_factor]

    @property
    def with_factor(self) -> str:
        """Words for a context that is one of several."""
        return f" with YaRN factor {self.rope_factor:g}" if len(self.rope_contexts) > 1 else ""

    def use_rope(self, factor: float) -> None:
        """See ``Runtime``. Keys of one factor mean nothing to another: the cache is emptied."""
        if factor not in self.rope_contexts:
            raise factor_refused(factor, self.rope_contexts)
        if factor != self.rope_factor:
            self.reset()
            self.rope_factor = factor
            self._apply_rope()

    def reset(self) -> None:
        """Empties the cache."""
        raise NotImplementedError

    def _offer_ropes(self, contexts: Mapping[float, int], factor: float) -> None:
        """Sets what there is to choose from, and which one is in use."""
        self._contexts, self.max_context = contexts, max(contexts.values())
        self.rope_factor = factor

    def _apply_rope(self) -> None:
        """Told that there is another factor in ``rope_factor``; the cache is empty."""


def factor_refused(factor: float, contexts: Mapping[float, int]) -> RequestError:
    """The error about a factor that a bundle was not exported with."""
    known = ", ".join(f"{each:g}" for each in contexts)
    listed = ",".join(f"{each:g}" for each in sorted({1.0, *contexts, factor}) if each >= 1)
    return RequestError(
        f"YaRN factor {factor:g} is not there, expected one of {known}; choose one of them, or "
        f"export with --yarn {listed}"
    )
