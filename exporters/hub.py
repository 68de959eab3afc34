"""A SOURCE, which is a local folder or a hub id, as a local folder.

huggingface_hub does the work and reads HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE itself.
It is imported inside the functions: it takes longer to load than ``qwen2x --help`` may take.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2x.exporters.hub_file import HubFile, discard_partials, fetch_file, partial_bytes
from qwen2x.quantize.errors import SourceError

if TYPE_CHECKING:
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import HfHubHTTPError

_CONFIG = "config.json"
_WEIGHTS = "model*.safetensors"
_NEEDED = (
    _CONFIG,
    "generation_config.json",
    _WEIGHTS,
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "added_tokens.json",
    "special_tokens_map.json",
)
_EXAMPLE = "Qwen/Qwen2-0.5B-Instruct"


def resolve_source(
    source: str | Path,
    *,
    revision: str | None = None,
    progress: bool = True,
    weights: bool = True,
) -> Path:
    """Gives the local folder of a source; a hub id is first fetched into the user's cache.

    Only the files that an export reads are fetched, the weights as safetensors only. What is in
    the cache, also a part of a large file, is not fetched again. A hub that cannot be reached is
    no obstacle when the cache holds every file.

    Args:
        source: a folder, or a hub id such as ``Qwen/Qwen2-0.5B-Instruct``.
        revision: a branch, tag or commit of the hub id; None is its main branch.
        progress: whether bytes are counted on standard error.
        weights: whether they are needed too; without, a hub id costs a few megabytes.

    Returns:
        The folder, as an absolute path.

    Raises:
        SourceError: the source is neither, cannot be read, or holds no safetensors.
    """
    folder = _local_folder(source)
    if folder is None:
        return _fetch_explained(_hub_id(source), revision or "main", progress, weights)
    if revision is not None:
        raise SourceError(
            f"a revision belongs to a hub id, got revision {revision!r} with the local folder "
            f"{folder}; leave the revision out"
        )
    return folder


def source_id(source: str | Path) -> str:
    """Gives the hub id, or the name of a local folder."""
    folder = _local_folder(source)
    return str(source) if folder is None else os.path.basename(os.path.abspath(folder))


def _local_folder(source: str | Path) -> Path | None:
    path = os.path.expanduser(source)
    return Path(path).absolute() if path and os.path.isdir(path) else None


def _hub_id(source: str | Path) -> str:
    """Checks that what is no folder can be a hub id, which has at most one slash."""
    text = str(source)
    if os.path.isfile(os.path.expanduser(text)):
        parent = Path(text).expanduser().absolute().parent
        raise SourceError(
            f"expected a folder with {_CONFIG} and {_WEIGHTS}, got the file {text!r}; "
            f"give a folder, for example {parent}"
        )
    if "://" in text:
        raise SourceError(
            f"expected a local folder or a hub id such as {_EXAMPLE}, got the address {text!r}; "
            "give only its org/name, and a branch or commit with --revision"
        )
    if text.startswith((".", "/", "~", os.sep)) or text.count("/") > 1 or text.count(os.sep) > 1:
        raise SourceError(f"expected a folder, got {text!r}, where there is none; check the path")
    return text


def _fetch_explained(repo_id: str, revision: str, progress: bool, weights: bool) -> Path:
    """Fetches, and turns what can go wrong on the way into one line."""
    import httpx2
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        return _fetch(repo_id, revision, progress, weights)
    except HFValidationError as error:
        raise SourceError(
            f"expected a local folder or a hub id such as {_EXAMPLE}, got {repo_id!r}, which is "
            "neither; a hub id is name or org/name in letters, digits, '-', '_' and '.'"
        ) from error
    except (
        OSError,
        RevisionResolutionError,
        httpx2.TransportError,
        httpx2.InvalidURL,
        json.JSONDecodeError,
    ) as error:
        raise _explain(error, repo_id, revision) from error


def _fetch(repo_id: str, revision: str, progress: bool, weights: bool) -> Path:
    """Fetches what is missing, file by file in this thread.

    ``snapshot_download`` takes the listing and finds the folder. It does not take the weights:
    its worker threads would hold back Ctrl-C until their files are complete.
    """
    from huggingface_hub import is_offline_mode, resolve_revision, snapshot_download

    resolved = resolve_revision(repo_id, revision=revision, local_files_only=is_offline_mode())
    commit = resolved.resolved
    files = _list_files(repo_id, commit)
    if files is None:
        return _unlisted_folder(repo_id, commit)
    _refuse_unusable(repo_id, [file.name for file in files])
    with _hidden_bars():
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=_CONFIG))
    if not _missing(files, folder, weights):
        return folder
    if not any(file.sha256 for file in files):
        files = _list_on_hub(repo_id, commit) or files
    missing = _missing(files, folder, weights)
    discard_partials(folder, {file.sha256 for file in files if file.sha256})
    _refuse_full_disk(folder, missing)
    if progress:
        _announce(f"{repo_id} ({revision}, {commit[:7]})", folder, missing)
    with nullcontext() if progress else _hidden_bars():
        for file in missing:
            _download(file, folder)
    return folder


def _missing(files: Iterable[HubFile], folder: Path, weights: bool) -> list[HubFile]:
    """Gives the needed files that the snapshot does not have yet."""
    return [
        file
        for file in files
        if _is_needed(file.name)
        and (weights or not fnmatchcase(file.name, _WEIGHTS))
        and not (folder / file.name).exists()
    ]


def _announce(what: str, folder: Path, missing: Sequence[HubFile]) -> None:
    """Says what is about to come, and how much of it an earlier call has brought."""
    total = _megabytes(sum(file.bytes for file in missing))
    here_bytes = sum(partial_bytes(file, folder) for file in missing)
    here = f", {_megabytes(here_bytes)} of them are here" if here_bytes else ""
    print(f"fetching {what}: {len(missing)} files, {total}{here}", file=sys.stderr, flush=True)


def _list_files(repo_id: str, commit: str) -> list[HubFile] | None:
    """Gives every file of the commit; None when neither cache nor hub tells.

    What the cache tells comes without hashes: the library's public function leaves them out.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(repo_id, revision=commit)
    except CachedRepoTreeNotFoundError:
        return _list_on_hub(repo_id, commit)
    return [_described(repo_id, file) for file in files]


