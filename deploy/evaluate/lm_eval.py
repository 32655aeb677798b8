"""`opdlm eval --lm-eval` runs tasks of lm-eval; `opdlm lm-eval` is lm-eval's own command, with our model registered."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from opdlm.common.errors import OpdlmError, first_line
from opdlm.common.model.facts import read_facts
from opdlm.deploy.evaluate.commands import EvalOptions, check_output, open_decoder, write_results
from opdlm.deploy.evaluate.options import DecodingOptions
from opdlm.deploy.observe.tables import decoding_name, new_table

_TASK_COLUMNS = 20
"""Least width of a task's name, which may take several lines."""


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """The options of lm-eval that `opdlm eval` passes on."""

    tasks: list[str]
    include_path: Path | None
    limit: float | None
    """Documents of each task; below 1 a share of them."""
    fewshot: int | None
    chat: bool
    thinking: bool | None
    likelihood: Literal["bound"] | None = None
    """`bound`: a lower bound stands for a student's likelihoods."""
    likelihood_samples: int | None = None
    """Samples of each bound. None: as `OpdlmLM` has it."""


def known_likelihood(name: str | None) -> Literal["bound"] | None:
    """The value of --likelihood; raises `OpdlmError` for an unknown one."""
    if name not in (None, "bound"):
        raise OpdlmError(f"--likelihood: found {name!r}; known: bound")
    return None if name is None else "bound"


def require_lm_eval() -> Any:
    """The package lm_eval; an `OpdlmError` names the extra where it is missing."""
    try:
        import lm_eval
    except ImportError:
        raise OpdlmError("lm-eval is not installed: pip install 'opdlm-ray[eval]'") from None
    return lm_eval


def run_harness(
    folder: Path, harness: HarnessOptions, options: EvalOptions, decoding: DecodingOptions, console: Console
) -> None:
    """Loads the tasks, decodes them with each strategy, prints lm-eval's tables, writes the results."""
    lm_eval = require_lm_eval()
    if harness.likelihood is None and harness.likelihood_samples is not None:
        raise OpdlmError(f"--likelihood-samples: found {harness.likelihood_samples} without --likelihood bound")
    check_output(options.output)
    manager, tasks = load_tasks(harness, folder)
    from lm_eval.utils import handle_non_serializable

    from opdlm.deploy.evaluate.lm_eval_model import BOUND_SAMPLES, OpdlmLM

    written: dict[str, Any] = {}
    with open_decoder(folder, decoding, options.block_size) as decoder:
        strategies = options.strategies or decoder.facts.usual_strategies[-1:]
        for strategy in strategies if decoder.is_student else strategies[:1]:
            model = OpdlmLM(
                decoder,
                strategy,
                options.threshold,
                batch_size=decoding.batch_size,
                max_new_tokens=decoding.max_new_tokens,
                enable_thinking=harness.thinking,
                likelihood=harness.likelihood,
                likelihood_samples=harness.likelihood_samples or BOUND_SAMPLES,
            )
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=manager,  # else it reads thousands of task files again
                num_fewshot=harness.fewshot,
                limit=harness.limit,
                apply_chat_template=harness.chat,
                fewshot_as_multiturn=harness.chat,
                log_samples=options.output is not None,
            )
            how = model.get_model_info()
            for table in result_tables(results):
                console.print(table, "")
            for line in _how_lines(how):
                console.print(line, highlight=False, soft_wrap=True)
            written[how["decoding"]] = results
    if options.output:
        write_results(options.output, written, console, handle_non_serializable)


def _how_lines(how: dict[str, Any]) -> list[str]:
    """The speed of decoding, and what the likelihoods are."""
    lines = []
    if how["tokens_per_step"] is not None:
        figures = f"{how['tokens_per_step']:.2f} tokens per denoising step, {how['tokens_per_second']:,.0f} per second"
        lines.append(f"{decoding_name(how['decoding'], how.get('threshold'))}: {figures}")
    if "likelihood" in how:
        error = f"{how['likelihood_samples']} samples each, mean standard error {how['likelihood_stderr']:.3f} nats"
        lines.append(f"in place of likelihoods: a lower bound ({error})")
    return lines


def result_tables(results: dict[str, Any]) -> list[Table]:
    """lm-eval's results, and those of its groups of tasks, as tables of 80 columns. Its own are wider."""
    tables = []
    for key, first in (("results", "task"), ("groups", "group of tasks")):
        table = new_table(f"lm-eval, by {first}", first, "metric", "value", "stderr", "shots")
        table.columns[0].min_width = _TASK_COLUMNS
        table.columns[1].no_wrap, table.columns[1].overflow, table.columns[1].justify = False, "fold", "left"
        for task, figures in (results.get(key) or {}).items():
            name, shots = str(figures.get("alias", task)).lstrip(" -"), results.get("n-shot", {}).get(task, "")
            for figure, value in figures.items():
                metric, comma, filtered = figure.partition(",")  # other entries are the task's name and its sizes
                if comma and not metric.endswith("_stderr"):
                    spread = figures.get(f"{metric}_stderr,{filtered}", "")
                    shown = metric if filtered == "none" else f"{metric}, {filtered}"
                    table.add_row(name, shown, _figure(value), _figure(spread), str(shots))
        if table.row_count:
            tables.append(table)
    return tables


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def load_tasks(harness: HarnessOptions, folder: Path) -> tuple[Any, list[Any]]:
    """lm-eval's task manager and task objects. Nothing is decoded before every task is known to be answered.

    Raises:
        OpdlmError: a task is unknown, its data cannot be loaded, it runs code, or it asks for likelihoods that are not
            given.
    """
    from lm_eval.tasks import TaskManager

    from opdlm.deploy.evaluate.lm_eval_likelihood import WITH_BOUND, check_likelihood

    if harness.include_path is not None and not harness.include_path.is_dir():
        raise OpdlmError(f"--include-path: {harness.include_path} is no folder; expected one with task YAMLs")
    manager = TaskManager(include_path=str(harness.include_path) if harness.include_path else None)
    tasks, facts = list[Any](), read_facts(folder)
    for name in harness.tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "lm-eval ls tasks lists them; --include-path adds yours"
            raise OpdlmError(f"--lm-eval: unknown task {name!r}; {hint}")
        try:
            loaded = manager.load([name])
        except (OSError, ValueError) as error:  # the data: no network, no such file, another format
            reason = first_line(error)
            raise OpdlmError(f"--lm-eval: the data of task {name!r} cannot be loaded: {reason}") from error
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise OpdlmError(
                    f"--lm-eval: task {task.task_name!r} runs the code that the model writes; where that may run: "
                    f"HF_ALLOW_CODE_EVAL=1 opdlm lm-eval run --model opdlm --tasks {task.task_name} "
                    f"--model_args pretrained={folder} --confirm_run_unsafe_code"
                )
            try:
                check_likelihood(task.OUTPUT_TYPE, facts, harness.likelihood, WITH_BOUND)
            except OpdlmError as error:
                raise OpdlmError(f"--lm-eval: task {task.task_name!r}: {error}") from None
        tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return manager, tasks


def pass_through(arguments: list[str]) -> None:
    """Runs lm-eval's command line, with `--model opdlm` registered."""
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import opdlm.deploy.evaluate.lm_eval_model  # noqa: F401  registers the model

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
