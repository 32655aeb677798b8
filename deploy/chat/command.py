"""The conversation of `opdlm chat`: reads lines, obeys commands, shows answers as they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.text import Text

from opdlm.common.errors import OpdlmError
from opdlm.common.seeds import as_int64, sample_seed
from opdlm.common.text import text_fault
from opdlm.deploy.chat.answering import Answering, How, Message

HELP = """\
/threshold 0.9      confidence from which tokens are revealed; lower is faster
/temperature 0.7    0 takes the likeliest tokens
/trace              shows each denoising step instead of the text, or the text again
/system TEXT        what the assistant is told before the conversation; begins a new one
/clear              begins a new conversation
/help   /quit       Ctrl-C stops an answer, and at the prompt ends as /quit does
"""


class Conversation:
    """A conversation and what its commands have changed.

    Args:
        answering: who answers.
        how: what holds until a command changes it.
    """

    def __init__(self, answering: Answering, how: How, console: Console) -> None:
        self._answering, self._console, self.how = answering, console, how
        self.messages: list[Message] = []
        self._turn = 0

    def take(self, line: str) -> bool:
        """Obeys a command, or answers a line. Returns False where the conversation is to end."""
        line = line.strip()
        if not line:
            return True
        try:
            if line.startswith("/"):
                name, _, value = line[1:].partition(" ")
                return self._obey(name, value.strip())
            self._answer(line)
        except OpdlmError as error:
            self._console.print(f"opdlm: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return True

    def _obey(self, name: str, value: str) -> bool:
        if name == "threshold":
            self.how = replace(self.how, threshold=_number(name, value, 0.0, 1.0))
        elif name == "temperature":
            self.how = replace(self.how, temperature=_number(name, value, 0.0, 100.0))
        elif name == "trace":
            if not self._answering.has_trace:
                raise OpdlmError("/trace: only a student in this process shows its denoising steps")
            self.how = replace(self.how, trace=not self.how.trace)
            self._console.print(f"trace {'on' if self.how.trace else 'off'}", style="dim")
        elif name in ("clear", "system"):
            self.messages = [{"role": "system", "content": value}] if name == "system" and value else []
        elif name == "help":
            self._console.print(HELP, highlight=False, markup=False, end="")
        elif name in ("quit", "exit"):
            return False
        else:
            raise OpdlmError(f"/{name}: unknown; /help lists what there is")
        return True

    def _answer(self, line: str) -> None:
        """Asks for an answer and keeps it. Where it is stopped, what has come of it is kept."""
        if fault := text_fault(line):
            raise OpdlmError(f"the message holds {fault}; correct the text")
        messages = [*self.messages, {"role": "user", "content": line}]
        how, shown = replace(self.how, seed=as_int64(sample_seed(self.how.seed, self._turn))), Text()
        started = time.perf_counter()
        # A trace prints lines of its own, between which a live view would be drawn again and again.
        with Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="visible") as live:

            def show(text: Text) -> None:
                nonlocal shown
                shown = text
                live.update(text, refresh=self._console.is_terminal)

            try:
                answer = self._answering.answer(messages, how, show)
            except KeyboardInterrupt:
                answer = None
        text = shown.plain if answer is None else answer.text
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        if answer is None:
            self._console.print("(stopped)", style="dim")
        else:
            seconds = time.perf_counter() - started
            per_step = answer.tokens / max(answer.denoising_steps, 1)
            figures = f"{answer.tokens} tokens, {per_step:.2f} per step, {answer.tokens / seconds:.0f} per second"
            self._console.print(figures, style="dim", highlight=False)
        self._turn += 1
        self.messages = [*messages, {"role": "assistant", "content": text}]


def run_chat(conversation: Conversation, read: Callable[[str], str], console: Console) -> None:
    """Reads lines until /quit, the end of the input, or Ctrl-C at the prompt.

    Args:
        read: shows a prompt, and returns a line.
    """
    console.print("/help lists the commands; Ctrl-C stops an answer, /quit ends", style="dim", highlight=False)
    while True:
        try:
            line = read("> ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not conversation.take(line):
            return


def _number(name: str, value: str, least: float, most: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise OpdlmError(f"/{name}: found {value!r}; expected a number of {least:g} to {most:g}")
    return number
