"""A KV cache in a file: the same answer with it as without, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qwen2x.exporters.bundle import open_bundle
from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes import cache_file
from qwen2x.runtimes.cache_file import read_cache_file, write_cache_file
from qwen2x.runtimes.generate import Generation, generate
from qwen2x.runtimes.prompt_cache import PromptCache, SavesCache
from qwen2x.runtimes.runtime import Runtime, open_runtime
from qwen2x.runtimes.sampler import Sampling
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import EXAMPLE

SAMPLE = EXAMPLE.parent / "sample.txt"
DOCUMENT = np.random.default_rng(0).integers(0, 2000, 200).tolist()
ONE, OTHER = [*DOCUMENT, 5, 6, 7], [*DOCUMENT, 8, 9]
# What is read in other pieces is summed in another order: float32 and, with codes, bfloat16.
ROUNDING, ROUNDING_16 = 1e-4, 0.25


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A bundle and how it is opened.

    Attributes:
        export: options of ``export``.
        kv_bits: of ``open_runtime``.
        dtype: of the cache.
        rounding: largest difference of logits.
    """

    export: dict[str, Any]
    kv_bits: int | None = None
    dtype: str = "float32"
    rounding: float = ROUNDING


KINDS = {
    "onnx": Kind(export={}),
    "onnx-int8": Kind(export={"kv_bits": 8, "calibration": str(SAMPLE)}, dtype="int8"),
    "mlx": Kind(export={"target": "mlx", "dtype": "float32"}),
    "mlx-bfloat16": Kind(
        export={"target": "mlx", "dtype": "bfloat16"}, dtype="bfloat16", rounding=ROUNDING_16
    ),
    "mlx-int8": Kind(export={"target": "mlx", "dtype": "float32"}, kv_bits=8, dtype="int8"),
}
Open = Callable[[], Runtime]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def opened(make_bundle: MakeBundle, random_checkpoint: Path, kind: Kind) -> Open:
    bundle = make_bundle(random_checkpoint, **kind.export)
    return lambda: open_runtime(bundle, kv_bits=kind.kv_bits)