def _list_on_hub(repo_id: str, commit: str) -> list[HubFile] | None:
    """Gives every file of the commit with its hash; None without a connection."""
    import httpx2
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        entries = list(HfApi().list_repo_tree(repo_id, recursive=True, revision=commit))
    except (OfflineModeIsEnabled, httpx2.TransportError):
        return None
    return [_described(repo_id, entry) for entry in entries if isinstance(entry, RepoFile)]


def _described(repo_id: str, file: RepoFile) -> HubFile:
    sha256 = file.lfs.sha256 if file.lfs else None
    return HubFile(repo_id=repo_id, name=file.path, bytes=file.size, sha256=sha256)


def _unlisted_folder(repo_id: str, commit: str) -> Path:
    """Gives the cached folder when its listing is unknown: an older version may have filled it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(snapshot_download(repo_id, revision=commit, local_files_only=True))
    names = os.listdir(folder)
    if _CONFIG not in names or not _matching(names, _WEIGHTS):
        raise LocalEntryNotFoundError(f"{_CONFIG} or {_WEIGHTS} is missing in {folder}")
    return folder


def _refuse_unusable(repo_id: str, names: Iterable[str]) -> None:
    """Refuses a repository without config or safetensors before anything large is fetched."""
    names = sorted(names)
    if not _matching(names, _WEIGHTS):
        wanted, found = _WEIGHTS, _other_weights(names)
    elif _CONFIG not in names:
        wanted, found = _CONFIG, _first_of(names)
    else:
        return
    raise SourceError(
        f"expected {wanted} in {repo_id}, got {found}; choose a repository of the same model "
        f"with {_CONFIG} and safetensors, or convert it and give the local folder"
    )


def _other_weights(names: list[str]) -> str:
    for kind, pattern in (("pickle", "*.bin"), ("pickle", "*.pt"), ("GGUF", "*.gguf")):
        found = _matching(names, pattern)
        if found:
            return f"only {kind} weights ({_first_of(found)})"
    return _first_of(names)


def _refuse_full_disk(folder: Path, missing: Sequence[HubFile]) -> None:
    """Refuses a download that the disk has no room for; what is there of it already counts."""
    from huggingface_hub import hf_hub_download

    repo_id = missing[0].repo_id
    free_bytes = shutil.disk_usage(folder).free
    if sum(file.bytes - partial_bytes(file, folder) for file in missing) <= free_bytes:
        return
    # Another revision may already have brought the same bytes: ask file by file.
    needed_bytes = sum(
        file.bytes - partial_bytes(file, folder)
        for file in missing
        if hf_hub_download(repo_id, file.name, revision=folder.name, dry_run=True).will_download
    )
    if needed_bytes > free_bytes:
        raise SourceError(
            f"{repo_id} needs {_megabytes(needed_bytes)} in {folder.parents[2]}, got "
            f"{_megabytes(free_bytes)} of free space; free some, or set HF_HOME to a larger disk"
        )


def _download(file: HubFile, folder: Path) -> None:
    try:
        fetch_file(file, folder)
    except RuntimeError as error:  # hf_xet has no class of its own for a failed transfer
        raise SourceError(
            f"expected {file.name} of {file.repo_id} from the hub's Xet storage, got: "
            f"{_one_line(error)}; run the same command again, with HF_HUB_DISABLE_XET=1 if it "
            "happens again"
        ) from error


def _hidden_bars() -> AbstractContextManager[object]:
    """Hides the library's bars, unless HF_HUB_DISABLE_PROGRESS_BARS=0 demands them."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    is_demanded = constants.HF_HUB_DISABLE_PROGRESS_BARS is False
    return nullcontext() if is_demanded else disable_progress_bars()


