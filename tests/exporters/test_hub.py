"""A SOURCE becomes a folder: judged with huggingface_hub itself and a hub on 127.0.0.1."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from http import HTTPStatus
from pathlib import Path

import pytest

from qwen2x.exporters.hub import resolve_source, source_id
from qwen2x.quantize.errors import SourceError
from tests.exporters.hub_client import Client, partials, sha256
from tests.small_hub import SmallHub

SMALL = {"config.json": b"{}", "model.safetensors": b"weights"}
NEEDED = {
    "config.json": b'{"model_type": "qwen2"}',
    "generation_config.json": b'{"top_k": 20}',
    "model-00001-of-00002.safetensors": b"first shard",
    "model-00002-of-00002.safetensors": b"second shard",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 32768}',
    "vocab.json": b'{"a": 0}',
    "merges.txt": b"#version: 0.2",
    "chat_template.jinja": b"{{ messages }}",
    "added_tokens.json": b'{"<|im_end|>": 1}',
    "special_tokens_map.json": b'{"eos_token": "<|im_end|>"}',
}
DECOYS = {
    ".gitattributes": b"*.bin filter=lfs",
    "README.md": b"# Qwen2",
    "adapter_model.safetensors": b"adapter",
    "model.gguf": b"GGUF",
    "modeling_qwen2.py": b"import os",
    "onnx/config.json": b"elsewhere",
    "model_onnx/model.safetensors": b"elsewhere",
    "pytorch_model.bin": b"pickle",
}
# huggingface_hub writes pieces of 10 MiB (constants.DOWNLOAD_CHUNK_SIZE) and resumes after one.
PIECE_BYTES = 10 * 1024 * 1024
WEIGHTS = "model.safetensors"
LARGE = SMALL | {WEIGHTS: bytes(range(256)) * (PIECE_BYTES // 128)}
PATHS = ("./modle", "../a", "/no/a", "~/no", "a/b/c", ".modle", "a/b/")
WITHOUT_LINKS = {"HF_HUB_DISABLE_SYMLINKS": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
BARS_WITHOUT_A_TERMINAL = {"TQDM_POSITION": "-1"}

NEARLY_FULL = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 0, 9)"
FULL = """
import errno, huggingface_hub.file_download as download
def http_get(*args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")
download.http_get = http_get
"""


def test_a_hub_id_brings_the_needed_files_and_no_other(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", NEEDED | DECOYS)
    folder = client.folder("org/name")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == NEEDED
    assert folder.is_relative_to(client.home)
    assert sorted(hub.file_names("GET")) == sorted(NEEDED)
    assert set(hub.file_names("HEAD")) == set(NEEDED)


def test_a_second_look_up_asks_for_the_commit_only(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    first = client.folder("org/name")
    hub.requests.clear()
    assert client.folder("org/name") == first
    assert hub.paths() == ["/api/models/org/name/revision/main"]


def test_a_name_alone_works(hub: SmallHub, client: Client, tmp_path: Path) -> None:
    (tmp_path / "published" / "sub").mkdir(parents=True)
    for name in (*SMALL, "sub/model.safetensors"):
        (tmp_path / "published" / name).write_text(name)
    hub.add("name", tmp_path / "published")
    assert sorted(path.name for path in client.folder("name").iterdir()) == sorted(SMALL)


def test_two_revisions_live_side_by_side(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    commit = hub.add("org/name", SMALL | {"model.safetensors": b"older"}, revision="v1/α")
    main = client.folder("org/name")
    tagged = client.folder("org/name", revision="v1/α")
    assert (main / "model.safetensors").read_bytes() == b"weights"
    assert (tagged / "model.safetensors").read_bytes() == b"older"
    hub.stop()
    assert client.folder("org/name", revision=commit) == tagged


def test_a_revision_that_does_not_exist_is_named(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    message = client.error("org/name", revision="v9")
    assert "expected a branch, tag or commit of org/name, got revision 'v9'" in message
    assert f"see {hub.endpoint}/org/name/tree/main" in message


def test_the_token_goes_with_every_request_for_the_model(hub: SmallHub, client: Client) -> None:
    hub.add("org/private", SMALL, token="hf_secret")
    client.folder("org/private", {"HF_TOKEN": "hf_secret"})
    asked = [request for request in hub.requests if "org/private" in request.path]
    assert {request.authorization for request in asked} == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("name", "token", "came"),
    [
        ("gated", "", "org/gated is gated, got 401 and no token was sent"),
        ("gated", "hf_other", "org/gated is gated, got 403 with the token that was sent"),
        ("private", "", "got 401 and no token was sent; check the spelling"),
    ],
)
def test_a_closed_model_says_to_accept_the_licence_and_to_set_a_token(
    hub: SmallHub, client: Client, name: str, token: str, came: str
) -> None:
    hub.add(f"org/{name}", SMALL, token="hf_secret", is_gated=name == "gated")
    message = client.error(f"org/{name}", {"HF_TOKEN": token})
    assert came in message
    assert "set HF_TOKEN to a token" in message
    assert f"accept the licence on {hub.endpoint}/org/{name}" in message
    assert hub.file_names("GET") == []


@pytest.mark.parametrize("status", [HTTPStatus.NOT_FOUND, HTTPStatus.UNAUTHORIZED])
def test_an_unknown_id_is_neither_folder_nor_model(
    hub: SmallHub, client: Client, status: HTTPStatus
) -> None:
    hub.missing_status = status  # huggingface.co hides a missing model behind 401 without a token
    message = client.error("models/qwen2")
    assert f"{hub.endpoint}/models/qwen2" in message
    assert f"{status.value} and no token was sent" in message
    assert "folder" in message
    assert "check the spelling" in message
    assert "set HF_TOKEN" in message


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["config.json", "pytorch_model.bin"], "only pickle weights (pytorch_model.bin)"),
        (["config.json", "model.pt"], "expected model*.safetensors in org/name, got only pickle"),
        ([f"q{i}.gguf" for i in range(5)], "GGUF weights (q0.gguf, q1.gguf, q2.gguf and 2 more)"),
        (["onnx/model.safetensors"], "got onnx/model.safetensors"),
        (["model.safetensors"], "expected config.json in org/name, got model.safetensors"),
    ],
)
def test_a_model_without_safetensors_or_config_is_refused_before_any_file_is_fetched(
    hub: SmallHub, client: Client, files: list[str], told: str
) -> None:
    hub.add("org/name", dict.fromkeys(files, b"content"))
    message = client.error("org/name")
    assert told in message
    assert "with config.json and safetensors, or convert it" in message
    assert hub.file_names("GET") == []


def test_a_cut_connection_resumes_after_the_last_piece(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", LARGE)
    hub.cut(WEIGHTS, after_bytes=PIECE_BYTES + 4096)
    assert (client.folder("org/name") / WEIGHTS).read_bytes() == LARGE[WEIGHTS]
    assert hub.ranges(WEIGHTS) == [None, f"bytes={PIECE_BYTES}-"]


def test_the_next_call_goes_on_where_a_reset_ended_the_last(hub: SmallHub, client: Client) -> None:
    """huggingface_hub 2.4.0 deletes what came of a file: 5 GB of a shard began again."""
    hub.add("org/name", LARGE)
    hub.cut(WEIGHTS, after_bytes=PIECE_BYTES + 4096, reset=True)
    message = client.error("org/name")
    assert "run the same command again: what has come is kept" in message
    assert "got nothing or only a part" in client.error("org/name", OFFLINE)
    assert partials(client) == {sha256(LARGE[WEIGHTS]): PIECE_BYTES}
    hub.requests.clear()
    out, err = client.run("org/name", BARS_WITHOUT_A_TERMINAL)
    assert (Path(out) / WEIGHTS).read_bytes() == LARGE[WEIGHTS]
    assert hub.file_names("GET") == [WEIGHTS]
    assert hub.ranges(WEIGHTS) == [f"bytes={PIECE_BYTES}-"]
    assert f"21.0 MB, {PIECE_BYTES / 1e6:.1f} MB of them are here" in err
    assert partials(client) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_next_call_goes_on_where_a_signal_ended_the_last(
    hub: SmallHub, client: Client, number: signal.Signals
) -> None:
    """snapshot_download's threads would hold Ctrl-C back until their files are complete."""
    hub.add("org/name", LARGE)
    hub.stall(WEIGHTS, after_bytes=PIECE_BYTES + 4096)
    process = client.start("org/name", {}, "")
    while partials(client) != {sha256(LARGE[WEIGHTS]): PIECE_BYTES}:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=8)  # a read that is held back ends after 10
    assert process.returncode == -number
    assert (client.folder("org/name") / WEIGHTS).read_bytes() == LARGE[WEIGHTS]
    assert hub.ranges(WEIGHTS) == [None, f"bytes={PIECE_BYTES}-"]


