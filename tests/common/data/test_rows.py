"""Rows of files and data sets, and chat templates. `pytest tests/common/data/test_rows.py`"""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.chat import ChatTemplate
from opdlm.common.data.prompts import PromptOrder, load_prompts
from opdlm.common.data.rows import Question, read_questions
from opdlm.common.errors import ConfigError
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.common.token_ids import TokenIds

ROWS = [
    {"question": "1+2=", "answer": "3", "kind": "math", "limit": 7},
    {"question": "4+5=", "answer": "9", "kind": None, "limit": None},
    {"question": "9" * 40, "answer": "x", "kind": "math", "limit": 1},
]
COLUMNS = {
    "prompt_field": "question",
    "response_field": "answer",
    "domain_field": "kind",
    "max_new_tokens_field": "limit",
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}-{% endif %}"
)


def tokenizer(template: str | None = None):
    built = build_char_tokenizer("0123456789+-=;abcdefghijklmnopqrstuvwxyz:\n")
    built.chat_template = template
    return built


def save(folder, how: str) -> tuple[str, str]:
    """Saves ROWS in one of the supported forms; returns (data.path, name of row 1)."""
    if how == "jsonl":
        (folder / "d.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
        return str(folder / "d.jsonl"), "d.jsonl:1"
    if how == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "d.parquet")
        return str(folder / "d.parquet"), "d.parquet:1"
    table = datasets.Dataset.from_list(ROWS)
    saved = table if how == "folder" else datasets.DatasetDict({"train": table, "test": table.select([1])})
    saved.save_to_disk(str(folder / "saved"))
    return str(folder / "saved"), "saved:1"


@pytest.mark.parametrize("how", ["jsonl", "parquet", "folder", "splits"])
def test_every_form_gives_the_same_prompts(tmp_path, how) -> None:
    path, first = save(tmp_path, how)
    found = load_prompts(DataConfig(path=path, **COLUMNS), tokenizer(), longest=10, seed=0)
    assert [p.prompt_id for p in found.prompts] == [first, first.replace(":1", ":2")]
    assert [tokenizer().decode(p.ids) for p in found.prompts] == ["1+2=", "4+5="]
    assert [(p.domain, p.max_new_tokens) for p in found.prompts] == [("math", 7), (None, None)]
    eos = tokenizer().eos_token_id
    assert [p.response.tolist() for p in found.prompts] == [
        [*tokenizer()(text)["input_ids"], eos] for text in ("3", "9")
    ]
    assert found.refused == [first.replace(":1", ":3") + ": 40 tokens; expected 1 to 10"]


def test_a_split_is_chosen(tmp_path) -> None:
    path, _ = save(tmp_path, "splits")
    found = load_prompts(DataConfig(path=path, split="test", **COLUMNS), tokenizer(), longest=10, seed=0)
    assert [tokenizer().decode(p.ids) for p in found.prompts] == ["4+5="]
    with pytest.raises(ConfigError, match=r"data\.split: found 'dev'; .*saved has: train, test"):
        load_prompts(DataConfig(path=path, split="dev", **COLUMNS), tokenizer(), longest=10, seed=0)


@pytest.mark.parametrize(
    ("how", "settings", "message"),
    [
        ("parquet", {"prompt_field": "text"}, r"data.prompt_field: d.parquet:1 has no `text`; found: question, answer"),
        ("folder", {"response_field": "reply"}, r"data.response_field: saved:1 has no `reply`"),
        ("jsonl", {"max_new_tokens_field": "answer"}, r"data.max_new_tokens_field: d.jsonl:1: found '3'; expected a n"),
    ],
)
def test_missing_and_wrong_columns_are_named(tmp_path, how, settings, message) -> None:
    path, _ = save(tmp_path, how)
    with pytest.raises(ConfigError, match=message):
        load_prompts(DataConfig(path=path, **COLUMNS | settings), tokenizer(), longest=10, seed=0)


def test_the_names_of_rows_are_part_of_the_fingerprint(tmp_path) -> None:
    """Responses are kept by row name, so a file whose rows have moved counts as another file."""

    def digest(lead: str, **extra) -> str:
        file = tmp_path / "d.jsonl"
        file.write_text(lead + "\n".join(json.dumps(row | extra) for row in ROWS))
        found = load_prompts(DataConfig(path=str(file), **COLUMNS), tokenizer(), longest=10, seed=0)
        return PromptOrder(found.prompts, 0, 1).digest

    assert digest("") == digest("")
    assert len({digest(""), digest("\n"), digest("", limit=3), digest("", kind="code"), digest("", answer="4")}) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"prompt": "\xff"}', r"data.path: d.jsonl:1 is not JSON"),
        (b'{"prompt": [3, 17]}', r"data.prompt_field: d.jsonl:1 has token id 17; the teacher's are 0 to 16"),
        (b'{"prompt": [-1]}', r"data.prompt_field: d.jsonl:1 has token id -1"),
        (b'{"prompt": [99999999999]}', r"data.prompt_field: d.jsonl:1 has token id 99999999999"),
    ],
)
def test_unreadable_rows_and_unknown_token_ids_are_named(tmp_path, row, message) -> None:
    (tmp_path / "d.jsonl").write_bytes(row)
    with pytest.raises(ConfigError, match=message):
        load_prompts(DataConfig(path=str(tmp_path / "d.jsonl")), tokenizer(), longest=10, seed=0, tokens=TokenIds(17))


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        ([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], {}, "ends with the assistant's an"),
        ([{"role": "system", "content": "1"}, {"role": "user", "content": "2"}], {"system_prompt": "x"}, "of its own"),
        ([{"role": "user", "content": "1"}, {"role": "tool", "content": "2"}], {}, "1: the template refuses it: no!"),
        ([{"role": "system", "content": "1"}], {}, r"1: the conversation has no message of the user"),
    ],
)
def test_conversations_that_contradict_the_settings_are_named(tmp_path, messages, settings, message) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": messages}))
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no!') }}{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match=message):
        load_prompts(
            DataConfig(path=str(tmp_path / "d.jsonl"), chat_template=True, **settings), tokenizer(strict), 50, 0
        )


