"""``export --method gptq``: what it gains, what it says, and what it refuses in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from qwen2x.exporters import bundle_writer
from qwen2x.exporters.bundle import open_bundle
from tests.cli.command import run_program
from tests.cli.conftest import Call
from tests.exporters.refusal import listing
from tests.tiny_checkpoint import EXAMPLE

SAMPLE = EXAMPLE.parent / "sample.txt"
# At the size of plain rounding.
GPTQ = ("--bits", "4", "--group-size", "32", "--method", "gptq")
# KL divergence to the original over plain rounding's. The built-in texts, on validation's own
# text: measured 0.64.
GAIN = 0.8
# The least text that is taken, on what follows it: so little must not make things worse. Measured
# 0.95 to 1.01, as its 2,048 tokens say little of 384 columns.
LEAST_TEXT = 1.1


def kl_of(call: Call, bundle: Path, *options: object) -> float:
    done = call("validate", bundle, "--against", EXAMPLE, "--threads", 1, *options, "--json")
    return float(done.json["kl_mean"])


# Gain


def test_the_built_in_texts_bring_a_bundle_closer_to_the_original(
    call: Call, int4_bundle: Path, tmp_path: Path
) -> None:
    done = call("export", EXAMPLE, *GPTQ, "-o", tmp_path / "bundle")
    assert done.code == 0
    assert done.err.startswith("6 layers to be rounded\nrounded layer 1 of 6, 0.")
    assert kl_of(call, tmp_path / "bundle") < GAIN * kl_of(call, int4_bundle)


def test_the_least_text_of_ones_own_does_no_harm_to_what_follows_it(
    call: Call, int4_bundle: Path, tmp_path: Path
) -> None:
    lines = SAMPLE.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "text.txt").write_text("".join(lines[:58]), encoding="utf-8")
    (tmp_path / "held-out.txt").write_text("".join(lines[58:]), encoding="utf-8")
    out = tmp_path / "bundle"
    done = call(
        "export", EXAMPLE, *GPTQ, "--calibration", tmp_path / "text.txt", "-o", out, "--json"
    )
    assert done.err == ""
    assert open_bundle(out).manifest["calibration"]["tokens"] == 2048
    held_out = ("--text", tmp_path / "held-out.txt", "--tokens", 640)
    ours, plain = (kl_of(call, bundle, *held_out) for bundle in (out, int4_bundle))
    assert ours < LEAST_TEXT * plain


# Says


def test_an_export_that_goes_on_says_how_many_layers_are_done(
    call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("export", checkpoint, *GPTQ, "--calibration", SAMPLE, "-o", tmp_path / "bundle")

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundle_writer, "write_manifest", stop)
        stopped = call(*command)
    assert stopped.code == 130
    assert stopped.err.endswith("rounded layer 2 of 2, 0.0 minutes left\n\ninterrupted\n")
    done = call(*command)
    assert done.err == "2 layers to be rounded, 2 are already\n"


def test_a_dry_run_counts_the_memory_of_calibration(call: Call) -> None:
    plain, gptq = (
        call(
            "export",
            EXAMPLE,
            "--bits",
            4,
            "--group-size",
            32,
            "--method",
            method,
            "--dry-run",
            "--json",
        ).json
        for method in ("rtn", "gptq")
    )
    assert gptq["peak_memory_bytes"] > 1.5 * plain["peak_memory_bytes"]
    assert gptq["bytes"] == plain["bytes"]


# Refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "gptq"], "--method needs --bits 4 or --bits 8"),
        (["--calibration", "x"], "--calibration needs --bits 4 or --bits 8"),
        (["--bits", "8", "--calibration", "x"], "--calibration is for --bits 4, --method gptq, "),
        (
            ["--bits", "4", "--method", "rtn", "--calibration", "x"],
            "--calibration is for --bits 4, --method gptq, budgets and --kv-bits",
        ),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    options: list[str], said: str, call: Call, tmp_path: Path
) -> None:
    assert said in call("export", EXAMPLE, *options, "-o", tmp_path / "bundle").complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the calibration text has 0 tokens, expected 2048 or more; add to it"),
        (b"In the beginning.\n", " tokens, expected 2048 or more; add to it, or use --method "),
        (b"\xff\xfe" * 9000, "text.txt cannot be read as UTF-8 text: 'utf-8' codec can't decode"),
        (None, "text.txt cannot be read as UTF-8 text: [Errno 2] No such file"),
        ("folder", "text.txt cannot be read as UTF-8 text: "),
    ],
    ids=["empty", "short", "bytes", "missing", "folder"],
)
def test_a_text_that_is_none_is_one_line(
    content: bytes | str | None, said: str, call: Call, tmp_path: Path
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "new" / "bundle"
    if isinstance(content, bytes):
        text.write_bytes(content)
    elif content is not None:
        text.mkdir()
    done = call("export", EXAMPLE, *GPTQ, "--calibration", text, "-o", out)
    assert said in done.complaint
    assert not out.parent.exists()


def without_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def with_an_unknown_tokenizer(source: Path) -> None:
    path = source / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"BPE"', '"XYZ"'), encoding="utf-8")


def multiplied(name: str, factor: float) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        tensors[name] = (tensors[name].astype(np.float32) * np.float32(factor)).astype(bfloat16)
        save_file(tensors, source / "model.safetensors")

    return change


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_tokenizer, "has no tokenizer.json, which --method gptq and --kv-bits need"),
        (with_an_unknown_tokenizer, "fetch it again"),
        (multiplied(LAST, np.nan), f"{LAST} holds NaN or infinity"),
        (multiplied(LAST, 1e30), "weights must be finite and within 2**48"),
        (
            multiplied("model.layers.1.input_layernorm.weight", 1e30),
            "calibration met activations that are not finite; use --method rtn, or another text",
        ),
    ],
    ids=["no tokenizer", "tokenizer", "nan", "large", "overflow"],
)
def test_a_checkpoint_that_cannot_be_calibrated_is_one_line(
    change: Callable[[Path], None], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    change(checkpoint)
    before, out = listing(checkpoint), tmp_path / "new" / "bundle"
    done = run_program("export", checkpoint, *GPTQ, "--calibration", SAMPLE, "-o", out)
    assert said in done.complaint
    *logs, _ = done.err.splitlines()
    assert all("layer" in log and "rounded" in log for log in logs), done.err
    assert not out.parent.exists()
    assert listing(checkpoint) == before
