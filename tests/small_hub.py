"""A small Hugging Face hub on 127.0.0.1, for tests.

It serves the routes that huggingface_hub 2.4.0 asks for when it downloads a model
(``hf_api.py``: ``model_info`` and ``list_repo_tree``; ``file_download.py``:
``get_hf_file_metadata`` and ``http_get``):

    GET        /api/models/{id}                     the commit of ``main``
    GET        /api/models/{id}/revision/{rev}      the commit of a branch, tag or commit
    GET        /api/models/{id}/tree/{rev}          every file: path, size, git id, sha256
    HEAD, GET  /{id}/resolve/{rev}/{file}           ETag, X-Repo-Commit, X-Linked-Size, Range

No Xet header is ever sent, so plain HTTP is what the library uses.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer
from typing import Self
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What is sent back."""

    status: HTTPStatus
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(kw_only=True)
class _Repository:
    """The files of every revision, and who may read them."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    is_gated: bool = False


@dataclass(kw_only=True)
class _Trouble:
    """What goes wrong, once, when a file is sent."""

    after_bytes: int
    kind: str


class SmallHub:
    """A hub for the length of a ``with`` block; ``endpoint`` is what HF_ENDPOINT should hold.

    with SmallHub() as hub:
        hub.add("org/name", {"config.json": b"{}"})
        ...
        assert hub.paths("GET") == [...]

    Attributes:
        missing_status: the answer for a repository that does not exist.
        takes_ranges: false for a server that answers a range with the whole file.
        etag_prefix: what a mirror that names files in its own way sets before the hash.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.missing_status = HTTPStatus.NOT_FOUND
        self.takes_ranges = True
        self.etag_prefix = ""
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._repositories: dict[str, _Repository] = {}
        self._troubles: dict[str, _Trouble] = {}
        self._status: HTTPStatus | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(0.01,), daemon=True)

    @property
    def endpoint(self) -> str:
        """The address, without a slash at its end."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port; calling it twice does no harm."""
        self.released.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def add(
        self,
        repository: str,
        files: Mapping[str, bytes] | Path,
        *,
        revision: str = "main",
        token: str | None = None,
        is_gated: bool = False,
    ) -> str:
        """Publishes files under a revision and gives the commit.

        Args:
            repository: ``org/name`` or ``name``.
            files: name in the repository to bytes, or a folder.
            revision: a branch or a tag.
            token: without it every route answers 401 (private), or only the files if is_gated.
            is_gated: the listing is public, a file answers 401 without and 403 with another token.
        """
        content = _read_folder(files) if isinstance(files, Path) else dict(files)
        commit = hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()
        known = self._repositories.setdefault(repository, _Repository())
        known.files[commit] = content
        known.commits.update({revision: commit, commit: commit})
        known.token, known.is_gated = token, is_gated
        return commit

    def cut(self, name: str, *, after_bytes: int, reset: bool = False) -> None:
        """The next GET of file ``name`` ends after that many bytes of its body.

        Args:
            name: the file's name, without its repository.
            after_bytes: how much of the body still goes out.
            reset: end with a TCP reset instead of a close.
        """
        self._troubles[name] = _Trouble(after_bytes=after_bytes, kind="reset" if reset else "close")

    def stall(self, name: str, *, after_bytes: int) -> None:
        """The next GET of file ``name`` falls silent after that many bytes, until the hub stops."""
        self._troubles[name] = _Trouble(after_bytes=after_bytes, kind="stall")

    def answer_always(self, status: HTTPStatus | None) -> None:
        """Answers every request with this status; None ends it."""
        self._status = status

    def paths(self, method: str | None = None) -> list[str]:
        """The paths asked for so far, without queries and the library's look-up of agents."""
        with self._lock:
            return [
                request.path
                for request in self.requests
                if method in (None, request.method) and request.path != "/api/agent-harnesses"
            ]

    def ranges(self, name: str) -> list[str | None]:
        """The ranges in which the file of that name was asked for so far; None is the whole."""
        with self._lock:
            return [
                request.range
                for request in self.requests
                if request.method == "GET" and request.path.endswith(f"/{name}")
            ]

    def file_names(self, method: str = "GET") -> list[str]:
        """The files asked for so far, by their names in their repository."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for path in self.paths(method)
            if "/resolve/" in path
        ]

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def take_trouble(self, name: str) -> _Trouble | None:
        with self._lock:
            return self._troubles.pop(name, None)

    def answer(self, request: Request) -> _Answer:
        if self._status is not None:
            return _Answer(status=self._status)
        listing = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+))?", request.path)
        if listing:
            name, kind, revision = listing.groups()
            return self._answer_listing(request, name, kind, unquote(revision or "main"))
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", request.path)
        if file:
            name, revision, path = file.groups()
            return self._answer_file(request, name, unquote(revision), unquote(path))
        return _Answer(status=HTTPStatus.NOT_FOUND)

    def _answer_listing(
        self, request: Request, name: str, kind: str | None, revision: str
    ) -> _Answer:
        repository = self._repositories.get(name)
        if repository is None or not _may_list(repository, request):
            return self._refuse(repository)
        commit = repository.commits.get(revision)
        if commit is None:
            return _error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        files = repository.files[commit]
        if kind == "tree":
            return _json([_tree_entry(path, data) for path, data in sorted(files.items())])
        siblings = [{"rfilename": path} for path in sorted(files)]
        return _json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _answer_file(self, request: Request, name: str, revision: str, path: str) -> _Answer:
        repository = self._repositories.get(name)
        if repository is None or not _may_read(repository, request):
            has_token = request.authorization is not None
            if repository is not None and repository.is_gated:
                status = HTTPStatus.FORBIDDEN if has_token else HTTPStatus.UNAUTHORIZED
                return _error(status, "GatedRepo")
            return self._refuse(repository)
        commit = repository.commits.get(revision)
        if commit is None:
            return _error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        data = repository.files[commit].get(path)
        if data is None:
            return _error(HTTPStatus.NOT_FOUND, "EntryNotFound", {"X-Repo-Commit": commit})
        if not self.takes_ranges:
            request = replace(request, range=None)
        return _file(request, path, data, commit, self.etag_prefix)

    def _refuse(self, repository: _Repository | None) -> _Answer:
        """The real hub answers 401 for a private model and, without a token, for a missing one."""
        status = self.missing_status if repository is None else HTTPStatus.UNAUTHORIZED
        return _error(status, "RepoNotFound")


def _read_folder(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _may_list(repository: _Repository, request: Request) -> bool:
    return repository.is_gated or _may_read(repository, request)


def _may_read(repository: _Repository, request: Request) -> bool:
    return repository.token is None or request.authorization == f"Bearer {repository.token}"


def _tree_entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data)}
    entry["oid"] = _git_id(data)
    if path.endswith(_LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entry


def _json(value: object) -> _Answer:
    headers = {"Content-Type": "application/json"}
    return _Answer(status=HTTPStatus.OK, headers=headers, body=json.dumps(value).encode())


def _error(status: HTTPStatus, code: str, headers: dict[str, str] | None = None) -> _Answer:
    return _Answer(status=status, headers={"X-Error-Code": code, **(headers or {})})


def _file(request: Request, path: str, data: bytes, commit: str, etag_prefix: str) -> _Answer:
    digest = hashlib.sha256(data).hexdigest() if path.endswith(_LARGE) else _git_id(data)
    etag = etag_prefix + digest
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if path.endswith(_LARGE):
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag}"'}
    if request.range is None:
        return _Answer(status=HTTPStatus.OK, headers=headers, body=data)
    first, last = request.range.removeprefix("bytes=").split("-")
    start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
    if start >= len(data):
        return _Answer(status=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
    return _Answer(status=HTTPStatus.PARTIAL_CONTENT, headers=headers, body=data[start : end + 1])


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """One connection; what to answer is asked of the hub."""

    protocol_version = "HTTP/1.1"

    def __init__(
        self, hub: SmallHub, request: socket.socket, client: tuple[str, int], server: BaseServer
    ) -> None:
        self._hub = hub
        super().__init__(request, client, server)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the requests are in ``hub.requests``."""

    def _answer(self) -> None:
        request = Request(
            method=self.command,
            path=urlsplit(self.path).path,
            range=self.headers.get("Range"),
            authorization=self.headers.get("Authorization"),
        )
        self._hub.record(request)
        answer = self._hub.answer(request)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "GET" and answer.body:
            self._send_body(request, answer.body)

    def _send_body(self, request: Request, body: bytes) -> None:
        trouble = self._hub.take_trouble(unquote(request.path).split("/")[-1])
        if trouble is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: trouble.after_bytes])
        self.wfile.flush()
        self.close_connection = True
        if trouble.kind == "stall":
            self._hub.released.wait()
        elif trouble.kind == "reset":
            time.sleep(0.5)  # a reset drops what is still on its way
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
