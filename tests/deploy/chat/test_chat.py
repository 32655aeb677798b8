"""A conversation in the terminal: who answers, what is shown, what commands do. `pytest tests/deploy/chat`"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from opdlm.common.errors import OpdlmError
from opdlm.common.model.convert import convert_checkpoint
from opdlm.deploy.chat.answering import Answer, Here, How, Message, Show, There
from opdlm.deploy.chat.command import Conversation, run_chat
from opdlm.deploy.evaluate.generation import Model
from tests.deploy.cli.test_cli import opdlm
from tests.tiny import save_teacher

TEMPLATE = "{% for m in messages %}{{ m.content }}={% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A teacher with a chat template, and two students of it, one with causal context and logit shift."""
    root = tmp_path_factory.mktemp("chat")
    teacher = save_teacher(root / "teacher", context=512)
    (teacher / "chat_template.jinja").write_text(TEMPLATE)
    convert_checkpoint(teacher, root / "paper", 4, "response")
    convert_checkpoint(teacher, root / "shifted", 4, "response", None, True, "causal")
    return {path.name: path for path in root.iterdir()}


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


class Said:
    """Answers with what was asked, in two parts, and notes it. `stops`: Ctrl-C comes after the first part."""

    has_trace = False

    def __init__(self, stops: bool = False) -> None:
        self.asked: list[list[Message]] = []
        self.how: list[How] = []
        self._stops = stops

    def answer(self, messages: Sequence[Message], how: How, show: Show) -> Answer:
        self.asked.append(list(messages))
        self.how.append(how)
        text = f"you said {messages[-1]['content']}"
        show(Text(text[:8]))
        if self._stops:
            raise KeyboardInterrupt
        show(Text(text))
        return Answer(text, 8, 4)


@pytest.mark.parametrize("name", ["paper", "shifted", "teacher"])
def test_an_answer_is_what_generate_gives(folders, name) -> None:
    answering, shown = Here(folders[name], 24, console()[0]), list[Text]()
    asked = [{"role": "user", "content": "12+3-4"}]
    found = answering.answer(asked, How(threshold=0.9), shown.append)
    (expected,) = Model(folders[name]).generate(["12+3-4"], chat=True, max_new_tokens=24, threshold=0.9)
    assert (found.text, found.tokens) == (expected.text, len(expected.ids))
    assert found.denoising_steps == expected.denoising_steps
    if name == "teacher":
        assert shown == []
        return
    assert len(shown) == found.denoising_steps, "each step is shown"
    assert "░" in shown[0].plain
    final = shown[-1].plain
    assert final.startswith(found.text), "a response that is cut at its limit fills its last block"


def test_an_answer_is_decoded_with_the_strategy_that_was_asked_for(folders) -> None:
    asked = [{"role": "user", "content": "12+3-4"}]
    steps = {}
    for strategy in ("low_confidence_dynamic", "sequential"):
        answering = Here(folders["shifted"], 24, console()[0], strategy)
        found = answering.answer(asked, How(threshold=0.0), lambda text: None)
        (expected,) = Model(folders["shifted"]).generate(
            ["12+3-4"], chat=True, max_new_tokens=24, strategy=strategy, threshold=0.0
        )
        assert (found.text, found.denoising_steps) == (expected.text, expected.denoising_steps)
        steps[strategy] = found.denoising_steps
    assert steps["sequential"] > steps["low_confidence_dynamic"], "a threshold of 0 reveals whole blocks"


def test_an_answer_fits_into_the_context_or_the_conversation_is_too_long(folders) -> None:
    answering = Here(folders["paper"], 4096, console()[0])
    assert answering.answer([{"role": "user", "content": "1" * 500}], How(), lambda text: None).tokens <= 11
    with pytest.raises(OpdlmError, match=r"leaves no room for an answer in the context of 512; /clear"):
        answering.answer([{"role": "user", "content": "1" * 511}], How(), lambda text: None)


def test_a_trace_is_printed_instead(folders) -> None:
    out, printed = console()
    Here(folders["paper"], 8, out).answer([{"role": "user", "content": "1"}], How(trace=True), lambda text: None)
    assert "confidence of what the step revealed" in printed.getvalue()


