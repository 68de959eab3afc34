"""The messages of ``chat``: kept within the context, written to a file, read from one."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2x.quantize.errors import RequestError

if TYPE_CHECKING:
    from qwen2x.runtimes.chat import Message

_ROLES = ("system", "user", "assistant")


def shift(
    messages: Sequence[Message], context: int, reserve: int, count: Callable[[list[Message]], int]
) -> tuple[list[Message], int]:
    """Leaves out the oldest turns of a conversation that has no room for another answer.

    As many go as make half of the context free, so that the prompt, whose beginning is another
    one from then on, is not read anew at every turn. Where that would leave the last message
    alone, fewer go. The system message stays.

    Args:
        messages: the last one is the user's.
        context: positions that the model has.
        reserve: those that an answer may need.
        count: gives the tokens of a prompt.

    Returns:
        The messages that stay, and how many turns went.
    """
    if count(list(messages)) <= context - reserve:
        return list(messages), 0
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    last = len(starts) - 1

    def dropped_for(most: int) -> int:
        def fits(turn: int) -> bool:
            return count([*system, *messages[starts[turn] :]]) <= most

        return bisect_left(range(last), True, key=fits)

    dropped = dropped_for(context // 2)
    if dropped == last:
        dropped = dropped_for(context - reserve)
    return [*system, *messages[starts[dropped] :]], dropped


def save(messages: Sequence[Message], name: str) -> Path:
    """Writes a conversation as JSON, an object with role and content for every message.

    Raises:
        RequestError: there is none, or the file cannot be written and stays as it was.
    """
    if not messages:
        raise RequestError("expected a conversation, got none yet; say something first")
    try:
        path = Path(name).expanduser().resolve()
        _require_file(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(messages, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(f"{name} cannot be written: {_reason(error)}; give another") from None
    return path


def load(name: str) -> list[Message]:
    """Reads a conversation that ``save`` wrote, or that has its form.

    Raises:
        RequestError: there is none, or it has another form.
    """
    try:
        path = Path(name).expanduser()
        _require_file(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(f"{name} cannot be read: {_reason(error)}; /save writes one") from None
    if not isinstance(value, list) or not value:
        raise RequestError(f"{name}: expected a list of messages, got {value!r:.60}")
    return [_message(name, index, entry) for index, entry in enumerate(value)]


def _message(name: str, index: int, entry: Any) -> Message:
    """Checks one message; the system's comes first or not at all."""
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), str) and _is_text(entry[key]) for key in ("role", "content")
    ):
        raise RequestError(
            f"{name}: expected an object with role and content as text, got {entry!r:.60} as "
            f"message {index + 1}"
        )
    roles = _ROLES if index == 0 else _ROLES[1:]
    if entry["role"] not in roles:
        raise RequestError(
            f"{name}: expected role {' or '.join(roles)}, got {entry['role']!r:.60} as message "
            f"{index + 1}"
        )
    return {"role": entry["role"], "content": entry["content"]}


def _is_text(value: str) -> bool:
    """JSON may hold halves of surrogate pairs, which are no text."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _require_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
