"""A fixture for tests in virtual time (`tests/fakes/simulated_run.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def learner_as_a_coroutine() -> Iterator[None]:
    """Runs the learner without a thread and without an object store, so that only simulated time passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opdlm.actors.queue.actor.ray.put", lambda pack: pack)
        patch.setattr("opdlm.deploy.run.ending.in_daemon_thread", lambda fit: asyncio.ensure_future(fit()))
        yield
