"""One thread that alone uses a model: it runs jobs, and steps of its own while no job waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


class EngineThread:
    """Jobs come from any thread, run one at a time in the order in which they came, and come before steps.

    Args:
        changed: held and notified by whoever changes what the functions below look at.
        has_step: whether there is a step to run.
        step: runs one; it must not raise.
        jobs_wait: whether jobs must wait for further steps.
    """

    def __init__(
        self,
        changed: threading.Condition,
        has_step: Callable[[], bool],
        step: Callable[[], None],
        jobs_wait: Callable[[], bool],
    ) -> None:
        self._changed, self._has_step, self._step, self._jobs_wait = changed, has_step, step, jobs_wait
        self._jobs: deque[Callable[[], None]] = deque()
        self.in_job = False
        """Whether a job is running."""
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def run(self, job: Callable[[], Result]) -> Result:
        """Waits until the job has run; returns its result or raises what it raised."""
        future: Future[Result] = Future()

        def settle() -> None:
            try:
                result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._changed:
            self._jobs.append(settle)
            self._changed.notify_all()
        return future.result()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._has_step())
                job = self._jobs.popleft() if self._jobs and not self._jobs_wait() else None
                self.in_job = job is not None
            if job is None:
                self._step()
                continue
            job()
            with self._changed:
                self.in_job = False
                self._changed.notify_all()
