"""Schema, stop strings, queue bounds and keys, without Ray. `pytest tests/deploy/serve/test_parts.py`"""

from __future__ import annotations

import json

import pytest

from opdlm.common.errors import OpdlmError
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.deploy.serve.admission import Admission
from opdlm.deploy.serve.errors import ApiError
from opdlm.deploy.serve.keys import check_key, read_keys
from opdlm.deploy.serve.schema import ChatRequest, CompletionRequest, read_request
from opdlm.deploy.serve.text import TextStream

TOKENIZER = build_char_tokenizer("0123456789+-=;")


def send(text: str, stops: list[str], size: int) -> tuple[list[str], bool]:
    """The parts of a text that comes `size` tokens at a time, until a stop string."""
    stream, ids = TextStream(TOKENIZER, stops), TOKENIZER(text, add_special_tokens=False)["input_ids"]
    parts: list[str] = []
    for start in range(0, len(ids), size):
        parts.append(stream.add(ids[start : start + size], last=start + size >= len(ids)))
        if stream.stopped:
            break
    return parts, stream.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 4, 20])
@pytest.mark.parametrize(
    ("stops", "left"),
    [([], "12+34=46;5"), (["="], "12+34"), (["4=", "34"], "12+"), (["46;9"], "12+34=46;5"), (["5"], "12+34=46;")],
)
def test_a_response_ends_before_the_first_stop_string_however_its_tokens_come(size, stops, left) -> None:
    parts, stopped = send("12+34=46;5", stops, size)
    assert "".join(parts) == left
    assert stopped == (left != "12+34=46;5")


def test_the_beginning_of_a_stop_string_waits_for_its_rest() -> None:
    assert send("1+=2", ["+=5"], 1)[0] == ["1", "", "", "+=2"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": "1"}, "temperature: "),
        ({"n": 0}, "n: "),
        ({"stop": ["a", ""]}, "stop: found"),
        ({"stop": list("abcde")}, "expected up to 4"),
        ({"logprobs": 5}, "logprobs: "),
        ({"tools": []}, "tools: "),
        ({"stream_options": {"other": True}}, "expected include_usage"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change, said) -> None:
    with pytest.raises(ApiError) as refused:
        read_request(CompletionRequest, json.dumps({"model": "m", "prompt": "1"} | change).encode())
    assert refused.value.status == 400
    assert said in refused.value.message


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ApiError, match="JSON"):
        read_request(ChatRequest, b"{")


def test_every_form_of_prompt_is_read() -> None:
    for given, expected in (("1", ["1"]), (["1", "2"], ["1", "2"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        body = json.dumps({"model": "m", "prompt": given}).encode()
        assert read_request(CompletionRequest, body).prompts == expected


def test_the_queue_is_bounded_and_a_draining_server_takes_nothing() -> None:
    admission = Admission(3)
    with admission.admit(2):
        with pytest.raises(ApiError) as full, admission.admit(2):
            pass
        with admission.admit(1):
            assert admission.active == 3
    assert (full.value.status, admission.active) == (429, 0)
    with pytest.raises(ApiError, match="asks for 4"), admission.admit(4):
        pass
    admission.draining = True
    with pytest.raises(ApiError) as drains, admission.admit(1):
        pass
    assert drains.value.status == 503


def test_keys_are_lines_and_an_empty_file_is_refused(tmp_path) -> None:
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert read_keys(str(tmp_path / "keys")) == [b"one", b"two"]
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(OpdlmError, match="found no key"):
        read_keys(str(tmp_path / "keys"))


def test_without_keys_only_this_machine_is_answered() -> None:
    for client in ("127.0.0.1", "::1", None):
        check_key([], "", client)
    with pytest.raises(ApiError, match="this server has no keys and answers its own machine only"):
        check_key([], "Bearer x", "10.0.0.7")
    check_key([b"one", b"two"], "Bearer two", "10.0.0.7")
    for wrong in ("", "Bearer three", "two "):
        with pytest.raises(ApiError, match="no valid key"):
            check_key([b"one", b"two"], wrong, "127.0.0.1")
