"""Built-in tasks: problems with known answers, for demos, tests and benchmarks. Pure Python."""

from common.errors import ConfigError
from common.tasks.base import Problem, Split, Task, problems
from common.tasks.chain import ChainTask

TASKS: dict[str, type[Task]] = {"chain": ChainTask}


def get_task(name: str) -> Task:
    """The task of that name, or a clear error."""
    if name not in TASKS:
        raise ConfigError(f"data.task: found {name!r}; known tasks: {', '.join(sorted(TASKS))}")
    return TASKS[name]()


__all__ = ["TASKS", "Problem", "Split", "Task", "get_task", "problems"]
