from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2x.cli.judging import read_text
from qwen2x.exporters.exporter import export
from qwen2x.runtimes.tokenizer import Tokenizer
from tests.cli.command import run_program
from tests.cli.conftest import Call
from tests.tiny_checkpoint import write_tiny_checkpoint

FEW = ("--tokens", "96", "--window", "48")
FIGURES = (
    "positions", "max_abs_diff", "mean_abs_diff", "cosine", "kl_mean", "kl_p99", "kl_max",
    "top1_agreement", "top10_overlap", "perplexity", "perplexity_reference", "bits_per_weight",
)  # fmt: skip
CHECKS = {
    "cache_equals_prefill", "chunked_equals_whole", "guesses_equal_prefill",
    "batch_equals_single", "long_positions", "greedy_text_equal",
}  # fmt: skip


@pytest.fixture
def bundle(float_bundle: Path, tmp_path: Path) -> Path:
    """The example's, to be written into."""
    return shutil.copytree(float_bundle, tmp_path / "bundle")


def test_validate_prints_the_contracts_object(call: Call, bundle: Path, example: Path) -> None:
    done = call("validate", bundle, "--against", example, *FEW, "--json")
    assert done.code == 0
    result = done.json
    assert result["verdict"] == "pass"
    for name in FIGURES:
        assert isinstance(result[name], (int, float)), name
    assert 90 <= result["positions"] <= 96
    assert result["all_finite"] is True
    assert {check["name"] for check in result["checks"]} >= CHECKS
    for check in result["checks"]:
        assert check["verdict"] == "pass"
        assert check.keys() >= {"name", "verdict", "value", "limit"}
    facts = {key: result[key] for key in ("backend", "device", "dtype", "scheme")}
    assert facts == {"backend": "onnx", "device": "cpu", "dtype": "float32", "scheme": "float"}
    assert result["bits_per_weight"] == 32
    assert result["tolerance"]["kl_mean"] > 0
    assert result["peak_memory_bytes"] > 10e6


def test_the_figures_are_recorded_and_shown(call: Call, bundle: Path, example: Path) -> None:
    assert "not validated yet" in call("inspect", bundle).out
    result = call("validate", bundle, "--against", example, *FEW, "--json").json
    quality = json.loads((bundle / "qwen2x.json").read_text())["quality"]
    assert quality["kl_mean"] == result["kl_mean"]
    assert quality["checks"] == result["checks"]
    assert call("inspect", bundle, "--json", "--verify").json["quality"] == quality
    shown = call("inspect", bundle).out
    assert f"pass, KL {result['kl_mean']:.3g}" in shown


def test_the_record_says_what_was_measured_and_how(call: Call, bundle: Path, example: Path) -> None:
    result = call("validate", bundle, "--against", example, *FEW, "--json").json
    quality = json.loads((bundle / "qwen2x.json").read_text())["quality"]
    ids = Tokenizer(example).encode(read_text(None))[:96]
    assert quality["text"] == result["text"] == {
        "name": "built-in",
        "tokens": 96,
        "window": 48,
        "sha256": hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest(),
    }  # fmt: skip
    facts = {key: quality[key] for key in ("backend", "device", "graph", "cache_dtype", "method")}
    assert facts == {
        "backend": "onnx", "device": "cpu", "graph": False, "cache_dtype": "float32",
        "method": "none",
    }  # fmt: skip
    assert quality["bytes"] == call("inspect", bundle, "--json").json["bytes"]
    assert quality["bits_per_weight"] == 32
    age = datetime.now(UTC) - datetime.fromisoformat(quality["date"])
    assert timedelta(0) <= age + timedelta(seconds=1) < timedelta(minutes=5)
    # A path would tell others about the machine.
    own = bundle.parent / "own.txt"
    own.write_text(read_text(None), encoding="utf-8")
    call("validate", bundle, "--against", example, *FEW, "--text", own)
    again = json.loads((bundle / "qwen2x.json").read_text())["quality"]["text"]
    assert again == quality["text"] | {"name": "own.txt"}


def test_the_model_card_shows_the_figures_and_keeps_what_its_owner_wrote(
    call: Call, bundle: Path, example: Path
) -> None:
    card = bundle / "README.md"
    assert "Not measured yet: `qwen2x validate . --against" in card.read_text()
    card.write_text("# Mine\n" + card.read_text() + "the end\n")
    result = call("validate", bundle, "--against", example, *FEW, "--json").json
    text = card.read_text()
    assert text.startswith("# Mine\n---\n")
    assert text.endswith("the end\n")
    assert f"| {result['kl_mean']:.3g} mean, {result['kl_p99']:.3g} 99th percentile" in text
    assert "| verdict | pass |" in text
    assert "Not measured yet" not in text
    assert call("inspect", bundle, "--verify").code == 0


def test_a_card_without_its_part_or_none_at_all_is_let_be(
    call: Call, bundle: Path, example: Path
) -> None:
    card = bundle / "README.md"
    for content in (b"caf\xe9, mine alone\r\n", None):
        card.unlink(missing_ok=True)
        if content is not None:
            card.write_bytes(content)
        assert call("validate", bundle, "--against", example, *FEW).code == 0
        assert (card.read_bytes() if card.exists() else None) == content