def _explain(error: Exception, repo_id: str, revision: str) -> SourceError:
    """Says in one line what was expected, what came and what to do."""
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RevisionResolutionError,
    )

    is_absent = isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError))
    origin = error.__cause__ if is_absent and isinstance(error.__cause__, Exception) else error
    if isinstance(origin, HfHubHTTPError):
        return _explain_answer(origin, repo_id, revision)
    if is_absent and is_offline_mode():
        return SourceError(
            f"expected a folder {repo_id}, or that hub id ({revision}) complete in "
            f"{constants.HF_HUB_CACHE} since HF_HUB_OFFLINE is set, got nothing or only a part; "
            "unset HF_HUB_OFFLINE and run again, or give a local folder"
        )
    if not is_absent and isinstance(error, OSError) and error.errno is not None:
        return _explain_disk(error, repo_id)
    return SourceError(
        f"expected {repo_id} from {constants.ENDPOINT}, since no such folder is here, got no "
        f"complete answer ({_one_line(origin)}); check the connection, the proxy and HF_ENDPOINT "
        "and run the same command again: what has come is kept"
    )


def _explain_answer(error: HfHubHTTPError, repo_id: str, revision: str) -> SourceError:
    """Says what an HTTP status of 400 or more means here."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = error.response.status_code
    page = f"{constants.ENDPOINT}/{repo_id}"
    sent = "with the token that was sent" if get_token() else "and no token was sent"
    login = f"set HF_TOKEN to a token that may read it and accept the licence on {page}"
    if isinstance(error, GatedRepoError):
        return SourceError(f"{repo_id} is gated, got {status} {sent}; {login}")
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            f"expected a branch, tag or commit of {repo_id}, got revision "
            f"{revision!r}, which it does not have; see {page}/tree/main"
        )
    if status in (401, 403):
        return SourceError(
            f"{repo_id} is no local folder, and the hub does not show it, got {status} {sent}; "
            f"check the spelling, and if it is private or gated, {login}"
        )
    if status == 404:
        return SourceError(
            f"expected a local folder or a hub id, got {repo_id!r}, which is no folder here and "
            f"not found at {page} (404 {sent}); check the spelling, or set HF_TOKEN if it is "
            "private"
        )
    advice = "wait a while, or set HF_TOKEN" if status == 429 else "try again later"
    return SourceError(f"expected {repo_id} from {page}, got HTTP status {status}; {advice}")


def _explain_disk(error: OSError, repo_id: str) -> SourceError:
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceError(
            f"expected room for {repo_id} in {cache}, got: {_one_line(error)}; free some space, or "
            "set HF_HOME to a larger disk, and run the same command again: what has come is kept"
        )
    return SourceError(
        f"expected to store {repo_id} in {cache}, got: {_one_line(error)}; make that folder "
        "writable, or set HF_HOME to another one"
    )


def _is_needed(name: str) -> bool:
    return any(_matching([name], pattern) for pattern in _NEEDED)


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    """Gives the names at the top of a repository that match."""
    return [name for name in names if "/" not in name and fnmatchcase(name, pattern)]


def _first_of(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "no file at all"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
