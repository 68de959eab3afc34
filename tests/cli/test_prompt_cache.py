"""``--prompt-cache`` and ``--dry-run``: two runs about one document, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from qwen2x.exporters.exporter import export
from qwen2x.runtimes import onnx_memory
from tests.cli.command import PROGRAM, environment
from tests.cli.conftest import Call
from tests.tiny_checkpoint import EXAMPLE

GREEDY = ("--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "8")
DOCUMENT = (EXAMPLE.parent / "sample.txt").read_text("utf-8")[:3000]


@pytest.fixture(scope="module")
def mlx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mlx") / "bundle"
    return export(EXAMPLE, target="mlx", dtype="float32", out=out).bundle


@pytest.mark.parametrize("options", [("onnx",), ("mlx",), ("mlx", "--kv-bits", "8")])
def test_the_second_question_reads_only_itself(
    call: Call, float_bundle: Path, mlx_bundle: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    target, *more = options
    bundle, kept = {"onnx": float_bundle, "mlx": mlx_bundle}[target], tmp_path / "document.cache"
    arguments = [*GREEDY, *more, "--raw"]
    first = call(
        "run", bundle, f"{DOCUMENT}\nWho?", *arguments, "--prompt-cache", kept, "-v", "--json"
    )
    assert first.json["cached_tokens"] == 0
    assert f"wrote {kept}" in first.err
    before = kept.read_bytes()
    question = f"{DOCUMENT}\nWhere was it?"
    second = call("run", bundle, question, *arguments, "--prompt-cache", kept, "--json").json
    plain = call("run", bundle, question, *arguments, "--json").json
    assert plain["cached_tokens"] == 0
    assert second["token_ids"] == plain["token_ids"]
    assert second["cached_tokens"] > 0.9 * second["prompt_tokens"]
    assert kept.read_bytes() == before
    assert [entry.name for entry in tmp_path.glob("document*")] == [kept.name]


def test_chat_writes_it_and_reads_it(call: Call, float_bundle: Path, tmp_path: Path) -> None:
    kept = tmp_path / "document.cache"
    lines = f'"""{DOCUMENT}\nWho?"""\nAnd where?\n'.encode()
    first = call("chat", float_bundle, *GREEDY, "-v", "--prompt-cache", kept, stdin=lines)
    assert first.code == 0
    assert first.err.count(f"wrote {kept}") == 1
    assert "(0 cached)" in first.err
    before = kept.read_bytes()
    again = call("chat", float_bundle, *GREEDY, "-v", "--prompt-cache", kept, stdin=lines)
    assert again.out == first.out
    assert "(0 cached)" not in again.err
    assert "wrote" not in again.err
    assert kept.read_bytes() == before


def test_what_was_forgotten_comes_back_from_the_file(
    call: Call, float_bundle: Path, tmp_path: Path
) -> None:
    ask = f'"""{DOCUMENT}\nWho?"""\n'
    kept = tmp_path / "document.cache"
    lines = f"{ask}/system Be brief.\nWho?\n/system\n{ask}".encode()
    done = call("chat", float_bundle, *GREEDY, "-v", "--prompt-cache", kept, stdin=lines)
    cached = [int(count) for count in re.findall(r"\((\d+) cached\)", done.err)]
    assert cached[0] == 0
    assert cached[1] < 20
    assert cached[2] > 500


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_file_of_another_bundle_is_refused(
    call: Call, float_bundle: Path, int4_bundle: Path, tmp_path: Path, command: str
) -> None:
    kept = tmp_path / "document.cache"
    call("run", float_bundle, DOCUMENT, *GREEDY, "--prompt-cache", kept)
    before = kept.read_bytes()
    words = [command, int4_bundle, *(["Who?"] if command == "run" else []), "--prompt-cache", kept]
    assert "is the prompt cache of something else: bundle " in call(*words).complaint
    kept.write_bytes(before[:1000])
    words[1] = float_bundle
    assert "is no whole prompt cache (" in call(*words).complaint
    assert kept.read_bytes() == before[:1000]


def test_no_room_on_the_disk_is_one_line(
    call: Call, float_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
    words = ("run", float_bundle, "Who?", *GREEDY, "--prompt-cache", tmp_path / "new")
    assert "are free in" in call(*words).complaint
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(
    call: Call, float_bundle: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    try:
        words = ("run", float_bundle, "Who?", *GREEDY, "--prompt-cache", tmp_path / "new")
        assert "cannot be written to" in call(*words).complaint
    finally:
        tmp_path.chmod(0o700)


def test_torch_and_graphs_have_none(call: Call, example: Path, tmp_path: Path) -> None:
    words = ("run", example, "Who?", *GREEDY, "--prompt-cache", tmp_path / "new")
    assert "leave out --prompt-cache" in call(*words, "--backend", "torch").complaint


def test_a_dry_run_tells_of_tokens_and_memory(call: Call, float_bundle: Path) -> None:
    words = ("run", float_bundle, DOCUMENT, "--raw", "--dry-run")
    facts = call(*words, "--max-tokens", 100, "--json").json
    each = 2 * 6 * 2 * 32 * 4
    assert facts["dry_run"] is True
    assert facts["max_new_tokens"] == 100
    assert facts["cache_bytes_per_token"] == each
    assert facts["cache_bytes"] == each * (facts["prompt_tokens"] + 100)
    assert facts["peak_memory_bytes"] > facts["cache_bytes"] + facts["weight_bytes"]
    assert facts["fitting_tokens"] == facts["max_context"] == 2048
    assert facts["chunk_tokens"] == [256, 256]
    text = call(*words).out
    for part in ("prompt ", "pieces of 256 tokens", "KV cache ", " for 2048 tokens, 3.07 kB each"):
        assert part in text


def test_a_dry_run_says_how_pieces_shrink(call: Call, mlx_bundle: Path) -> None:
    words = ("run", mlx_bundle, DOCUMENT, "--raw", "--dry-run", "--device", "cpu")
    eight = call(*words, "--kv-bits", "8", "--json").json
    assert eight["cache_bytes_per_token"] < call(*words, "--json").json["cache_bytes_per_token"]
    start, end = call(*words, "--prefill-memory", 5, "--json").json["chunk_tokens"]
    assert end < start
    assert f"pieces of {start} tokens, {end} at its end" in call(*words, "--prefill-memory", 5).out


def test_a_dry_run_refuses_what_does_not_fit(
    call: Call, float_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_memory, "free_host_bytes", lambda: 300_000_000)
    weights = json.loads((float_bundle / "qwen2x.json").read_text())["weight_bytes"]
    assert weights < 50e6
    assert call("run", float_bundle, "Who?", "--dry-run").code == 0
    monkeypatch.setattr(onnx_memory, "free_host_bytes", lambda: 200_500_000 + weights)
    complaint = call("run", float_bundle, "Who?", "--dry-run", "--max-tokens", 2000).complaint
    assert "a KV cache for 20" in complaint
    assert "positions; shorten the prompt, ask for fewer tokens (--max-tokens)" in complaint


def test_a_dry_run_refuses_what_the_context_has_no_room_for(
    call: Call, float_bundle: Path, example: Path
) -> None:
    long = call("run", float_bundle, DOCUMENT * 5, "--raw", "--dry-run").complaint
    assert "tokens, the context 2048, with at least one for the answer" in long
    torch = call("run", example, "Who?", "--dry-run", "--backend", "torch").complaint
    assert "not of --backend torch or --graph" in torch


def test_verbose_output_tells_how_far_a_long_prompt_is(
    call: Call, float_bundle: Path, mlx_bundle: Path
) -> None:
    for bundle, piece in ((float_bundle, 256), (mlx_bundle, 512)):
        words = ("run", bundle, DOCUMENT * 2, "--raw", *GREEDY)
        told = [line for line in call(*words, "-v").err.splitlines() if line.startswith("read ")]
        assert told[0].startswith(f"read {piece} of ")
        assert told[-1].endswith(" 0 s left")
        assert call(*words).err == ""
        assert "read " not in call(*words, "-v", "--json").err


def test_a_terminal_shows_one_line_that_goes(float_bundle: Path, tmp_path: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    (tmp_path / "prompt").write_text(DOCUMENT * 2, encoding="utf-8")
    line = f"{PROGRAM} run {float_bundle} - --raw {' '.join(GREEDY)} <{tmp_path}/prompt"
    child = pexpect.spawn(shutil.which("sh"), ["-c", f"{line} >{tmp_path}/out"], env=environment())
    shown = child.read().decode()
    child.close()
    assert child.exitstatus == 0
    assert "\rread 512 of " in shown
    assert shown.endswith("\r\x1b[K")
    assert "\n" not in shown
    assert "read 512" not in (tmp_path / "out").read_text("utf-8")


def test_inspect_shows_the_cache_of_the_whole_context(
    call: Call, float_bundle: Path, example: Path
) -> None:
    facts = call("inspect", float_bundle, "--json").json
    assert facts["cache_bytes_full_context"] == 2048 * facts["cache_bytes_per_token"]
    for path in (float_bundle, example):
        assert "3.07 kB per token, 6.29 MB for the whole context" in call("inspect", path).out
