"""The requests of the API: what OpenAI's clients send, and `threshold` and `strategy` beside it."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opdlm.deploy.serve.errors import ApiError

MOST_CHOICES = 128
_LARGEST_SEED = 2**63 - 1


class GenerationRequest(BaseModel):
    """Fields that both kinds of requests have. Unknown fields are refused: none is ignored in silence."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    """Name of the model, as `/v1/models` lists it."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest response in tokens. None: the server's default."""
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    """0 takes the likeliest token. None: the server's."""
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    """Probability mass that tokens are drawn from. None: the server's."""
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    """Number of responses to each prompt."""
    seed: int | None = Field(None, ge=-_LARGEST_SEED - 1, le=_LARGEST_SEED)
    """Same seed, same request, same weights: same response. None: a random seed."""
    stop: str | list[str] | None = None
    """Up to four texts that end a response; they are not part of it."""
    stream: bool = False
    """Send each block as it is finished, as server-sent events."""
    stream_options: dict[str, bool] | None = None
    """`include_usage`: a last event has the usage."""
    user: str | None = None
    """Not used."""
    threshold: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    """Confidence from which a dynamic strategy reveals a token. None: the server's."""
    strategy: str | None = None
    """The remasking strategy; only the server's own is possible."""
    steps: bool = False
    """Send each denoising step as it is made, in events of its own between those that have text. With `stream` only."""

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with an event that has the usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    @model_validator(mode="after")
    def _stops_are_usable(self) -> GenerationRequest:
        if len(self.stops) > 4 or not all(self.stops):
            raise ValueError(f"stop: found {self.stops}; expected up to 4 texts that are not empty")
        if unknown := set(self.stream_options or {}) - {"include_usage"}:
            raise ValueError(f"stream_options: found {sorted(unknown)}; expected include_usage")
        if self.steps and not self.stream:
            raise ValueError("steps: found true without stream; only a stream has denoising steps")
        return self


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    """A text, texts, token ids, or lists of token ids."""
    logprobs: int | None = Field(None, ge=0, le=1)
    """0 or 1: each token's log-probability at its reveal. More alternatives are not kept."""
    echo: bool = False
    """Put the prompt in front of each response."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response has log-probabilities."""
        return self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt an entry."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    """Chat messages (`role`, `content`)."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """Newer name of `max_tokens`."""
    logprobs: bool = False
    """Each token's log-probability at its reveal."""
    top_logprobs: int | None = Field(None, ge=0, le=0)
    """Alternatives are not kept: 0 only."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response has log-probabilities."""
        return self.logprobs


Request = TypeVar("Request", CompletionRequest, ChatRequest)


def read_request(kind: type[Request], body: bytes) -> Request:
    """Reads the body of a request.

    Raises:
        ApiError: 400, it is no JSON or has a field that is unknown, missing or wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.islower()) or None
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{place}: {message}" if place else message, "invalid_request", place) from None
