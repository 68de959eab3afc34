"""One large file of a hub repository, whose download goes on at the next call.

huggingface_hub 2.4.0 resumes within one call only: every call writes to a temporary file of its own
and deletes it when it ends (``_download_to_tmp_and_move`` in ``file_download.py``), by Xet as by
HTTP. Here the bytes wait in ``blobs/{sha256}.incomplete`` of the library's cache. The library still
does the rest: identity and token, the transfer with its retries and bar, and the snapshot's link.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from qwen2x.quantize.errors import SourceError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_INCOMPLETE = ".incomplete"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file as the listing of a commit describes it.

    Attributes:
        repo_id: ``org/name`` or ``name``.
        name: within the repository.
        bytes: its size.
        sha256: of its content, where the listing tells it, which it does for what is large.
    """

    repo_id: str
    name: str
    bytes: int
    sha256: str | None


def fetch_file(file: HubFile, folder: Path) -> None:
    """Brings a file into the cache; what an earlier call left of it is not fetched again.

    Args:
        file: what to fetch.
        folder: the snapshot it belongs to, ``{cache}/{repository}/snapshots/{commit}``.

    Raises:
        SourceError: the bytes that came are not those of the listing.
        OSError, httpx2.TransportError: what huggingface_hub and the disk raise.
    """
    from huggingface_hub import hf_hub_download

    commit = folder.name
    if file.sha256 is not None and _is_needed_whole(file, commit):
        _resume(file, folder, file.sha256)
    hf_hub_download(file.repo_id, file.name, revision=commit)


def partial_bytes(file: HubFile, folder: Path) -> int:
    """How much of a file an earlier call has left."""
    if file.sha256 is None:
        return 0
    try:
        return min(_partial(folder, file.sha256).stat().st_size, file.bytes)
    except FileNotFoundError:
        return 0


def discard_partials(folder: Path, wanted: Collection[str]) -> None:
    """Deletes what was left of files that the commit no longer has, if nobody is fetching them.

    Args:
        folder: the snapshot.
        wanted: the sha256 of every file of its commit; none at all where they are not known.
    """
    for sha256, path in _partials(folder):
        if not wanted or sha256 in wanted:
            continue
        try:
            with _lock(folder, sha256).acquire(timeout=0):
                path.unlink(missing_ok=True)
        except Timeout:
            continue


def _is_needed_whole(file: HubFile, commit: str) -> bool:
    """Whether no other revision, and no other repository, has brought the same bytes.

    A file of more than 50 GB is only to be had by Xet, and that is left to the library.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    if file.bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return False
    if not hf_hub_download(file.repo_id, file.name, revision=commit, dry_run=True).will_download:
        return False
    # A mirror may name its files otherwise: the library would look for them under that name.
    url = hf_hub_url(file.repo_id, file.name, revision=commit)
    return get_hf_file_metadata(url, retry_on_errors=True).etag == file.sha256


def _resume(file: HubFile, folder: Path, sha256: str) -> None:
    """Completes the partial file and puts it where the library looks for a blob."""
    from huggingface_hub.file_download import are_symlinks_supported

    partial = _partial(folder, sha256)
    # Without links the snapshot holds the file itself.
    has_links = are_symlinks_supported(folder.parents[2])
    target = partial.with_name(sha256) if has_links else folder / file.name
    for parent in (partial.parent, target.parent):
        parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder, sha256):
        if not target.exists():
            _complete(file, folder.name, partial)
            _require_content(file, partial, sha256)
            partial.replace(target)


def _complete(file: HubFile, commit: str, partial: Path) -> None:
    """Appends what is missing; a partial file that cannot be a part of it begins again."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with partial.open("ab") as stream:
        if stream.tell() > file.bytes:
            stream.truncate(0)
        http_get(
            hf_hub_url(file.repo_id, file.name, revision=commit),
            stream,
            resume_size=partial.stat().st_size,
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=file.bytes,
            displayed_filename=file.name,
        )
        stream.flush()
        os.fsync(stream.fileno())


def _require_content(file: HubFile, partial: Path, sha256: str) -> None:
    with partial.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        partial.unlink()
        raise SourceError(
            f"expected {file.name} of {file.repo_id} with sha256 {sha256}, got {found}; the "
            "damaged bytes were thrown away: run the same command again"
        )


def _partials(folder: Path) -> Iterator[tuple[str, Path]]:
    """Our partial files; those of the library have a second dot in their names."""
    for path in folder.parents[1].glob(f"blobs/*{_INCOMPLETE}"):
        sha256 = path.name.removesuffix(_INCOMPLETE)
        if _SHA256.fullmatch(sha256):
            yield sha256, path


def _partial(folder: Path, sha256: str) -> Path:
    return folder.parents[1] / "blobs" / f"{sha256}{_INCOMPLETE}"


def _lock(folder: Path, sha256: str) -> FileLock:
    """The library's own lock of a blob, so that two programs do not fetch it at once."""
    repository = folder.parents[1]
    path = repository.parent / ".locks" / repository.name / f"{sha256}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, mode=0o664)
