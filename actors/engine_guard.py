"""Ends the process of an actor whose engine is dead, so that Ray starts a new one. Imports no ray.

A process whose engine broke (a CUDA error that persists, a vLLM engine that has ended) would answer every later call
with the same error. So when a call fails and the caller did not cause it, the engine is asked for one token. If that
fails too, the process ends; Ray restarts the actor (`max_restarts`) and the pool repeats the call. If the engine
answers (it had run out of memory once, say), the caller gets the error and tries again.
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

_CALLER_ERRORS = (OpdlmError, ValueError)


@contextmanager
def guarded(engine: str, probe: Callable[[], None]) -> Iterator[None]:
    """A context for a call of an engine: if the call fails and the engine is dead, ends the process.

    Args:
        engine: name of the engine, for the log.
        probe: has the engine make one token; raises if the engine cannot.
    """
    try:
        yield
    except _CALLER_ERRORS:
        raise
    except Exception as error:
        try:
            probe()
        except Exception:
            log.critical("the %s's engine is dead, so its process ends; first error: %r", engine, error, exc_info=True)
            os._exit(1)  # not `ray.actor.exit_actor`: Ray does not restart an actor that exits that way
        raise


@torch.inference_mode()
def one_token_forward(model: Any) -> None:
    """Runs one token through a causal LM of transformers and copies the logits to the host, where CUDA errors show."""
    hidden = hidden_states(model, torch.zeros(1, 1, dtype=torch.int64, device=input_device(model)))
    model.lm_head(hidden).cpu()
