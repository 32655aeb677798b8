"""Built-in tasks: problems with known answers, for demos, tests and benchmarks. Pure Python."""

from opdlm.common.data.tasks.base import MixedTask, Problem, Split, Task, problems
from opdlm.common.data.tasks.chain import ChainTask
from opdlm.common.data.tasks.skills import skills
from opdlm.common.errors import ConfigError

TASKS: dict[str, Task] = {task.name: task for task in [ChainTask(), *skills()]}


def get_task(name: str) -> Task:
    """The task of that name, or a uniform mixture of several: `add+sort`; or a clear error."""
    for part in name.split("+"):
        if part not in TASKS:
            raise ConfigError(
                f"task: found {part!r}; known tasks: {', '.join(sorted(TASKS))} (several: joined with `+`, as add+sort)"
            )
    parts = [TASKS[part] for part in name.split("+")]
    return parts[0] if len(parts) == 1 else MixedTask(parts)


__all__ = ["TASKS", "MixedTask", "Problem", "Split", "Task", "get_task", "problems"]
