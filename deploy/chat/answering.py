"""Who answers in `opdlm chat`: a checkpoint in this process, or a server that speaks OpenAI's API."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from opdlm.actors.rollout.observation import StepObservation
from opdlm.common.config.schema import Strategy
from opdlm.common.data.chat import chat_prompt, require_template
from opdlm.common.errors import OpdlmError
from opdlm.common.types import RolloutRequest
from opdlm.deploy.chat.unmasking import Unmasking
from opdlm.deploy.evaluate.generation import Model
from opdlm.deploy.serve.keys import read_keys
from opdlm.deploy.tools.generate import Tracer

Message = dict[str, str]
Show = Callable[[Text], None]
"""Shows what there is of an answer."""
_CONNECT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    tokens: int
    denoising_steps: int


@dataclass(frozen=True, slots=True)
class How:
    """What the commands of the conversation change."""

    threshold: float | None = None
    """None: what the checkpoint or the server takes by itself."""
    temperature: float = 0.0
    seed: int = 0
    trace: bool = False


class Answering(Protocol):
    """Answers conversations."""

    has_trace: bool
    """Whether it can show each denoising step."""

    def answer(self, messages: Sequence[Message], how: How, show: Show) -> Answer:
        """The answer to a conversation; `show` gets what there is of it, as it comes.

        Raises:
            OpdlmError: it cannot be answered; the conversation can go on.
        """
        ...


class Here:
    """A checkpoint in this process.

    Args:
        console: where a trace is printed.
        strategy: remasking strategy of a student. None: the usual one of the checkpoint.

    Raises:
        OpdlmError: the folder is no checkpoint, or its tokenizer has no chat template.
    """

    def __init__(self, folder: Path, max_new_tokens: int, console: Console, strategy: Strategy | None = None) -> None:
        self._model, self._limit, self._console = Model(folder), max_new_tokens, console
        require_template(self._model.tokenizer)
        self._strategy = strategy or self._model.facts.usual_strategies[-1]
        self.has_trace = self._model.is_student

    def answer(self, messages: Sequence[Message], how: How, show: Show) -> Answer:
        """See `Answering`. An autoregressive model's answer comes whole."""
        model = self._model
        prompt = model.encode(chat_prompt(model.tokenizer, messages), templated=True)
        # To the end of the last block, whatever the grid.
        room = model.facts.context - len(prompt) - (model.base.block_size - 1)
        if room < 1:
            raise OpdlmError(
                f"the conversation has {len(prompt)} tokens, which leaves no room for an answer in the context of "
                f"{model.facts.context}; /clear begins a new one"
            )
        requests = [RolloutRequest(0, "the conversation", prompt, min(self._limit, room), seed=how.seed)]
        if not model.is_student:
            (ids,) = model.continue_prompts(requests, how.temperature, 1)
            return Answer(model.text(ids), len(ids), len(ids))
        settings = replace(model.base, strategy=self._strategy, temperature=how.temperature)
        if how.threshold is not None:
            settings = replace(settings, threshold=how.threshold)
        observer: Callable[[StepObservation], None] | None = None
        if self.has_trace:
            observer = Tracer(model, self._console) if how.trace else Unmasking(model, len(prompt), show)
        (trajectory,), _ = model.decode(requests, settings, 1, observer)
        return Answer(model.text(trajectory.response), trajectory.response_length, trajectory.denoising_steps)


class There:
    """A server.

    Args:
        url: its address, with or without `/v1`.
        key_file: holds the key, in its first line; None: the server needs none.

    Raises:
        OpdlmError: nobody answers there, or it refuses the key.
    """

    has_trace = False

    def __init__(self, url: str, max_new_tokens: int, key_file: Path | None) -> None:
        self._url, self._limit = url.rstrip("/").removesuffix("/v1"), max_new_tokens
        self._key = read_keys(str(key_file))[0].decode() if key_file else None
        with closing(self._open("GET", "/v1/models")) as response:
            self.model = str(json.load(response)["data"][0]["id"])

    def answer(self, messages: Sequence[Message], how: How, show: Show) -> Answer:
        """See `Answering`. Text comes block by block. Whoever stops it closes the connection, which ends it there."""
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": self._limit,
            "temperature": how.temperature,
            "seed": how.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if how.threshold is not None:
            asked["threshold"] = how.threshold
        text, usage = "", dict[str, Any]()
        with closing(self._open("POST", "/v1/chat/completions", asked)) as response:
            for event in _events(response):
                if "error" in event:
                    raise OpdlmError(f"{self._url}: {event['error']['message']}")
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                show(Text(text))
        tokens = int(usage.get("completion_tokens", 0))
        return Answer(text, tokens, int(usage.get("denoising_steps", tokens)))

    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        if not self._url.startswith(("http://", "https://")):
            raise OpdlmError(f"--url: found {self._url}; expected an address such as http://127.0.0.1:8000")
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=_CONNECT_SECONDS)
        except urllib.error.HTTPError as error:
            raise OpdlmError(f"{self._url}: {_said(error)} (HTTP {error.code})") from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise OpdlmError(f"--url: nobody answers at {self._url}: {reason}; start one: opdlm serve CKPT") from None


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The events of a stream, to its end."""
    for line in response:
        content = line.decode().strip().removeprefix("data: ")
        if content == "[DONE]":
            return
        if content:
            yield json.loads(content)


def _said(error: urllib.error.HTTPError) -> str:
    """What the body of an error says, in OpenAI's shape or any other."""
    body = error.read().decode(errors="replace")
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200] or str(error.reason)