def test_a_part_of_a_file_that_has_changed_since_is_thrown_away(
    hub: SmallHub, client: Client
) -> None:
    hub.add("org/name", LARGE)
    hub.cut(WEIGHTS, after_bytes=PIECE_BYTES + 4096, reset=True)
    client.error("org/name")
    hub.add("org/name", LARGE | {WEIGHTS: LARGE[WEIGHTS][::-1]})
    hub.requests.clear()
    assert (client.folder("org/name") / WEIGHTS).read_bytes() == LARGE[WEIGHTS][::-1]
    assert hub.ranges(WEIGHTS) == [None]
    assert partials(client) == {}


def test_a_part_that_another_process_is_fetching_is_left_to_it(
    hub: SmallHub, client: Client
) -> None:
    hub.add("org/name", LARGE)
    hub.stall(WEIGHTS, after_bytes=PIECE_BYTES + 4096)
    process = client.start("org/name", {}, "")
    while partials(client) != {sha256(LARGE[WEIGHTS]): PIECE_BYTES}:
        time.sleep(0.01)
    hub.add("org/name", SMALL, revision="v2")
    client.folder("org/name", revision="v2")
    assert partials(client) == {sha256(LARGE[WEIGHTS]): PIECE_BYTES}
    hub.released.set()
    out, _ = process.communicate(timeout=30)
    assert (Path(out.strip()) / WEIGHTS).read_bytes() == LARGE[WEIGHTS]


