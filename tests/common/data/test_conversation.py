"""Chat messages of every form that data hold. `pytest tests/common/data/test_conversation.py`"""

from __future__ import annotations

import json
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.chat import ChatTemplate
from opdlm.common.data.conversation import read_conversation
from opdlm.common.data.prompts import load_prompts
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.model.char_tokenizer import build_char_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role in ['user', 'system', 'assistant'] %}"
    "{{ m.role }}:{% if m.content is string %}{{ m.content }}{% endif %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""As Qwen's: content that is no string becomes empty, and a role that the template does not know vanishes."""


def tokenizer():
    built = build_char_tokenizer("0123456789abcdefghijklmnopqrstuvwxyz:;")
    built.chat_template = TEMPLATE
    return built


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | more


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text} | more


def load(file, prompt: Any):
    file.write_text(json.dumps({"prompt": "12"}) + "\n" + json.dumps({"prompt": prompt}))
    return load_prompts(DataConfig(path=str(file), chat_template=True), tokenizer(), longest=99, seed=0)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("12", "user:12;a:"),
        ([part("12")], "user:12;a:"),
        ([part("1"), "2", {"type": "input_text", "text": "3"}], "user:123;a:"),
    ],
)
def test_text_parts_are_joined(tmp_path, content, text) -> None:
    found = load(tmp_path / "d.jsonl", [user(content)])
    assert tokenizer().decode(found.prompts[1].ids) == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": None}], "message 1 (user) has no content; expected text, or a list of text p"),
        ([{"role": "user"}], "message 1 (user) has no content"),
        ([user(42)], "message 1 (user) has the content 42"),
        ([user(True)], "message 1 (user) has the content True"),
        ([user({"text": "hi"})], "message 1 (user) has the content {'text': 'hi'}"),
        (
            [user([part("1"), {"type": "image_url", "image_url": {"url": "x"}}])],
            "message 1 (user) has a content part of type `image_url`; the models here read text parts only",
        ),
        ([user([{"type": "input_audio"}])], "message 1 (user) has a content part of type `input_audio`"),
        ([user([{"text": "1"}])], "message 1 (user) has the content part {'text': '1'}; expected {\"type\": \"text\""),
        ([user([part("1") | {"text": None}])], "message 1 (user) has the content part"),
        ([user([3])], "message 1 (user) has a content part 3"),
        ([user("1", role="human")], "message 1 has role 'human'; expected one of system, developer, user, assist"),
        ([user("1", role="human")], "did you mean `user`?"),
        ([user("1"), user("2", role="User")], "message 2 has role 'User'; expected one of system, developer"),
        ([user("1", role=3)], "message 1 has role 3; expected one of"),
        ([user("1", role=None)], "message 1 has no role; expected one of"),
        ([{"from": "human", "value": "1"}], "message 1 has ShareGPT's keys `from` and `value`; expected `role`"),
        (
            [user("1"), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
            "message 2 (assistant) has tool calls and no content",
        ),
        ([user("1\ud800")], "message 1 (user) holds a lone surrogate, \\ud800 (character 2)"),
        ([user("\0")], "message 1 (user) holds a NUL character (character 1)"),
    ],
)
def test_messages_that_are_none_are_named(tmp_path, messages, message) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "d.jsonl", messages)
    assert str(caught.value).startswith("data.prompt_field: d.jsonl:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[user("")], [user(" \n")], [user([])], [user("1"), user([part(" ")])]])
def test_an_empty_user_message_is_refused_by_name_and_counted(tmp_path, messages) -> None:
    found = load(tmp_path / "d.jsonl", messages)
    assert [prompt.prompt_id for prompt in found.prompts] == ["d.jsonl:1"]
    assert found.refused == [f"d.jsonl:2: message {len(messages)} (user) is empty"]
    assert load(tmp_path / "d.jsonl", " ").refused == ["d.jsonl:2: the prompt is empty"]


@pytest.mark.parametrize(
    "messages",
    [
        [user("1", role="developer"), user("2")],
        [user("1"), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}, user("2")],
    ],
)
def test_what_a_template_would_leave_out_is_refused(tmp_path, messages) -> None:
    with pytest.raises(ConfigError, match=r"d.jsonl:2: the template leaves out message \d"):
        load(tmp_path / "d.jsonl", messages)


@pytest.mark.parametrize("how", ["parquet", "folder"])
def test_tables_give_the_same_conversations(tmp_path, how) -> None:
    """A table fills every message with the keys of all others; what is None counts as not given."""
    rows = [
        {"prompt": [user([part("1", image_url=None)], name=None), {"role": "assistant", "content": [part("2")]}]},
        {"prompt": [user([part("3", image_url="x")], name="b")]},
    ]
    rows[0]["prompt"].append(user([part("4")]))
    if how == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    else:
        datasets.Dataset.from_list(rows).with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    path = tmp_path / ("d.parquet" if how == "parquet" else "saved")
    found = load_prompts(DataConfig(path=str(path), chat_template=True), tokenizer(), longest=99, seed=0)
    texts = [tokenizer().decode(prompt.ids) for prompt in found.prompts]
    assert texts == ["user:1;assistant:2;user:4;a:", "user:3;a:"]
    assert "name" not in read_conversation(rows[0]["prompt"])[0]


def test_a_template_that_fails_in_any_way_is_one_line() -> None:
    broken = tokenizer()
    for code in ("{{ messages[0].content / 2 }}", "{{ messages[9].role.x }}", "{{ raise_exception('no') }}"):
        broken.chat_template = code
        with pytest.raises(OpdlmError, match="the template refuses it: "):
            ChatTemplate(broken, None, None).ids("1")