def test_what_export_estimated_stays_beside_what_is_measured(
    call: Call, bundle: Path, example: Path
) -> None:
    manifest = json.loads((bundle / "qwen2x.json").read_text())
    manifest["quality"] = {"estimate": {"kl_mean": 0.5, "top1_agreement": 0.25}}
    (bundle / "qwen2x.json").write_text(json.dumps(manifest))
    shown = call("inspect", bundle).out
    assert "estimated while exporting: KL 0.5" in shown
    result = call("validate", bundle, "--against", example, *FEW, "--json").json
    quality = json.loads((bundle / "qwen2x.json").read_text())["quality"]
    assert quality["estimate"] == manifest["quality"]["estimate"]
    assert quality["kl_mean"] == result["kl_mean"]
    assert "estimated while" not in call("inspect", bundle).out


def test_people_see_every_check(call: Call, int4_bundle: Path, example: Path) -> None:
    done = call("validate", int4_bundle, "--against", example, *FEW)
    assert done.code == 0
    for name in CHECKS:
        assert re.search(rf"pass\s+{name}: ", done.out)
        assert f"checking {name}" in done.err
    assert "perplexity" in done.out


def test_another_checkpoint_of_the_same_shape_fails_with_1(call: Call, tmp_path: Path) -> None:
    one = write_tiny_checkpoint(tmp_path / "one", seed=1)
    other = write_tiny_checkpoint(tmp_path / "other", seed=2)
    out = export(one, out=tmp_path / "bundle").bundle
    done = call("validate", out, "--against", other, *FEW, "--json")
    assert done.code == 1
    assert done.json["verdict"] == "fail"
    failed = {check["name"] for check in done.json["checks"] if check["verdict"] == "fail"}
    assert {"kl_mean", "source_is_the_same"} <= failed
    assert "is not the checkpoint that" in done.err
    # Whatever the bundle is compared with, it agrees with itself.
    assert not failed & {"cache_equals_prefill", "chunked_equals_whole", "batch_equals_single"}
    # Figures against another checkpoint are not the bundle's own.
    assert "not validated yet" in call("inspect", out).out
    assert call("validate", out, "--against", one, *FEW).code == 0


def test_the_exit_code_is_that_of_the_process(tmp_path: Path) -> None:
    one = write_tiny_checkpoint(tmp_path / "one", seed=1, num_hidden_layers=1)
    other = write_tiny_checkpoint(tmp_path / "other", seed=2, num_hidden_layers=1)
    out = export(one, out=tmp_path / "bundle", bits=8).bundle
    done = run_program("validate", out, "--against", other, *FEW)
    assert done.code == 1
    assert "fail" in done.out
    assert "Traceback" not in done.err


def test_a_text_of_ones_own_is_read(
    call: Call, bundle: Path, example: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Абрахам и Исаак. " * 30, encoding="utf-8")
    built_in = call("validate", bundle, "--against", example, *FEW, "--json").json
    own = call("validate", bundle, "--against", example, *FEW, "--text", text, "--json").json
    assert own["verdict"] == "pass"
    assert own["perplexity_reference"] != built_in["perplexity_reference"]


def test_html_is_one_page_that_needs_nothing_else(
    call: Call, bundle: Path, example: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    result = call("validate", bundle, "--against", example, *FEW, "--html", page, "--json").json
    text = page.read_text(encoding="utf-8")
    seen = Elements()
    seen.feed(text)
    assert {"svg", "rect", "table", "style"} <= seen.tags
    assert "Error of hidden states" in text, "a page has the layers without being asked for them"
    assert len(result["layers"]) == 7
    assert not seen.tags & {"script", "link", "img", "iframe"}
    assert seen.addresses == []
    assert "url(" not in text
    assert "http" not in text
    for figure in (f"{result['kl_mean']:.3g}", f"{result['perplexity']:.4f}"):
        assert figure in text
    for check in result["checks"]:
        assert check["name"] in text
    assert str(result["positions"]) in text


class Elements(HTMLParser):
    """The tags of a page, and the addresses in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "no-such.txt"], "no-such.txt cannot be read"),
        (["--text", "{tmp_path}"], "cannot be read"),
        (["--text", "{tmp_path}/latin1.txt"], "as UTF-8 text"),
        (["--text", "{tmp_path}/short.txt"], "expected at least 2"),
        (["--tokens", "1"], "got 1"),
        (["--window", "0"], "0"),
        (["--html", "{tmp_path}/no/page.html"], "mkdir"),
        (["--html", "{tmp_path}"], "cannot be written: it is a folder; name a file"),
        (["--html", "{bundle}/page.html"], "lies in a bundle"),
    ],
)
def test_what_does_not_fit_is_one_line(
    options: list[str], said: str, call: Call, bundle: Path, example: Path, tmp_path: Path
) -> None:
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "short.txt").write_text("a")
    chosen = [option.format(tmp_path=tmp_path, bundle=bundle) for option in options]
    assert said in call("validate", bundle, "--against", example, *FEW, *chosen).complaint


def test_what_is_no_bundle_or_no_checkpoint_is_one_line(
    call: Call, bundle: Path, example: Path, tmp_path: Path
) -> None:
    assert "no bundle" in call("validate", example, "--against", example).complaint
    other = write_tiny_checkpoint(tmp_path / "other", vocab_size=2304)
    assert "2304" in call("validate", bundle, "--against", other).complaint
    assert "Missing option '--against'" in call("validate", bundle).complaint


def test_a_bundle_that_cannot_be_written_to_is_still_judged(
    call: Call, bundle: Path, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2x.exporters import bundle as bundles

    def refuse(*_: Any) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(bundles, "write_manifest", refuse)
    done = call("validate", bundle, "--against", example, *FEW, "--json")
    assert done.json["verdict"] == "pass"
    assert "not recorded" in done.err
