"""The page at a server's root: a prompt, and its response as it is unmasked. One file that loads nothing from outside.

It holds no key and no text of anybody, so it needs no key itself; what it asks for over the API does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from transformers import PreTrainedTokenizerBase

from opdlm.common.model.facts import ModelFacts
from opdlm.deploy.pages.build import build_page
from opdlm.deploy.serve.options import ServeOptions

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@cache
def live_page() -> str:
    """The page's HTML."""
    return build_page("opdlm.deploy.serve", "live")


async def show_page(request: Request) -> Response:
    """Answers `GET /`."""
    return HTMLResponse(live_page(), headers=_HEADERS)


def described(options: ServeOptions, facts: ModelFacts, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `/v1/models` says of a model beside OpenAI's fields: how it decodes, and what requests get by default."""
    about = {
        "chat": bool(tokenizer.chat_template),
        "strategy": options.strategy if facts.is_student else "autoregressive",
        "block_size": facts.grid(options.block_size).block_size if facts.is_student else None,
        "threshold": options.threshold,
        "temperature": options.temperature,
        "max_tokens": options.max_new_tokens,
    }
    return {"opdlm": about}
