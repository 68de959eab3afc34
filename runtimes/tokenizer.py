"""Text to token ids and back, and a stream of text that never splits a character."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from qwen2x.quantize.errors import RequestError


class Tokenizer:
    """The ``tokenizer.json`` of a folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise RequestError(f"{folder} has no tokenizer.json; expected one beside the model")
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise RequestError(f"{path} cannot be read ({error}); fetch it again") from None
        # A tokenizer.json may carry the settings of some training run; texts are taken whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @cached_property
    def size(self) -> int:
        """Tokens that have a text; a model's vocabulary may be padded beyond."""
        return max(self.vocabulary.values()) + 1

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are taken as such, none are added."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise RequestError(
                "the text has half characters (lone surrogates), which UTF-8 cannot hold; "
                f"expected whole Unicode text, got {text!r:.80}"
            ) from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A fresh stream of text."""
        return TextStream(self, self._tokenizer)


class TextStream:
    """Tokens in, whole characters out: bytes of a character that is not complete are held back."""

    def __init__(self, tokenizer: Tokenizer, library: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._library = library
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes; often its own, sometimes none."""
        self._token_ids.append(token_id)
        piece = self._decoder.step(self._library, token_id) or ""
        self._given += len(piece)
        return piece

    def finish(self) -> str:
        """What was held back, with the replacement character for bytes that never became one."""
        rest = self._tokenizer.decode(self._token_ids)[self._given :]
        self._given += len(rest)
        return rest


class StopFilter:
    """Lets text through until a stop string is complete, however it spans the pieces.

    Text that may be the beginning of a stop string is held back until that is decided. Of several
    the one that is complete first counts, so that the outcome does not depend on the pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise RequestError("a stop string must not be empty; leave --stop out instead")
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, piece: str) -> str:
        """The text that is safe to show; after a stop string, nothing more."""
        if self.is_stopped:
            return ""
        text = self._held + piece
        found = [(text.index(stop), len(stop)) for stop in self._stops if stop in text]
        if found:
            self.is_stopped = True
            self._held = ""
            start, _ = min(found, key=lambda place: (sum(place), place[0]))
            return text[:start]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
