from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen2x.quantize.errors import RequestError
from qwen2x.runtimes.chat import ChatTemplate, Message, read_chat_template
from tests.tiny_checkpoint import EXAMPLE

SYSTEM: Message = {"role": "system", "content": "Answer in one line.\n"}
USER: Message = {"role": "user", "content": "Who are you?  \n <|im_start|> {{ 1 }} <b>ü😀</b>"}
ASSISTANT: Message = {"role": "assistant", "content": "I am a 'test' & \"more\"."}
CONVERSATIONS = {
    "one question": [USER],
    "with a system message": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, {**USER, "content": " again\t"}],
    "empty content": [{**USER, "content": ""}],
}


def assert_equals_transformers(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    template = read_chat_template(folder)
    assert template is not None
    for messages in CONVERSATIONS.values():
        for is_open in (True, False):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=is_open
            )
            assert template.render(messages, add_generation_prompt=is_open) == expected


def test_prompts_are_those_of_transformers() -> None:
    assert_equals_transformers(EXAMPLE)


@pytest.mark.real
def test_prompts_of_the_real_checkpoint_are_those_of_transformers(real_checkpoint: Path) -> None:
    assert_equals_transformers(real_checkpoint)


QWEN25 = """{%- if tools %}{{- '<tools>' + (tools | tojson) }}{%- endif %}
{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- if message.content == '' %}{% continue %}{% endif %}
    {%- generation %}{{ message | tojson(indent=2) }}{{ message | tojson }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + eos_token }}
{%- endif %}
"""


@pytest.mark.parametrize(
    "entry",
    [QWEN25, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": QWEN25}]],
    ids=["string", "list"],
)
def test_templates_in_the_tokenizers_config_are_those_of_transformers(
    tmp_path: Path, entry: Any
) -> None:
    settings = json.loads((EXAMPLE / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = entry
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.copyfile(EXAMPLE / "tokenizer.json", tmp_path / "tokenizer.json")
    assert_equals_transformers(tmp_path)


def test_the_file_wins_over_the_tokenizers_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "a"}', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("b", encoding="utf-8")
    template = read_chat_template(tmp_path)
    assert template is not None
    assert template.render([USER]) == "b"


@pytest.mark.parametrize(
    "settings", ["{}", '{"chat_template": null}', '{"chat_template": [7, {"name": "x"}]}', "[]"]
)
def test_a_model_without_a_template_has_none(tmp_path: Path, settings: str) -> None:
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    assert read_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"\xff"),
     ("chat_template.jinja", b"\xff\xfe"), ("chat_template.jinja", b"{% if %}")],
)  # fmt: skip
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=r"cannot be read|not valid Jinja"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update({'role': 'x'}) %}",
        "{% set _ = messages.clear() %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ nothing.at.all }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_hostile_or_broken_templates_are_refused_in_one_line(source: str) -> None:
    messages: list[Message] = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match=r"the chat template refused the messages: ."):
        ChatTemplate(source, {}).render(messages)
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | map(attribute='__class__') | list }}", "[Undefined]"),
        ("{{ raise_exception.__globals__ }}", ""),
        ("{{ messages.__class__ }}", ""),
    ],
)
def test_attributes_of_python_objects_are_undefined(source: str, expected: str) -> None:
    assert ChatTemplate(source, {}).render([USER]) == expected


def test_a_templates_own_refusal_is_passed_on() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render([USER])


def test_dates_can_be_asked_for() -> None:
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render([USER])) == 10