@pytest.fixture
def onnx(make_bundle: MakeBundle, random_checkpoint: Path) -> Open:
    bundle = make_bundle(random_checkpoint)
    return lambda: open_runtime(bundle, threads=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.cache"


@pytest.fixture
def written(onnx: Open, path: Path) -> Path:
    """The file of one question to the float bundle."""
    with onnx() as runtime:
        ask(runtime, ONE, PromptCache(path))
    return path


def ask(runtime: Runtime, prompt_ids: list[int], kept: PromptCache | None = None) -> Generation:
    greedy = Sampling(temperature=0)
    answer = generate(
        runtime, prompt_ids, max_tokens=12, sampling=greedy, ignore_eos=True, prompt_cache=kept
    ).run()
    if kept is not None:
        kept.save(runtime, prompt_ids)
    return answer


def test_the_second_question_is_answered_as_without_the_file(
    opened: Open, kind: Kind, path: Path
) -> None:
    with opened() as runtime:
        assert ask(runtime, ONE, PromptCache(path)).cached_tokens == 0
    before = path.read_bytes()
    with opened() as runtime:
        answer = ask(runtime, OTHER, PromptCache(path))
    with opened() as runtime:
        expected = ask(runtime, OTHER)
    assert answer.cached_tokens == len(DOCUMENT)
    assert answer.token_ids == expected.token_ids
    # It has all of the document: another question about it leaves it as it is.
    assert path.read_bytes() == before


def test_logits_behind_a_loaded_cache_are_within_rounding(
    opened: Open, kind: Kind, path: Path
) -> None:
    with opened() as runtime:
        ask(runtime, ONE, PromptCache(path))
    with opened() as runtime:
        PromptCache(path).load(runtime, OTHER, len(OTHER))
        loaded = runtime.append(OTHER[len(DOCUMENT) :])
        runtime.reset()
        whole = runtime.append(OTHER)
    assert np.abs(loaded - whole).max() <= kind.rounding


def test_what_comes_back_is_what_went_out(opened: Open, kind: Kind, path: Path) -> None:
    with opened() as runtime:
        assert isinstance(runtime, SavesCache)
        runtime.append(DOCUMENT)
        went = {name: values.copy() for name, values in runtime.export_cache(150).items()}
        assert all(values.shape[1] == 150 for values in went.values())
        runtime.import_cache(DOCUMENT[:150], went)
        assert runtime.cached_ids == DOCUMENT[:150]
        back = runtime.export_cache(150)
        assert went.keys() == back.keys()
        assert all((went[name] == back[name]).all() for name in went)
        assert sum(values.nbytes for values in went.values()) == 150 * runtime.needs.per_position


def test_the_file_is_one_that_safetensors_opens(opened: Open, kind: Kind, path: Path) -> None:
    with opened() as runtime:
        ask(runtime, ONE, PromptCache(path))
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        names = set(file.keys())
        assert file.get_tensor("token_ids").tolist() == ONE
    assert metadata["cache_dtype"] == kind.dtype
    assert metadata["rope_factor"] == "1"
    assert len(metadata["bundle"]) == len(metadata["tokenizer"]) == 64
    assert {name.split(".")[0] for name in names} == {"0", "1", "token_ids", "checksums"}


def test_the_longest_common_beginning_is_taken(onnx: Open, written: Path) -> None:
    with onnx() as runtime:
        turned = [*DOCUMENT[:120], 3, 3, 3]
        assert ask(runtime, turned, PromptCache(written)).cached_tokens == 120
        # The live cache has more than the file.
        assert ask(runtime, [*turned, 4], PromptCache(written)).cached_tokens == len(turned)


def test_the_whole_prompt_again_runs_its_last_token(onnx: Open, written: Path) -> None:
    with onnx() as runtime:
        assert ask(runtime, ONE, PromptCache(written)).cached_tokens == len(ONE) - 1


def test_another_text_replaces_the_file(onnx: Open, written: Path) -> None:
    text = DOCUMENT[::-1]
    with onnx() as runtime:
        assert ask(runtime, text, PromptCache(written)).cached_tokens == 0
    with onnx() as runtime:
        assert ask(runtime, [*text, 1], PromptCache(written)).cached_tokens == len(text)
    assert [name.name for name in written.parent.iterdir()] == [written.name]


def test_a_short_prompt_leaves_the_file(onnx: Open, written: Path) -> None:
    """In a chat it once took the place of a book."""
    before = written.read_bytes()
    with onnx() as runtime:
        assert ask(runtime, DOCUMENT[:40:-1][:80], PromptCache(written)).cached_tokens == 0
        assert written.read_bytes() == before
        assert ask(runtime, OTHER, PromptCache(written)).cached_tokens == len(DOCUMENT)


def refused(runtime: Runtime, path: Path) -> str:
    """The one line about a file, which is as it was."""
    before = path.read_bytes()
    with pytest.raises(RequestError) as caught:
        ask(runtime, OTHER, PromptCache(path))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_cache_of_another_bundle_is_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, written: Path
) -> None:
    with open_runtime(make_bundle(random_checkpoint, bits=8), threads=1) as runtime:
        message = refused(runtime, written)
    assert "something else: bundle " in message
    assert "tokenizer" not in message


def test_a_cache_of_another_factor_is_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, path: Path
) -> None:
    with open_runtime(make_bundle(random_checkpoint, yarn=(1.0, 2.0)), threads=1) as runtime:
        ask(runtime, ONE, PromptCache(path))
        runtime.use_rope(2.0)
        with pytest.raises(RequestError, match="something else: rope_factor 1, expected 2; give"):
            PromptCache(path).load(runtime, ONE, len(ONE))
        # Which factor a conversation will take is not known when it begins.
        PromptCache(path).check(runtime)


def test_a_cache_of_another_type_is_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, path: Path
) -> None:
    bundle = make_bundle(random_checkpoint, target="mlx", dtype="float32")
    with open_runtime(bundle) as runtime:
        ask(runtime, ONE, PromptCache(path))
    with open_runtime(bundle, kv_bits=8) as runtime:
        assert "cache_dtype float32, expected int8; give" in refused(runtime, path)


def test_a_cache_of_another_tokenizer_is_refused(
    make_bundle: MakeBundle, random_checkpoint: Path, written: Path, tmp_path_factory: Any
) -> None:
    bundle = shutil.copytree(
        make_bundle(random_checkpoint), tmp_path_factory.mktemp("other") / "bundle"
    )
    opened = open_bundle(bundle)
    with (bundle / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    manifest = json.loads(json.dumps(opened.manifest))
    del manifest["files"]["tokenizer.json"]
    (bundle / "qwen2x.json").write_text(json.dumps(manifest), encoding="utf-8")
    with open_runtime(bundle, threads=1) as runtime:
        message = refused(runtime, written)
    assert "something else: tokenizer " in message
    assert "bundle" not in message.split("something else")[1]


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -1])
def test_a_cut_file_is_refused(onnx: Open, written: Path, size: int) -> None:
    written.write_bytes(written.read_bytes()[:size])
    with onnx() as runtime:
        message = refused(runtime, written)
    assert "is no whole prompt cache (" in message
    assert "delete it and it is made again" in message


