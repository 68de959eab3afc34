from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen2x.exporters import bundle_cache
from qwen2x.exporters.bundle import open_bundle
from tests.cli.command import PROGRAM, environment, run_program
from tests.cli.conftest import Call
from tests.small_hub import SmallHub
from tests.tiny_checkpoint import write_tiny_checkpoint

GREEDY = ("--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "16")
PROMPT = "And it came to pass, that"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that ``run`` has exported to."""
    folders: list[Path] = []
    export = bundle_cache.export

    def counted(source: Any, *args: Any, out: Path, **options: Any) -> Any:
        folders.append(out)
        return export(source, *args, out=out, **options)

    monkeypatch.setattr(bundle_cache, "export", counted)
    return folders


def test_run_prints_the_contracts_object(call: Call, float_bundle: Path) -> None:
    done = call("run", float_bundle, PROMPT, "--raw", *GREEDY, "--json")
    result = done.json
    assert isinstance(result["text"], str)
    assert len(result["token_ids"]) == result["new_tokens"] == 16
    assert all(isinstance(token, int) for token in result["token_ids"])
    assert result["prompt_tokens"] > 3
    assert result["finish_reason"] == "length"
    assert (result["backend"], result["device"]) == ("onnx", "cpu")
    assert result["peak_memory_bytes"] > 10e6
    timings = result["timings"]
    names = ("load_s", "prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s")
    assert timings.keys() >= set(names)
    assert all(timings[name] > 0 for name in names)
    # 16 new tokens are 15 steps: the first comes with the prompt.
    assert timings["decode_tokens_per_s"] == pytest.approx(15 / timings["decode_s"])
    assert done.err == ""


def test_the_text_alone_is_on_standard_output(call: Call, float_bundle: Path) -> None:
    args = ("run", float_bundle, "Who was Abraham?", *GREEDY)
    plain, verbose, as_json = call(*args), call(*args, "-v"), call(*args, "--json")
    assert plain.out == verbose.out == as_json.json["text"] + "\n"
    assert plain.err == ""
    assert "16 new" in verbose.err


def test_text_comes_piece_by_piece(
    call: Call, float_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import click

    pieces: list[str] = []
    monkeypatch.setattr(click, "echo", lambda text="", **_: pieces.append(text))
    call("run", float_bundle, PROMPT, "--raw", *GREEDY)
    assert len([piece for piece in pieces if piece]) > 8


@pytest.mark.parametrize("dash", [[], ["-"]])
def test_the_prompt_may_come_from_standard_input(
    dash: list[str], call: Call, float_bundle: Path
) -> None:
    given = call("run", float_bundle, PROMPT, *GREEDY, "--json").json
    piped = call("run", float_bundle, *dash, *GREEDY, "--json", stdin=PROMPT.encode() + b"\n").json
    assert piped["token_ids"] == given["token_ids"]
    assert piped["prompt_tokens"] == given["prompt_tokens"]


def test_what_is_piped_goes_before_the_prompt(call: Call, float_bundle: Path) -> None:
    """It was ignored. The order is that of ollama and llm."""
    args = ("run", float_bundle, "--raw", *GREEDY, "--json")
    whole = call(*args, "-", stdin=b"In the beginning\n\nWho was Abraham?").json
    both = call(*args, "Who was Abraham?", stdin=b"In the beginning\n").json
    assert both["prompt_tokens"] == whole["prompt_tokens"]
    assert both["token_ids"] == whole["token_ids"]
    alone = call(*args, "Who was Abraham?").json
    assert call(*args, "Who was Abraham?", stdin=b" \n\n").json["token_ids"] == alone["token_ids"]


def prompt_tokens(bundle: Path, stdin: object) -> tuple[int, str]:
    """Of a process that got the prompt Who? and another standard input; and what it logged."""
    done = subprocess.run(
        [PROGRAM, "run", bundle, "Who?", "--raw", "--max-tokens", "1", "--json"],
        stdin=stdin, capture_output=True, env=environment(), timeout=60, check=True,
    )  # fmt: skip
    count: int = json.loads(done.stdout)["prompt_tokens"]
    return count, done.stderr.decode()


def test_a_file_on_standard_input_goes_before_the_prompt(
    float_bundle: Path, tmp_path: Path
) -> None:
    alone, _ = prompt_tokens(float_bundle, subprocess.DEVNULL)
    text = tmp_path / "text.txt"
    text.write_text("In the beginning\nwas the word.\n")
    with text.open() as file:
        assert prompt_tokens(float_bundle, file)[0] > alone
    # `while read line; do qwen2x run ... "$line"; done <text.txt` keeps its other lines.
    with text.open() as file:
        os.lseek(file.fileno(), 17, os.SEEK_SET)
        assert prompt_tokens(float_bundle, file) == (alone, "")
        assert file.read() == "was the word.\n"


def test_a_pipe_that_stays_silent_holds_nothing_up(float_bundle: Path) -> None:
    """As standard input is under ssh or in a CI job: waiting for its end would never end."""
    alone, _ = prompt_tokens(float_bundle, subprocess.DEVNULL)
    reader, writer = os.pipe()
    try:
        count, err = prompt_tokens(float_bundle, reader)
    finally:
        os.close(reader)
        os.close(writer)
    assert count == alone
    assert "nothing came through standard input in 1 s, so PROMPT goes alone" in err


def test_a_closed_standard_input_is_none(float_bundle: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[bytes]:
        command = f'"{PROGRAM}" run "{float_bundle}" --max-tokens 1 "$@" <&-'
        return subprocess.run(
            ["sh", "-c", command, "sh", *args], capture_output=True, env=environment(), check=False
        )

    assert run("Who?").returncode == 0
    closed = run()
    assert closed.returncode == 2
    assert b"standard input, which is closed" in closed.stderr


@pytest.mark.parametrize(
    ("args", "stdin", "said"),
    [
        ((" \n",), b"", "prompt is empty"),
        (("-",), b"", "prompt is empty"),
        ((), b"  \n\n", "prompt is empty"),
        (("-",), b"\xff\xfe", "not UTF-8"),
        (("x",), b"\xff\xfe", "not UTF-8"),
        (("a \udcff b",), b"", "not UTF-8"),
        (("x", "--temperature", "-1"), b"", "0..100, got -1"),
        (("x", "--temperature", "nan"), b"", "temperature"),
        (("x", "--top-p", "0"), b"", "top_p"),
        (("x", "--top-p", "1.5"), b"", "top_p"),
        (("x", "--top-k", "-3"), b"", "top_k"),
        (("x", "--min-p", "2"), b"", "min_p"),
        (("x", "--repetition-penalty", "0"), b"", "repetition_penalty"),
        (("x", "--seed", "-1"), b"", "seed"),
        (("x", "--max-tokens", "0"), b"", "--max-tokens"),
        (("x", "--threads", "0"), b"", "--threads"),
        (("x", "--stop", ""), b"", "stop"),
        (("x", "--raw", "--system", "y"), b"", "--system"),
        (("x", "--device", "tpu"), b"", "--device"),
        (("x", "--device", "cuda"), b"", "CUDA"),
        (("x", "--backend", "mlx"), b"", "the backend is mlx"),
        (("x", "--backend", "torch"), b"", "is a bundle"),
        (("x", "--bits", "8"), b"", "leave out --bits"),
        (("x", "--dtype", "float16", "--revision", "main"), b"", "--dtype and --revision"),
    ],
)
def test_what_does_not_fit_is_one_line(
    args: tuple[str, ...], stdin: bytes, said: str, call: Call, float_bundle: Path
) -> None:
    assert said in call("run", float_bundle, *args, stdin=stdin).complaint


def test_a_prompt_longer_than_the_context_is_one_line(call: Call, float_bundle: Path) -> None:
    said = call("run", float_bundle, "-", stdin=b"Abraham begat Isaac. " * 2000).complaint
    assert "the context 2048" in said
    assert "shorten" in said


def test_a_stop_string_ends_the_text_and_is_not_shown(call: Call, float_bundle: Path) -> None:
    whole = call("run", float_bundle, PROMPT, "--raw", *GREEDY, "--json").json
    word = whole["text"].split()[3]
    stop = ("--stop", "never said", "--stop", word)
    done = call("run", float_bundle, PROMPT, "--raw", *GREEDY, *stop, "--json").json
    assert done["text"] == whole["text"][: whole["text"].index(word)]
    assert done["finish_reason"] == "stop"
    assert done["new_tokens"] < whole["new_tokens"]


def test_system_and_raw_change_the_prompt(call: Call, float_bundle: Path) -> None:
    def prompt_tokens(*options: str) -> int:
        done = call("run", float_bundle, "Who?", *GREEDY, "--json", *options).json
        count: int = done["prompt_tokens"]
        return count

    assert prompt_tokens("--raw") < prompt_tokens() < prompt_tokens("--system", "Be brief. " * 9)


def test_a_seed_makes_sampling_repeatable(call: Call, float_bundle: Path) -> None:
    args = ("run", float_bundle, PROMPT, "--raw", "--temperature", "1", "--max-tokens", "24")
    texts = [call(*args, "--seed", seed).out for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_torch_and_onnx_write_the_same(call: Call, example: Path, float_bundle: Path) -> None:
    ours = call("run", float_bundle, PROMPT, "--raw", *GREEDY, "--json").json
    judge = call("run", example, PROMPT, "--raw", *GREEDY, "--backend", "torch", "--json").json
    assert judge["token_ids"] == ours["token_ids"]
    assert judge["text"] == ours["text"]
    assert (judge["backend"], judge["device"]) == ("torch", "cpu")
    refused = call("run", example, PROMPT, "--backend", "torch", "--bits", "4")
    assert "leave out --bits" in refused.complaint


def test_torch_refuses_what_is_no_qwen2(call: Call, checkpoint: Path) -> None:
    """transformers would load it, with what is missing made up."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "llama" in call("run", checkpoint, "x", "--backend", "torch").complaint


def test_a_checkpoint_is_exported_once(call: Call, example: Path, exports: list[Path]) -> None:
    args = ("run", example, PROMPT, "--raw", *GREEDY, "--json")
    first, second = call(*args), call(*args)
    assert first.json["token_ids"] == second.json["token_ids"]
    assert len(exports) == 1
    assert Path(os.environ["QWEN2X_CACHE"]) in exports[0].parents
    assert str(exports[0]) in second.err
    open_bundle(exports[0], verify=True)


def test_a_changed_option_or_checkpoint_makes_another_bundle(
    call: Call, checkpoint: Path, exports: list[Path]
) -> None:
    args = ("run", checkpoint, PROMPT, "--raw", "--max-tokens", "2", "--json")
    call(*args)
    call(*args, "--bits", "4")
    call(*args, "--bits", "4", "--group-size", "64")
    call(*args, "--bits", "8")
    assert len(set(exports)) == 4
    write_tiny_checkpoint(checkpoint, seed=1)
    call(*args)
    assert len(set(exports)) == 5
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    call(*args)
    assert len(set(exports)) == 6
    call(*args)
    assert len(exports) == 6


def test_a_changed_chat_template_is_used(call: Call, checkpoint: Path, exports: list[Path]) -> None:
    args = ("run", checkpoint, "Hello", "--max-tokens", "2", "--json")
    before = call(*args).json["prompt_tokens"]
    template = "{{ messages[0].content }} {{ messages[0].content }} and so on and on"
    (checkpoint / "chat_template.jinja").write_text(template * 9)
    assert call(*args).json["prompt_tokens"] != before


def test_a_copy_of_a_checkpoint_answers_alike(
    call: Call, example: Path, tmp_path: Path, exports: list[Path]
) -> None:
    copy = shutil.copytree(example, tmp_path / "copy")
    args = (PROMPT, "--raw", *GREEDY, "--json")
    one, other = call("run", example, *args).json, call("run", copy, *args).json
    assert one["token_ids"] == other["token_ids"]


def test_run_takes_a_hub_id(example: Path, tmp_path: Path) -> None:
    with SmallHub() as hub:
        hub.add("org/tiny", example)
        done = run_program(
            "run", "org/tiny", PROMPT, "--raw", *GREEDY, "--json", HF_ENDPOINT=hub.endpoint,
            HF_HOME=str(tmp_path / "home"), QWEN2X_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
    assert done.json["new_tokens"] == 16
    assert list((tmp_path / "cache" / "bundles").glob("org--tiny-*"))


def test_a_model_that_is_nowhere_is_one_line(call: Call) -> None:
    assert "./nowhere" in call("run", "./nowhere", "x").complaint
