"""The judge of what is generated is transformers' own ``generate``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.cache_bookkeeping import CacheBookkeeping
from qwen2x.runtimes.generate import Generation, Piece, generate, read_text_files
from qwen2x.runtimes.runtime import Logits, Runtime, TokenIds, open_runtime
from qwen2x.runtimes.sampler import Sampling
from tests.runtimes.conftest import MakeBundle
from tests.tiny_checkpoint import EXAMPLE

GREEDY = Sampling()
QUESTIONS = ["Who are you?", "Hello"]


@pytest.fixture
def runtime(example_runtime: Runtime) -> Runtime:
    example_runtime.reset()
    return example_runtime


@pytest.fixture(scope="module")
def judge() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(EXAMPLE)


def theirs(judge: tuple[Any, Any], prompt: str, max_tokens: int, **options: Any) -> list[int]:
    """New token ids of transformers, without the end token."""
    model, tokenizer = judge
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    output = model.generate(ids, max_new_tokens=max_tokens, do_sample=False, **options)
    new = output[0, ids.shape[1] :].tolist()
    return new[:-1] if new[-1] in model.generation_config.eos_token_id else new


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_are_those_of_transformers(
    runtime: Runtime, judge: tuple[Any, Any], question: str
) -> None:
    messages = [{"role": "user", "content": question}]
    prompt = judge[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = theirs(judge, prompt, 60, repetition_penalty=1.0)
    answer = generate(runtime, question, max_tokens=60, sampling=GREEDY).run()
    assert answer.token_ids == expected
    assert answer.text == judge[1].decode(expected, skip_special_tokens=True)
    assert answer.prompt_ids == judge[1].encode(prompt, add_special_tokens=False)
    assert answer.finish_reason == ("stop" if len(expected) < 60 else "length")


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_raw_continuations_are_those_of_transformers(
    runtime: Runtime, judge: tuple[Any, Any], penalty: float
) -> None:
    expected = theirs(judge, "The small model", 40, repetition_penalty=penalty)
    sampling = Sampling(repetition_penalty=penalty)
    answer = generate(runtime, "The small model", max_tokens=40, sampling=sampling, raw=True).run()
    assert answer.token_ids == expected


def test_pieces_join_to_the_text_and_carry_every_token(runtime: Runtime) -> None:
    answer = generate(runtime, "Who are you?", max_tokens=30, sampling=GREEDY)
    pieces = list(answer)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.token_id for piece in pieces if piece.token_id is not None] == answer.token_ids
    assert answer.prefill_s > 0
    assert answer.decode_s > 0


def test_an_answer_is_given_once(runtime: Runtime) -> None:
    answer = generate(runtime, "Hello", max_tokens=3, sampling=GREEDY).run()
    with pytest.raises(RequestError, match="given already"):
        answer.run()


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_ends_with_length(runtime: Runtime, max_tokens: int) -> None:
    answer = generate(
        runtime, "Hello", max_tokens=max_tokens, sampling=GREEDY, ignore_eos=True
    ).run()
    assert len(answer.token_ids) == max_tokens
    assert answer.finish_reason == "length"
    # The last token is not run: nothing was asked of it.
    assert runtime.cache_length == len(answer.prompt_ids) + max_tokens - 1


def test_the_context_is_the_limit_where_none_is_given(make_bundle: MakeBundle) -> None:
    with open_runtime(make_bundle(max_context=40), threads=1) as short:
        answer = generate(short, "Hello", sampling=GREEDY, raw=True, ignore_eos=True).run()
        assert len(answer.prompt_ids) + len(answer.token_ids) == 40
        assert answer.finish_reason == "length"
        with pytest.raises(RequestError, match=r"has 40 tokens, the context 40.*shorten"):
            generate(short, list(range(300, 340)))
        assert len(generate(short, list(range(300, 339)), ignore_eos=True).run().token_ids) == 1


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(runtime: Runtime) -> None:
    whole = generate(runtime, "Who are you?", max_tokens=40, sampling=GREEDY).run()
    texts = [read_text_files(EXAMPLE).tokenizer.decode([token]) for token in whole.token_ids]
    # The end of one token and the beginning of the next, in the middle of the answer.
    middle = len(texts) // 2
    stop = texts[middle][-1] + texts[middle + 1][0]
    answer = generate(
        runtime, "Who are you?", max_tokens=40, sampling=GREEDY, stop=["never seen", stop]
    )
    shown = "".join(piece.text for piece in answer)
    assert shown == answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) < len(whole.token_ids)


def test_one_stop_string_may_be_given_as_it_is(runtime: Runtime) -> None:
    whole = generate(runtime, "Who are you?", max_tokens=40, sampling=GREEDY).run().text
    answer = generate(runtime, "Who are you?", max_tokens=40, sampling=GREEDY, stop=whole[5:9])
    assert answer.run().text == whole[: whole.index(whole[5:9])]


def test_text_held_back_for_a_stop_that_never_comes_is_given_at_the_end(runtime: Runtime) -> None:
    whole = generate(runtime, "Who are you?", max_tokens=40, sampling=GREEDY).run()
    stop = whole.text[-3:] + "never"
    answer = generate(runtime, "Who are you?", max_tokens=40, sampling=GREEDY, stop=[stop])
    pieces = list(answer)
    assert pieces[-1] == Piece(text=whole.text[-3:], token_id=None)
    assert answer.text == whole.text
    assert answer.finish_reason == whole.finish_reason


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        (" \n", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        (np.array([], np.int64), {}, "prompt is empty"),
        ([1.5, 2.0], {}, "token ids must be integers"),
        ([1, {"role": "user", "content": "x"}], {}, "token ids must be integers"),
        ("Hi", {"max_tokens": 0}, "max tokens must be .* 1 or more, got 0"),
        ("Hi", {"max_tokens": 2.5}, "max tokens must be .*got 2.5"),
        ("Hi", {"max_tokens": True}, "max tokens must be .*got True"),
        ("Hi", {"stop": [""]}, "must not be empty"),
        ("Hi", {"system": "Be brief.", "raw": True}, "system message goes with"),
        ([1, 2], {"system": "Be brief."}, "system message goes with"),
        ("x\ud800", {}, "lone surrogates"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    runtime: Runtime, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        generate(runtime, prompt, **options)


def test_token_ids_outside_the_vocabulary_are_refused(runtime: Runtime) -> None:
    with pytest.raises(RequestError, match=r"token ids must be in 0\.\.2047, got 2048"):
        generate(runtime, [1, 2048]).run()


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: [np.int64(i) for i in ids]])
def test_token_ids_are_taken_as_they_are(runtime: Runtime, kind: Any) -> None:
    text = generate(runtime, "Hello", max_tokens=9, sampling=GREEDY).run()
    answer = generate(runtime, kind(text.prompt_ids), max_tokens=9, sampling=GREEDY).run()
    assert answer.prompt_ids == text.prompt_ids
    assert all(type(token) is int for token in answer.prompt_ids)
    assert answer.token_ids == text.token_ids
    assert json.dumps(answer.token_ids)


def test_a_system_message_goes_before_a_text_prompt(runtime: Runtime) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    by_name = generate(runtime, "Hello", system="Be brief.").prompt_ids
    assert by_name == generate(runtime, messages).prompt_ids


def test_the_second_turn_runs_only_what_is_new_and_says_the_same(
    runtime: Runtime, make_bundle: MakeBundle
) -> None:
    messages: list[Any] = [{"role": "user", "content": "Who are you?"}]
    first = generate(runtime, messages, max_tokens=25, sampling=GREEDY).run()
    assert first.cached_tokens == 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Hello"}]
    second = generate(runtime, messages, max_tokens=25, sampling=GREEDY).run()
    assert second.cached_tokens >= len(first.prompt_ids) + len(first.token_ids) - 2
    with open_runtime(make_bundle(), threads=1) as fresh:
        alone = generate(fresh, messages, max_tokens=25, sampling=GREEDY).run()
    assert alone.cached_tokens == 0
    assert second.token_ids == alone.token_ids


def test_the_same_prompt_again_runs_only_its_last_token(runtime: Runtime) -> None:
    first = generate(runtime, "Hello", max_tokens=9, sampling=GREEDY).run()
    again = generate(runtime, "Hello", max_tokens=9, sampling=GREEDY).run()
    assert again.cached_tokens == len(first.prompt_ids) - 1
    assert again.token_ids == first.token_ids


def test_a_runtime_goes_on_after_an_answer_was_left(runtime: Runtime) -> None:
    whole = generate(runtime, "Who are you?", max_tokens=30, sampling=GREEDY).run()
    runtime.reset()
    answer = generate(runtime, "Who are you?", max_tokens=30, sampling=GREEDY)
    pieces = iter(answer)
    for _ in range(4):
        next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert answer.token_ids == whole.token_ids[:4]
    assert answer.finish_reason is None
    again = generate(runtime, "Who are you?", max_tokens=30, sampling=GREEDY).run()
    assert again.token_ids == whole.token_ids


@pytest.mark.parametrize("end", [1, [7, 1]])
def test_end_tokens_of_the_generation_config_end_the_text(
    tmp_path: Path, make_bundle: MakeBundle, runtime: Runtime, end: Any
) -> None:
    whole = generate(runtime, "Who are you?", max_tokens=30, sampling=GREEDY).run()
    token = whole.token_ids[10]
    ids = token if isinstance(end, int) else [7, token]
    source = tmp_path / "source"
    shutil.copytree(EXAMPLE, source)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": ids}), encoding="utf-8"
    )
    with open_runtime(make_bundle(source), threads=1) as other:
        answer = generate(other, "Who are you?", max_tokens=30).run()
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(token)]
    assert answer.finish_reason == "stop"
    with open_runtime(source, backend="torch", threads=1) as reference:
        assert set(reference.eos_token_ids) == set(other.eos_token_ids)


class PaddedRuntime(CacheBookkeeping):
    """Prefers a row that has no text; then the end token."""

    def __init__(self, folder: Path, preferred: int) -> None:
        super().__init__()
        self.folder, self.vocab_size, self.max_context = folder, 2048, 64
        self.eos_token_ids = (2015,)
        self.preferred = preferred

    def _run(self, token_ids: TokenIds, keep: int) -> Logits:
        rows = np.zeros((keep, self.vocab_size), np.float32)
        rows[:, 300] = 1
        rows[:, self.preferred] = 9
        return rows

    def _truncate_cache(self, length: int) -> None:
        pass


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.2, seed=1)], ids=str)
def test_rows_of_a_padded_vocabulary_are_never_chosen(sampling: Sampling) -> None:
    for row in (2016, 2047):
        padded: Any = PaddedRuntime(EXAMPLE, row)
        answer = generate(padded, "Hello", max_tokens=20, sampling=sampling).run()
        assert max(answer.token_ids, default=0) < 2016
    known: Any = PaddedRuntime(EXAMPLE, 1999)
    assert generate(known, "Hello", max_tokens=2, sampling=GREEDY).run().token_ids == [1999] * 2


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EXAMPLE / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("content", ["{", "[1]", '"text"'])
def test_a_damaged_generation_config_is_refused_in_one_line(
    text_folder: Path, content: str
) -> None:
    (text_folder / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=r"generation_config\.json (cannot be read|must hold)"):
        read_text_files(text_folder)


@pytest.mark.parametrize("limit", ["many", 0, -3, 1.5, True])
def test_a_damaged_limit_in_the_generation_config_is_refused(text_folder: Path, limit: Any) -> None:
    path = text_folder / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": limit}), encoding="utf-8")
    padded: Any = PaddedRuntime(text_folder, 1999)
    with pytest.raises(RequestError, match="max tokens must be an integer of 1 or more"):
        generate(padded, "Hello")
    path.write_text(json.dumps({"max_new_tokens": 4}), encoding="utf-8")
    assert len(generate(padded, "Hello").run().token_ids) == 4
    assert len(generate(padded, "Hello", max_tokens=6).run().token_ids) == 6


def test_a_model_without_a_template_continues_text_and_refuses_conversations(
    text_folder: Path,
) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (text_folder / name).unlink()
    base: Any = PaddedRuntime(text_folder, 1999)
    tokenizer = read_text_files(text_folder).tokenizer
    assert generate(base, "Hello").prompt_ids == tokenizer.encode("Hello")
    for prompt, system in ((([{"role": "user", "content": "Hi"}]), None), ("Hi", "Be brief.")):
        with pytest.raises(RequestError, match="no chat template"):
            generate(base, prompt, system=system)


def test_answers_of_a_sampler_with_a_seed_are_repeatable(runtime: Runtime) -> None:
    def answer(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return generate(runtime, "Hello", max_tokens=20, sampling=sampling).run().token_ids

    assert answer(4) == answer(4)
    assert answer(4) != answer(5)


def test_a_generation_needs_no_text_prompt(runtime: Runtime) -> None:
    answer = Generation(runtime=runtime, prompt_ids=[300, 301], sampling=GREEDY, max_tokens=3)
    assert len(answer.run().token_ids) <= 3
