"""Data files as they come: broken text, other encodings, replaced files. `pytest tests/common/data/test_records.py`"""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.prompts import load_prompts
from opdlm.common.data.rows import read_questions
from opdlm.common.errors import ConfigError
from opdlm.common.model.char_tokenizer import build_char_tokenizer

TOKENIZER = build_char_tokenizer("0123456789+-=;")
FIELDS = {"prompt_field": "prompt", "response_field": "answer"}


def texts(path, **settings) -> list[str]:
    found = load_prompts(DataConfig(path=str(path), **settings), TOKENIZER, longest=30, seed=0)
    return [TOKENIZER.decode(prompt.ids) for prompt in found.prompts]


GOOD = b'{"prompt": "1+2=", "answer": "3"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "1\\ud800", "answer": "3"}', "`prompt` holds a lone surrogate, \\ud800 (character 2)"),
        (b'{"prompt": "1\\u0000", "answer": "3"}', "`prompt` holds a NUL character (character 2)"),
        (b'{"prompt": "1", "answer": "\\udfff"}', "`answer` holds a lone surrogate, \\udfff (character 1)"),
        (b'{"prompt": "1", "answer": "3\\u0000"}', "`answer` holds a NUL character"),
        (b'{"prompt": "1\xff", "answer": "3"}', "is not JSON: byte 14 of the line, 0xff, is no UTF-8; save the file"),
        (b'{"prompt": "\xed\xa0\x80", "answer": "3"}', "is not JSON: byte 13 of the line, 0xed, is no UTF-8"),
        (b'{"prompt": "1", "answer": ' + b"[" * 50000 + b"]" * 50000 + b"}", "it is nested too deeply"),
        (b'{"prompt": "1", "answer": ' + b'{"a":' * 50000 + b"1" + b"}" * 50000 + b"}", "it is nested too deeply"),
        (b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}", "is not JSON: a number has more than 4,300 digits"),
        (b'{"prompt": "1", "prompt": "2", "answer": "3"}', "is not JSON: the key 'prompt' is there twice"),
        (b'{"prompt": NaN, "answer": "3"}', "`prompt` is nan; expected text"),
        (b'{"prompt": "1", "answer": NaN}', "`answer` is nan; expected text"),
        (b'{"prompt": "1", "answer": -Infinity}', "`answer` is -inf; expected text"),
        (b'{"prompt": "1", "answer": "3"', "is not JSON: Expecting"),
    ],
)
def test_text_that_is_none_is_named_by_file_and_row(tmp_path, line, message) -> None:
    """In prompts, given responses and reference answers alike."""
    (tmp_path / "d.jsonl").write_bytes(GOOD + line + b"\n")
    data = DataConfig(path=str(tmp_path / "d.jsonl"), **FIELDS)
    for read in (lambda: load_prompts(data, TOKENIZER, 30, 0), lambda: list(read_questions(data))):
        with pytest.raises(ConfigError) as caught:
            read()
        assert message in str(caught.value)
        assert "d.jsonl:2" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_marks_and_line_ends_of_windows_are_read(tmp_path) -> None:
    rows = [b'{"prompt": "1+2="}', b"", b'{"prompt": "4+5="}']
    (tmp_path / "d.JSONL").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))
    assert texts(tmp_path / "d.JSONL") == ["1+2=", "4+5="]
    (tmp_path / "utf16.jsonl").write_text('{"prompt": "1+2="}', encoding="utf-16")
    with pytest.raises(ConfigError, match=r"utf16.jsonl:1 is not JSON: byte 1 of the line, 0xff, is no UTF-8"):
        texts(tmp_path / "utf16.jsonl")


@pytest.mark.parametrize(("suffix", "kind"), [("jsonl", "a JSONL"), ("parquet", "a parquet")])
def test_what_is_no_file_is_told(tmp_path, suffix, kind) -> None:
    (tmp_path / f"folder.{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    for name, found in (("folder", "is a folder"), ("pipe", "is no regular file"), ("no", "does not exist")):
        with pytest.raises(
            ConfigError, match=rf"data.path: .*{name}.{suffix} {found}; expected {kind} file of prompts"
        ):
            texts(tmp_path / f"{name}.{suffix}")
    (tmp_path / f"empty.{suffix}").touch()
    with pytest.raises(ConfigError, match=r"found no prompt to train on|could not be read as a data set"):
        texts(tmp_path / f"empty.{suffix}")


def test_text_in_parquet_is_checked(tmp_path) -> None:
    broken = pa.array([b"1+2=", b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"data.path: d.parquet:2 holds text that is no UTF-8"):
        texts(tmp_path / "d.parquet")
    pq.write_table(pa.table({"prompt": [b"1+2="]}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"d.parquet:1: `prompt` is b'1\+2='; expected text, token ids or chat"):
        texts(tmp_path / "d.parquet")


def test_rows_of_a_long_table_keep_their_numbers(tmp_path) -> None:
    """Also behind the first batch; columns that nobody reads may hold anything."""
    rows = [{"prompt": f"{i}=", "other": b"\xff"} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=700)
    found = load_prompts(DataConfig(path=str(tmp_path / "d.parquet")), TOKENIZER, longest=30, seed=0)
    assert [p.prompt_id for p in found.prompts] == [f"d.parquet:{i + 1}" for i in range(2500)]
    assert TOKENIZER.decode(found.prompts[2345].ids) == "2345="


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_replaced_file_is_read_anew(tmp_path, suffix) -> None:
    """Same name, size and time, other content."""
    file = tmp_path / f"d.{suffix}"

    def write(prompt: str) -> os.stat_result:
        if suffix == "parquet":
            pq.write_table(pa.table({"prompt": [prompt]}), file)
        else:
            file.write_text(json.dumps({"prompt": prompt}))
        os.utime(file, ns=(10**18, 10**18))
        return file.stat()

    first = write("1+2=")
    assert texts(file) == ["1+2="]
    second = write("4+5=")
    assert (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns)
    assert texts(file) == ["4+5="]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"domain": 3}, "data.domain_field: d.jsonl:1: `domain` is 3; expected text, or no value"),
        ({"domain": ["math"]}, r"data.domain_field: d.jsonl:1: `domain` is \['math'\]; expected text"),
        ({"max_new_tokens": True}, "data.max_new_tokens_field: d.jsonl:1: found True; expected a number of tokens"),
        ({"max_new_tokens": 7.5}, "data.max_new_tokens_field: d.jsonl:1: found 7.5"),
        ({"prompt": [1, -2]}, "data.prompt_field: d.jsonl:1 has token id -2; possible ids are 0 to 2147483647"),
        ({"prompt": [2**40]}, "data.prompt_field: d.jsonl:1 has token id 1099511627776"),
        ({"prompt": [True, 3]}, r"data.prompt_field: d.jsonl:1: `prompt` is \[True, 3\]; expected text"),
        ({"prompt": [1.0]}, r"data.prompt_field: d.jsonl:1: `prompt` is \[1.0\]; expected text"),
    ],
)
def test_values_of_a_wrong_type_are_named(tmp_path, value, message) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "1+2="} | value))
    with pytest.raises(ConfigError, match=message):
        texts(tmp_path / "d.jsonl")


def test_a_whole_number_may_be_written_with_a_point(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+2=", "max_new_tokens": 7.0}')
    found = load_prompts(DataConfig(path=str(tmp_path / "d.jsonl")), TOKENIZER, longest=30, seed=0)
    assert found.prompts[0].max_new_tokens == 7