def test_the_conversation_is_kept_and_commands_change_it() -> None:
    out, printed = console()
    said = Said()
    talk = Conversation(said, How(seed=7), out)
    lines = ["", "one", "/threshold 0.5", "/temperature 1", "two", "/clear", "three", "/system be brief", "four"]
    assert all(talk.take(line) for line in lines)
    assert said.asked[1] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "you said one"},
        {"role": "user", "content": "two"},
    ]
    assert said.asked[2] == [{"role": "user", "content": "three"}]
    assert [message["role"] for message in said.asked[3]] == ["system", "user"]
    assert [(how.threshold, how.temperature) for how in said.how] == [(None, 0.0), *[(0.5, 1.0)] * 3]
    assert len({how.seed for how in said.how}) == 4, "no two turns are alike"
    assert "8 tokens, 2.00 per step" in printed.getvalue()
    assert not talk.take("/quit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/threshold 2", "/threshold: found '2'; expected a number of 0 to 1"),
        ("/temperature x", "/temperature: found 'x'"),
        ("/trace", "/trace: only a student in this process"),
        ("/fly", "/fly: unknown; /help lists"),
        ("a\udcff", "the message holds a lone surrogate"),
    ],
)
def test_mistakes_are_told_and_the_conversation_goes_on(line, message) -> None:
    out, printed = console()
    said = Said()
    talk = Conversation(said, How(), out)
    assert talk.take(line)
    assert message in printed.getvalue()
    assert talk.take("hello")
    assert said.asked == [[{"role": "user", "content": "hello"}]]


def test_ctrl_c_stops_an_answer_only() -> None:
    out, printed = console()
    talk = Conversation(Said(stops=True), How(), out)
    assert talk.take("one")
    assert "(stopped)" in printed.getvalue()
    assert talk.messages[-1] == {"role": "assistant", "content": "you said"}, "what has come is kept"


def test_the_input_ends_the_conversation() -> None:
    out, printed = console()
    lines = iter(["/help", "one"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    said = Said()
    run_chat(Conversation(said, How(), out), read, out)
    assert len(said.asked) == 1
    assert "/threshold 0.9" in printed.getvalue()


class _Server(BaseHTTPRequestHandler):
    """Streams two parts; needs the key `open`; refuses a threshold of 0."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": "small"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked.get("threshold") == 0:
            return self._send({"error": {"message": "threshold: found 0"}}, 400)
        parts = [{"choices": [{"delta": {"content": text}}]} for text in ("12", "+3")]
        usage = {"choices": [], "usage": {"completion_tokens": 4, "denoising_steps": 2}}
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in (*parts, usage)) + "data: [DONE]\n\n"
        self._send(body.encode())

    def _send(self, body: Any, status: int = 200) -> None:
        if self.headers.get("Authorization") != "Bearer open":
            body, status = {"error": {"message": "no valid key"}}, 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing: tests are quiet."""


@pytest.fixture
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_answers_block_by_block(address, tmp_path) -> None:
    key = tmp_path / "key"
    key.write_text("open\n")
    there, shown = There(f"{address}/v1/", 16, key), list[Text]()
    assert there.model == "small"
    assert there.answer([{"role": "user", "content": "x"}], How(threshold=0.5), shown.append) == Answer("12+3", 4, 2)
    assert [text.plain for text in shown] == ["12", "12+3", "12+3"]
    with pytest.raises(OpdlmError, match=r"threshold: found 0 \(HTTP 400\)"):
        there.answer([{"role": "user", "content": "x"}], How(threshold=0), shown.append)
    with pytest.raises(OpdlmError, match="no valid key"):
        There(address, 16, None)


def test_what_cannot_be_begun_is_refused(folders, tmp_path) -> None:
    assert "give either a checkpoint or --url" in opdlm("chat", code=2)
    assert "only a server needs a key" in opdlm("chat", folders["paper"], "--api-key-file", "x", code=2)
    assert "nobody answers at http://127.0.0.1:9" in opdlm("chat", "--url", "http://127.0.0.1:9", code=2)
    with_url = ("chat", "--url", "http://127.0.0.1:9", "--strategy", "sequential")
    assert "a server decodes with its own (opdlm serve --strategy)" in opdlm(*with_url, code=2)
    assert "expected an address such as" in opdlm("chat", "--url", "localhost:8000", code=2)
    plain = save_teacher(tmp_path / "plain")
    assert "use a tokenizer with a chat template" in opdlm("chat", plain, code=2)
