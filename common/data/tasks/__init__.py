"""Built-in tasks: seeded problems with known answers, for demos, tests and benchmarks.

`TASKS` holds every task by its name, `get_task` returns one of them or a mixture, and `problems` yields the problems of
a task from its training or its test split.
"""

from opdlm.common.data.tasks.base import MixedTask, Problem, Split, Task, problems, split_of
from opdlm.common.data.tasks.chain import ChainTask
from opdlm.common.data.tasks.rerank import RerankTask
from opdlm.common.data.tasks.skills import ChainSkill, DigitsSkill, skills
from opdlm.common.errors import ConfigError

TASKS: dict[str, Task] = {task.name: task for task in [ChainTask(), RerankTask(), *skills()]}


def get_task(name: str) -> Task:
    """Returns the task of this name, or a mixture in equal shares for several names joined by `+` (`add+sort`).

    Raises:
        ConfigError: no task has this name.
    """
    for part in name.split("+"):
        if part not in TASKS:
            raise ConfigError(
                f"task: found {part!r}; known tasks: {', '.join(sorted(TASKS))} (join several with `+`: add+sort)"
            )
    parts = [TASKS[part] for part in name.split("+")]
    return parts[0] if len(parts) == 1 else MixedTask(parts)


__all__ = [
    "TASKS",
    "ChainSkill",
    "ChainTask",
    "DigitsSkill",
    "MixedTask",
    "Problem",
    "RerankTask",
    "Split",
    "Task",
    "get_task",
    "problems",
    "skills",
    "split_of",
]
