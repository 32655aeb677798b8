"""The functions of `import opdlm`: the commands of the command line, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from opdlm.common.config import OpdlmConfig
    from opdlm.common.config.schema import Strategy
    from opdlm.common.data.answers import AnswerKind
    from opdlm.common.export.names import LayoutName
    from opdlm.deploy.evaluate.generation import Model
    from opdlm.deploy.evaluate.options import LoadDtype


def load(folder: str | Path, device: str | None = None) -> Model:
    """Loads a checkpoint folder or hub id: a student, or an autoregressive model.

    Args:
        device: by default the GPU if torch sees one, else the CPU.

    Raises:
        OpdlmError: the folder cannot be used.
    """
    from opdlm.deploy.evaluate.generation import Model

    return Model(_model(folder, "folder"), device=device)


def convert(
    source: str | Path,
    destination: str | Path,
    block_size: int = 4,
    block_grid: Literal["absolute", "response"] = "absolute",
    mask_token: str | None = None,
    logit_shift: bool | None = None,
    context: Literal["block_causal", "causal"] | None = None,
) -> int:
    """Makes a student of an autoregressive checkpoint; returns its mask token id. See `opdlm convert`.

    Raises:
        OpdlmError: the source or the mask token cannot be used, or the destination exists.
    """
    from opdlm.common.model.convert import convert_checkpoint

    return convert_checkpoint(
        _model(source, "source"), _path(destination), block_size, block_grid, mask_token, logit_shift, context
    )


def export(
    checkpoint: str | Path, destination: str | Path, layout: LayoutName, base_model: str | None = None
) -> list[str]:
    """Writes a student in a layout that other programs load; returns warnings. See `opdlm export`.

    Raises:
        OpdlmError: the checkpoint has no such layout, or the destination exists.
    """
    from opdlm.common.export import export as write_export

    return write_export(_model(checkpoint, "checkpoint"), _path(destination), layout, base_model)


def evaluate(
    folder: str | Path,
    task: str | None = None,
    data: str | Path | None = None,
    *,
    prompt_field: str = "prompt",
    answer_field: str | None = None,
    answer: AnswerKind | None = None,
    problems: int | None = None,
    chat: bool = False,
    thinking: bool | None = None,
    strategies: Sequence[Strategy] = (),
    threshold: float = 0.9,
    block_size: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 128,
    actors: int = 0,
    gpus_per_actor: float = 0.0,
    teacher: str | Path | None = None,
    dtype: LoadDtype = "auto",
) -> list[dict[str, Any]]:
    """Answers questions of a built-in task or a file, and marks the answers, as `opdlm eval` does.

    Args:
        strategies: empty: static and dynamic; for a lossless student `verified`.

    Returns: a row per strategy: `decoding`, `right` (share), `unanswered`, `tokens_per_step`, `tokens_per_second`,
        `by_kind`. With a `teacher` its row comes first, and the others say how close to it they are.

    Raises:
        OpdlmError: the folder or the questions cannot be used.
    """
    from opdlm.deploy.evaluate import commands
    from opdlm.deploy.evaluate.options import DecodingOptions, QuestionOptions

    file = None if data is None else _path(data)
    asked = QuestionOptions(task, file, prompt_field, answer_field, answer, problems, chat, thinking)
    beside = None if teacher is None else _model(teacher, "teacher")
    options = commands.EvalOptions(commands.known_strategies(strategies), threshold, block_size, teacher=beside)
    decoding = DecodingOptions(max_new_tokens, batch_size, actors, gpus_per_actor, dtype)
    with commands.open_evaluation(_model(folder, "folder"), asked, options, decoding) as evaluation:
        return evaluation.rows()


def train(config: OpdlmConfig, resume: bool = False) -> int:
    """Runs `opdlm train` in this process, which joins or starts Ray.

    Returns 0, also where its time is over (`run.max_minutes`), or 128 + signal after a stop.

    Args:
        config: as from `opdlm.load_config("run.yaml", ["run.dir=runs/mine"])`.

    Raises:
        OpdlmError: a setting, a file or the cluster cannot be used.
    """
    from rich.console import Console

    from opdlm.deploy.run.train import train as run_training

    return run_training(config, resume, Console())


def _model(given: str | Path, argument: str) -> Path:
    from opdlm.common.model.hub import model_folder

    return model_folder(given, argument)


def _path(given: str | Path) -> Path:
    from opdlm.common.files import home_path

    return Path(home_path(str(given)))
