"""``--yarn``, ``--original-context`` and ``validate --long``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2x.exporters.exporter import export
from tests.cli.conftest import Call
from tests.tiny_checkpoint import write_tiny_checkpoint

GREEDY = ("--temperature", "0", "--repetition-penalty", "1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never ends a text: random weights."""
    folder = tmp_path_factory.mktemp("yarn") / "source"
    return write_tiny_checkpoint(folder, dtype="float32", max_position_embeddings=128)


@pytest.fixture(scope="module")
def bundle(source: Path) -> Path:
    return export(source, out=source.parent / "bundle", yarn=(1.0, 2.0, 4.0)).bundle


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The known trap: nothing says what was stretched."""
    scaling = {"type": "yarn", "factor": 4.0}
    return write_tiny_checkpoint(
        tmp_path / "trap", dtype="float32", max_position_embeddings=131072, rope_scaling=scaling
    )


def test_run_takes_the_smallest_factor_and_says_which(call: Call, bundle: Path) -> None:
    def ran(*options: str) -> tuple[float, int]:
        done = call("run", bundle, "Who?", "--raw", *GREEDY, "--json", *options).json
        return done["rope_factor"], done["prefilled_again"]

    assert ran("--max-tokens", "3") == (1, 0)
    assert ran("--max-tokens", "3", "--yarn", "4") == (4, 0)
    assert ran("--max-tokens", "200") == (2, 0)
    verbose = call("run", bundle, "Who?", *GREEDY, "--max-tokens", "3", "-v", "--yarn", "2")
    assert "YaRN factor 2" in verbose.err


def test_bench_says_which_factor_it_measured(call: Call, bundle: Path) -> None:
    args = ("bench", bundle, "--new-tokens", "4", "--repeat", "1", "--json")
    assert call(*args, "--prompt-tokens", "20").json["rope_factor"] == 1
    assert call(*args, "--prompt-tokens", "200").json["rope_factor"] == 2
    assert call(*args, "--prompt-tokens", "20", "--yarn", "4").json["rope_factor"] == 4


def test_a_chat_that_outgrows_its_factor_goes_on_with_the_next(call: Call, bundle: Path) -> None:
    lines = "".join(f"{index}: Abraham begat Isaac, and Isaac begat Jacob.\n" for index in range(6))
    done = call("chat", bundle, "-v", *GREEDY, "--max-tokens", "8", stdin=lines.encode())
    assert done.code == 0
    said = [line.split("YaRN factor ")[1] for line in done.err.splitlines() if "YaRN" in line]
    factors = [float(text.split()[0]) for text in said]
    assert factors == sorted(factors)
    assert factors[0] == 1
    assert factors[-1] > 1
    again = [text for text in said if "tokens read again" in text]
    assert len(again) == len(set(factors)) - 1


def test_a_chat_with_a_forced_factor_keeps_to_it(call: Call, bundle: Path) -> None:
    lines = "".join(f"{index}: Abraham begat Isaac, and Isaac begat Jacob.\n" for index in range(6))
    done = call(
        "chat", bundle, "-v", *GREEDY, "--max-tokens", "8", "--yarn", "1", stdin=lines.encode()
    )
    assert "the context of 128 tokens is full" in done.err
    assert "YaRN factor 2" not in done.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--yarn", "8"), "factor 8 is not there, expected one of 1, 2, 4"),
        (("--yarn", "0"), "--yarn must be auto or a factor of 1 or more, got '0'"),
        (("--yarn", "nan"), "got 'nan'"),
        (("--yarn", "inf"), "got 'inf'"),
        (("--yarn", "four"), "got 'four'"),
        (("--yarn", "1,2"), "got '1,2'"),
        (("--max-tokens", "600"), "export with --yarn 1,2,4,8"),
        (("--max-tokens", "300", "--yarn", "2"), "the context 256 with YaRN factor 2"),
    ],
)
def test_what_run_cannot_do_is_one_line(
    args: tuple[str, ...], said: str, call: Call, bundle: Path
) -> None:
    assert said in call("run", bundle, "x", *args).complaint


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--yarn", "1,x"), "--yarn must be factors with commas between, such as 1,2,4"),
        (("--yarn", ""), "such as 1,2,4; got ''"),
        (("--yarn", "0,1"), "YaRN factors must rise within 1..256"),
        (("--yarn", "2,4"), "expected 1,2,4"),
        (("--yarn", "1,2", "--max-context", "300"), "--max-context must be in 1..256"),
        (("--original-context", "0"), "--original-context"),
        (("--original-context", "500"), "must be in 1..128"),
    ],
)
def test_what_export_cannot_do_is_one_line(
    args: tuple[str, ...], said: str, call: Call, source: Path, tmp_path: Path
) -> None:
    assert said in call("export", source, "-o", tmp_path / "out", *args).complaint
    assert not list(tmp_path.iterdir())


def test_factors_may_come_in_any_order_and_are_shown_before(call: Call, source: Path) -> None:
    done = call("export", source, "--yarn", "4,1", "--dry-run", "--json").json
    assert (done["yarn"], done["max_context"]) == ([1, 4], 512)
    assert "YaRN factor 1, 4" in call("export", source, "--yarn", "4,1", "--dry-run").out
    assert "YaRN" not in call("export", source, "--dry-run").out


def test_the_known_trap_is_refused_with_the_line_to_add(
    call: Call, trap: Path, tmp_path: Path
) -> None:
    for args in (("export", trap, "-o", tmp_path / "out"), ("run", trap, "x"), ("inspect", trap)):
        said = call(*args).complaint
        assert 'add "original_max_position_embeddings": 32768' in said
        assert "--original-context 32768" in said


def test_a_length_that_was_told_holds_for_the_judge_too(
    call: Call, trap: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = call("export", trap, "-o", out, "--original-context", "32768", "--json")
    assert done.code == 0, done.err
    judged = call(
        "validate", out, "--against", trap, "--tokens", "40", "--window", "40", "--long", "--json"
    ).json
    assert judged["verdict"] == "pass"
    assert {place["position"] for place in judged["long"]} >= {32767, 32768, 131071}
    shown = call("compare", out, "--against", trap, "--tokens", "40", "--window", "40", "--json")
    assert shown.json["bundles"][0]["kl_mean"] < 1e-9


def test_validate_long_adds_its_checks_and_records_them(
    call: Call, source: Path, bundle: Path
) -> None:
    args = ("validate", bundle, "--against", source, "--tokens", "60", "--window", "60")
    plain = call(*args, "--json").json
    assert plain["verdict"] == "pass"
    assert plain["rope_factor"] == 1
    assert not [check for check in plain["checks"] if check["name"].startswith("long_factor")]
    done = call(*args, "--long", "--json").json
    assert done["verdict"] == "pass"
    names = {check["name"] for check in done["checks"]}
    assert names >= {"long_factor_1", "long_factor_4_chunked", "first_factor_equals_plain"}
    assert all(place["max_abs_diff"] < 2e-3 for place in done["long"])
    manifest = json.loads((bundle / "qwen2x.json").read_text("utf-8"))
    assert manifest["quality"]["long"] == done["long"]
    assert "long_factor_2" in call(*args, "--long").out


def test_bundles_without_a_factor_in_common_are_refused(
    call: Call, source: Path, tmp_path: Path
) -> None:
    two, four = (
        export(source, out=tmp_path / str(factor), yarn=(factor,)).bundle for factor in (2.0, 4.0)
    )
    said = call("validate", two, "--against", four, "--tokens", "9").complaint
    assert "no YaRN factor in common" in said
    alone = call(
        "validate", two, "--against", source, "--tokens", "60", "--window", "60", "--json"
    ).json
    assert (alone["verdict"], alone["rope_factor"]) == ("pass", 2)
