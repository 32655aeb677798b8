"""A dead engine inside a living actor ends its process, so that Ray starts a new one. Imports no ray.

A process whose engine broke (a CUDA error that stays, a vLLM engine that ended) would answer every later call with the
same error. So when a call fails and it is not the caller's mistake, the engine is asked for one token. If that fails
too, the process ends; Ray restarts the actor (`max_restarts`) and repeats the call. If it answers (out of memory once,
say), the error goes to the caller, who tries again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from opdlm.common.errors import OpdlmError
from opdlm.common.model.load import hidden_states, input_device

log = logging.getLogger("opdlm.engine")

_CALLERS_MISTAKES = (OpdlmError, ValueError)


@contextmanager
def guarded(engine: str, probe: Callable[[], None]) -> Iterator[None]:
    """Around a call of an engine.

    Args:
        engine: what it is, for the log.
        probe: has the engine make one token; raises if it cannot.
    """
    try:
        yield
    except _CALLERS_MISTAKES:
        raise
    except Exception as error:
        try:
            probe()
        except Exception:
            log.critical("the %s's engine is dead, so its process ends; first error: %r", engine, error, exc_info=True)
            os._exit(1)  # not `ray.actor.exit_actor`: an actor that leaves by itself is not restarted
        raise


@torch.inference_mode()
def one_token_forward(model: Any) -> None:
    """One token through a causal LM of transformers, back to the host: CUDA tells of its errors only then."""
    hidden = hidden_states(model, torch.zeros(1, 1, dtype=torch.int64, device=input_device(model)))
    model.lm_head(hidden).cpu()