@pytest.mark.parametrize("place", [0, 4, 40, 3000, 100_000, -2])
def test_a_damaged_file_is_refused(onnx: Open, written: Path, place: int) -> None:
    data = bytearray(written.read_bytes())
    data[place] ^= 0x55
    written.write_bytes(data)
    with onnx() as runtime:
        message = refused(runtime, written)
    assert "is no whole prompt cache (" in message or "something else" in message


@pytest.mark.parametrize(
    "content",
    [
        b"no such thing",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 20) + b'{"__metadata__": {}}',
    ],
)
def test_other_files_are_refused(onnx: Open, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with onnx() as runtime:
        assert "is no whole prompt cache (" in refused(runtime, path)


def test_weights_are_no_prompt_cache(onnx: Open, path: Path, random_checkpoint: Path) -> None:
    save_file(load_file(random_checkpoint / "model.safetensors"), path, metadata={"format": "pt"})
    with onnx() as runtime:
        assert "is no whole prompt cache (" in refused(runtime, path)


def test_a_file_that_only_says_it_fits_is_refused(onnx: Open, written: Path) -> None:
    file = read_cache_file(written)
    arrays = {name: values.copy() for name, values in file.arrays.items()}
    arrays["1.wrong"] = arrays.pop("1.value")
    write_cache_file(written, dict(file.metadata), file.token_ids, arrays)
    with onnx() as runtime:
        assert "has other arrays than its bundle's cache" in refused(runtime, written)


def test_a_full_disk_is_told_before_the_prompt_is_read(
    onnx: Open, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(written.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    before = written.read_bytes()
    with onnx() as runtime:
        with pytest.raises(RequestError, match=r"needs 0\.00 GB, 0\.00 GB are free in "):
            ask(runtime, DOCUMENT[::-1], PromptCache(written))
        assert runtime.cached_ids == []
        # Nothing is to be written for another question.
        assert ask(runtime, OTHER, PromptCache(written)).cached_tokens == len(DOCUMENT)
    assert written.read_bytes() == before


def test_a_disk_that_fills_up_leaves_the_old_file(
    onnx: Open, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = written.read_bytes()
    monkeypatch.setattr(cache_file.os, "fsync", full)
    with (
        onnx() as runtime,
        pytest.raises(RequestError, match="cannot be written: No space left on device; give"),
    ):
        ask(runtime, DOCUMENT[::-1], PromptCache(written))
    assert written.read_bytes() == before
    assert [entry.name for entry in written.parent.iterdir()] == [written.name]


def test_a_place_that_cannot_be_written_is_told_before(onnx: Open, tmp_path: Path) -> None:
    with onnx() as runtime:
        with pytest.raises(RequestError, match="nowhere is no folder; expected one for"):
            ask(runtime, ONE, PromptCache(tmp_path / "nowhere" / "file"))
        with pytest.raises(RequestError, match=r"is no whole prompt cache|is no regular file"):
            ask(runtime, ONE, PromptCache(tmp_path))
        assert runtime.cached_ids == []


def test_runtimes_without_such_a_cache_refuse(random_torch: Runtime, path: Path) -> None:
    random_torch.reset()
    with pytest.raises(RequestError, match="not for torch as it is run here; leave out --prompt"):
        ask(random_torch, ONE, PromptCache(path))
    assert not path.exists()


def test_a_folder_of_another_program_has_a_hash_too(
    make_bundle: MakeBundle, random_checkpoint: Path, tmp_path: Path
) -> None:
    folders = []
    for dtype in ("float32", "float16"):
        made = make_bundle(random_checkpoint, target="mlx", dtype=dtype)
        folders.append(shutil.copytree(made, tmp_path / dtype))
        (folders[-1] / "qwen2x.json").unlink()
    path = tmp_path / "cache"
    with open_runtime(folders[0]) as runtime:
        ask(runtime, ONE, PromptCache(path))
        assert ask(runtime, OTHER, PromptCache(path)).cached_tokens == len(DOCUMENT)
    with (
        open_runtime(folders[1]) as runtime,
        pytest.raises(RequestError, match=r"something else: bundle .*cache_dtype float32"),
    ):
        ask(runtime, OTHER, PromptCache(path))


def test_an_import_longer_than_the_context_is_refused(onnx: Open) -> None:
    with onnx() as runtime:
        assert isinstance(runtime, SavesCache)
        runtime.append(DOCUMENT)
        arrays = runtime.export_cache(len(DOCUMENT))
        with pytest.raises(RequestError, match="600 positions are needed, the context has 512"):
            runtime.import_cache(DOCUMENT * 3, arrays)