def test_hub_ids_may_hold_dots(tmp_path, monkeypatch) -> None:
    asked = []

    def load(path, subset, split):
        asked.append((path, subset, split))
        return datasets.Dataset.from_list([{"prompt": "1+2="}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_prompts(DataConfig(path="nvidia/Set-v1.1", subset="math"), tokenizer(), longest=10, seed=0)
    assert asked == [("nvidia/Set-v1.1", "math", "train")]
    assert [p.prompt_id for p in found.prompts] == ["Set-v1.1:1"]


@pytest.mark.parametrize("name", ["no.parquet", "no.csv", "damaged.parquet", "folder"])
def test_the_error_for_a_bad_file_is_one_line(tmp_path, name) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"^data\.path: .*") as caught:
        load_prompts(DataConfig(path=str(tmp_path / name)), tokenizer(), longest=10, seed=0)
    assert "\n" not in str(caught.value)


def test_chat_template_with_system_and_thinking() -> None:
    def text(prompt, **settings) -> str:
        with_template = tokenizer(TEMPLATE)
        chat = ChatTemplate(with_template, settings.get("system"), settings.get("thinking"))
        return with_template.decode(chat.ids(prompt)).replace(" ", "")

    assert text("1+2=") == "user:1+2=\nassistant:"
    assert text("1+2=", system="add", thinking=False) == "system:add\nuser:1+2=\nassistant:-"
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    assert text(turns, thinking=True) == "user:1\nassistant:2\nuser:3\nassistant:"


def test_messages_and_text_go_through_the_template(tmp_path) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": "1+2="}, {"prompt": [{"role": "user", "content": "1+2="}]}, {"prompt": [5, 6]}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    data = DataConfig(path=str(file), chat_template=True, thinking=False)
    found = load_prompts(data, tokenizer(TEMPLATE), longest=50, seed=0).prompts
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[2].ids.tolist() == [5, 6]  # token ids do not go through the template


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (None, {"chat_template": True}, r"data.chat_template: the tokenizer has no chat template"),
        (
            "{{ messages }}",
            {"chat_template": True, "thinking": True},
            r"data.thinking: found True, but the tokenizer's",
        ),
        (TEMPLATE, {}, r"data.chat_template: d.jsonl:1: `prompt` holds chat messages; set data.chat_template to true"),
    ],
)
def test_a_wrong_template_is_named(tmp_path, template, settings, message) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "1"}]}))
    with pytest.raises(ConfigError, match=message):
        load_prompts(DataConfig(path=str(file), **settings), tokenizer(template), longest=50, seed=0)


@pytest.mark.parametrize("how", ["jsonl", "parquet", "folder"])
def test_rows_are_read_as_questions(tmp_path, how) -> None:
    """A number is an answer too. The column `kind` is read where there is one; `mark` there is none."""
    path, first = save(tmp_path, how)
    data = DataConfig(path=path, prompt_field="question", response_field="limit")
    assert next(read_questions(data)) == Question(first, "1+2=", ("7",), None, "math")


def test_several_answers_count_as_right(tmp_path) -> None:
    rows = [
        {"prompt": "a", "answers": ["4", 4.5], "answer": "5", "mark": "contains", "kind": "sums"},
        {"prompt": "b", "answer": "6"},
        {"prompt": "c", "answers": 7, "mark": None},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_questions(DataConfig(path=str(tmp_path / "d.jsonl")))) == [
        Question("d.jsonl:1", "a", ("4", "4.5"), "contains", "sums"),
        Question("d.jsonl:2", "b", ("6",)),
        Question("d.jsonl:3", "c", ("7",)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "3"}, "data.prompt_field: d.jsonl:1 has no `prompt`; found: answer"),
        ({"prompt": [1, 2], "answer": "3"}, r"data.prompt_field: d.jsonl:1: `prompt` is \[1, 2\]; expected text"),
        ({"prompt": "1+2="}, "data.response_field: d.jsonl:1 has no `answer`; found: prompt"),
        ({"prompt": "1+2=", "answer": None}, "data.response_field: d.jsonl:1: `answer` is None; expected text or a n"),
        ({"prompt": "1+2=", "answer": True}, "data.response_field: d.jsonl:1: `answer` is True; expected text or a n"),
        ({"prompt": "1+2=", "answer": []}, r"data.response_field: d.jsonl:1: `answer` is \[\]; expected text or a n"),
        ({"prompt": "1+2=", "answer": ["3", None]}, "data.response_field: d.jsonl:1: `answer` is None; expected text"),
        (
            {"prompt": "1", "answer": "3", "mark": "fuzzy"},
            "data.path: d.jsonl:1: `mark` is 'fuzzy'; expected one of ex",
        ),
        ({"prompt": "1", "answer": "3", "kind": 3}, "data.path: d.jsonl:1: `kind` is 3; expected text, or no value"),
    ],
)
def test_rows_that_are_no_questions_are_named(tmp_path, row, message) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        list(read_questions(DataConfig(path=str(tmp_path / "d.jsonl"), response_field="answer")))