@pytest.mark.parametrize("size", [1_000, 3_000_000], ids=["a part", "too much"])
def test_a_part_with_other_bytes_does_not_count(hub: SmallHub, client: Client, size: int) -> None:
    """As after a power loss, or two writers where locks have no effect."""
    files = SMALL | {WEIGHTS: bytes(2_000_000)}
    hub.add("org/name", SMALL)
    blobs = client.folder("org/name").parents[1] / "blobs"
    hub.add("org/name", files)
    (blobs / f"{sha256(files[WEIGHTS])}.incomplete").write_bytes(b"x" * size)
    if size < len(files[WEIGHTS]):
        message = client.error("org/name")
        assert f"expected {WEIGHTS} of org/name with sha256 {sha256(files[WEIGHTS])}" in message
        assert "run the same command again" in message
    assert partials(client) == ({} if size < 2_000_000 else {sha256(files[WEIGHTS]): size})
    assert (client.folder("org/name") / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_server_without_ranges_sends_the_whole_file_again(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", LARGE)
    hub.cut(WEIGHTS, after_bytes=PIECE_BYTES + 4096, reset=True)
    client.error("org/name")
    hub.takes_ranges = False
    assert (client.folder("org/name") / WEIGHTS).read_bytes() == LARGE[WEIGHTS]


def test_a_mirror_with_names_of_its_own_is_left_to_the_library(
    hub: SmallHub, client: Client
) -> None:
    hub.add("org/name", SMALL)
    hub.etag_prefix = "mirror-"
    assert (client.folder("org/name") / WEIGHTS).read_bytes() == SMALL[WEIGHTS]
    assert hub.ranges(WEIGHTS) == [None]


def test_the_cache_is_laid_out_as_the_library_does(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    folder = client.folder("org/name")
    blob = folder.parents[1] / "blobs" / sha256(SMALL[WEIGHTS])
    assert (folder / WEIGHTS).is_symlink()
    assert (folder / WEIGHTS).resolve() == blob
    assert blob.stat().st_mode == (folder / "config.json").stat().st_mode


def test_without_links_the_snapshot_holds_the_file_itself(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", LARGE)
    hub.cut(WEIGHTS, after_bytes=PIECE_BYTES + 4096, reset=True)
    client.error("org/name", WITHOUT_LINKS)
    folder = client.folder("org/name", WITHOUT_LINKS)
    assert not (folder / WEIGHTS).is_symlink()
    assert (folder / WEIGHTS).read_bytes() == LARGE[WEIGHTS]
    assert hub.ranges(WEIGHTS) == [None, f"bytes={PIECE_BYTES}-"]
    assert not list(folder.parents[1].glob("blobs/*"))


@pytest.mark.parametrize("has_listing", [True, False], ids=["listing", "older cache"])
def test_offline_takes_a_full_cache_and_refuses_a_part(
    hub: SmallHub, client: Client, has_listing: bool
) -> None:
    hub.add("org/name", SMALL)
    folder = client.folder("org/name")
    if not has_listing:
        next(client.home.rglob("trees/*.json")).unlink()
    hub.requests.clear()
    assert client.run("org/name", OFFLINE) == (str(folder), "")
    (folder / "model.safetensors").unlink()
    assert "got nothing or only a part" in client.error("org/name", OFFLINE)
    assert hub.requests == []


def test_offline_with_an_empty_cache_says_so(hub: SmallHub, client: Client) -> None:
    message = client.error("org/name", OFFLINE)
    assert f"complete in {client.home / 'hub'} since HF_HUB_OFFLINE is set" in message
    assert "unset HF_HUB_OFFLINE" in message
    assert hub.requests == []


def test_a_hub_that_is_down_is_no_obstacle_to_a_full_cache(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    folder = client.folder("org/name")
    hub.stop()
    assert client.folder("org/name") == folder


@pytest.mark.parametrize(
    ("status", "came", "advice"),
    [
        (HTTPStatus.SERVICE_UNAVAILABLE, "HTTP status 503", "try again later"),
        (HTTPStatus.TOO_MANY_REQUESTS, "HTTP status 429", "wait a while, or set HF_TOKEN"),
        (HTTPStatus.OK, "no complete answer", "check the connection, the proxy and HF_ENDPOINT"),
        (None, "no complete answer", "check the connection, the proxy and HF_ENDPOINT"),
    ],
    ids=["down", "rate limit", "no hub", "no connection"],
)
def test_a_hub_that_does_not_answer_as_one_is_told(
    hub: SmallHub, client: Client, status: HTTPStatus | None, came: str, advice: str
) -> None:
    if status is None:
        hub.stop()
    hub.answer_always(status)
    message = client.error("org/name")
    assert f"expected org/name from {hub.endpoint}" in message
    assert f"got {came}" in message
    assert advice in message


def test_too_little_space_is_told_before_weights_come(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL | {"model.safetensors": bytes(3_000_000)})
    message = client.error("org/name", prelude=NEARLY_FULL)
    assert f"org/name needs 3.0 MB in {client.home / 'hub'}, got 0.0 MB of free space" in message
    assert "set HF_HOME to a larger disk" in message
    assert "model.safetensors" not in hub.file_names("GET")


def test_bytes_that_another_revision_brought_need_no_space(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    client.folder("org/name")
    hub.add("org/name", SMALL | {"README.md": b"new"})
    client.folder("org/name", prelude=NEARLY_FULL)


def test_what_is_there_of_a_file_needs_no_space_again(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", LARGE)
    hub.cut(WEIGHTS, after_bytes=PIECE_BYTES + 4096, reset=True)
    client.error("org/name")
    rest = NEARLY_FULL.replace("9", str(len(LARGE[WEIGHTS]) - PIECE_BYTES))
    out, _ = client.run("org/name", prelude=rest)
    assert (Path(out) / WEIGHTS).read_bytes() == LARGE[WEIGHTS]


def test_a_disk_that_fills_up_on_the_way_is_told(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    message = client.error("org/name", prelude=FULL)
    assert "No space left on device; free some space, or set HF_HOME to a larger disk" in message


def test_a_cache_that_cannot_be_written_is_told(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    client.home.touch()
    message = client.error("org/name")
    assert f"expected to store org/name in {client.home / 'hub'}" in message
    assert "set HF_HOME to another one" in message


def test_progress_counts_bytes_on_standard_error_only(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL | {"model.safetensors": bytes(2_500_000)})
    _, err = client.run("org/name", BARS_WITHOUT_A_TERMINAL)
    assert "fetching org/name (main, " in err
    assert "files, 2.5 MB" in err
    assert "model.safetensors: 100%" in err
    assert "2.50M/2.50M" in err


def test_no_progress_leaves_standard_error_empty(hub: SmallHub, client: Client) -> None:
    hub.add("org/name", SMALL)
    assert client.run("org/name", BARS_WITHOUT_A_TERMINAL, progress=False)[1] == ""


def test_a_local_folder_is_given_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("org/name", "./org/name", "~/org/name", str(folder), folder, Path("org/name")):
        assert resolve_source(source) == folder
    assert source_id("org/name") == "name"
    assert source_id(".") == tmp_path.name
    assert source_id("Qwen/Qwen2-0.5B-Instruct") == "Qwen/Qwen2-0.5B-Instruct"
    with pytest.raises(SourceError, match="leave the revision out"):
        resolve_source(folder, revision="main")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        *((path, "folder, got .* there is none; check the path$") for path in PATHS),
        *((text, "neither; a hub id is") for text in ("", "org/", "a b", "a--b", "-a", "名/x")),
        ("https://huggingface.co/Qwen/Qwen2-0.5B/tree/main", "give only its org/name"),
        ("file.gguf", r"got the file 'file\.gguf'; give a folder, for example /"),
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_told_without_a_request(
    source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.gguf").touch()
    with pytest.raises(SourceError, match=f"^expected a .*{told}"):
        resolve_source(source)


def test_the_hub_library_is_loaded_only_for_a_hub_id() -> None:
    program = (
        "import sys, qwen2x.exporters.hub as hub; hub.resolve_source('.'); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert b"huggingface_hub" not in loaded.stdout
