"""What `opdlm train` prints at its start and end, and the records and the view that are open in between."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from opdlm.actors.pool import ActorPool
from opdlm.common.checkpoint import Checkpoint, list_checkpoints
from opdlm.common.config import OpdlmConfig
from opdlm.common.curriculum import unused_domain_limits
from opdlm.common.data.prompts import PromptSet
from opdlm.common.data.tasks import get_task, problems
from opdlm.common.model.facts import count_parameters
from opdlm.deploy.observe.outlook import Outlook
from opdlm.deploy.observe.records import RunRecords, read_records
from opdlm.deploy.observe.report import kept_best, write_report
from opdlm.deploy.observe.terminal import View
from opdlm.deploy.observe.writers import WandbWriter

_REFUSED_SHOWN = 10


def show_data(config: OpdlmConfig, prompts: PromptSet, console: Console) -> None:
    """Names the first prompts that the run leaves out and counts all of them; tells of what the data do not match:
    characters that the tokenizer does not know, and limits for domains that no row has."""
    for line in prompts.refused[:_REFUSED_SHOWN]:
        console.print(f"refused prompt {line}", highlight=False, soft_wrap=True, markup=False)
    if prompts.refused:
        console.print(f"prompts refused: {len(prompts.refused)}, kept: {len(prompts.prompts)}")
    unused = unused_domain_limits(config, {prompt.domain for prompt in prompts.prompts})
    for told in (prompts.unknown, unused):
        if told is not None:
            console.print(told, highlight=False, soft_wrap=True, markup=False)


def show_notes(notes: Sequence[str], console: Console) -> None:
    """Prints what the checks found that the user should know."""
    for line in notes:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_start(config: OpdlmConfig, checkpoint: Checkpoint | None, rounds: int, console: Console) -> None:
    """Says where a resumed run goes on, and what a replay does without."""
    if config.run.replay is not None:
        console.print("replay: no rollout and no teacher actors, so no evaluation", highlight=False)
    if checkpoint:
        where = f"{checkpoint.folder} (round {checkpoint.rounds} of {rounds})"
        console.print(f"resuming from {where}", highlight=False, soft_wrap=True)


@contextmanager
def open_records(
    config: OpdlmConfig, student: str, checkpoint: Checkpoint | None, pools: list[ActorPool], view: View, rounds: int
) -> Iterator[RunRecords]:
    """The records of a run, which the pools tell of calls and deaths; they are closed when the block ends.

    Args:
        student: folder of the student's first weights.
        checkpoint: where a resumed run goes on.
        rounds: of the run.
    """
    first_round = checkpoint.rounds if checkpoint else 0
    first_step = int(checkpoint.state["optimizer_steps"]) if checkpoint else 0
    parameters = count_parameters(student), count_parameters(config.model.teacher)
    wandb = [WandbWriter(config)] if config.run.wandb_project is not None else []
    outlook = Outlook(config, rounds, read_records(Path(config.run.dir)))
    records = RunRecords(Path(config.run.dir), view, first_round, first_step, parameters, wandb)
    records.outlook = outlook
    for pool in pools:
        pool.on_death, pool.on_answer = records.actor_died, records.called
    try:
        yield records
    finally:
        records.close()


def show_end(
    config: OpdlmConfig,
    samples: tuple[int, int],
    stopped: bool,
    console: Console,
    time_over: bool = False,
    early_stop: str | None = None,
) -> None:
    """Writes and shows the report; says what the run has written, how to try it, and how a stopped one goes on.

    Args:
        samples: in a round and in the run.
        time_over: it is stopped because its time is over (`run.max_minutes`).
        early_stop: why training ended early, if it did.
    """
    run_dir = Path(config.run.dir)
    if stopped and not any(record["kind"] == "round" for record in read_records(run_dir)):
        console.print("stopped before the first round; --resume starts it", highlight=False)
        return
    console.print(write_report(run_dir, samples))
    written = "report.json, report.png, metrics.jsonl, timeline.json, tensorboard/" + ("" if stopped else ", student/")
    console.print(f"written: {run_dir}/{written}", highlight=False, soft_wrap=True)
    for line in _outcome(run_dir, samples, early_stop):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if time_over:
        console.print(_next_part(config, samples), highlight=False, markup=False, soft_wrap=True)
    elif stopped:
        saved = "with a checkpoint" if list_checkpoints(run_dir / "checkpoints") else "before any checkpoint"
        console.print(f"stopped {saved}; go on with --resume")
    else:
        console.print(f"try it: {_trial(config)}", highlight=False, markup=False, soft_wrap=True)


def _outcome(run_dir: Path, samples: tuple[int, int], early_stop: str | None) -> Iterator[str]:
    """Whether training ended early, and which student was the best."""
    records = read_records(run_dir)
    trained, rounds = _rounds(records, samples)
    if early_stop is not None and trained < rounds:
        yield f"training ended early, after round {trained} of {rounds}: {early_stop}"
    if best := kept_best(run_dir, records):
        yield f"best student: round {best['round']}, {best['figure']} {best['value']:.4g}: {best['folder']}"


def _next_part(config: OpdlmConfig, samples: tuple[int, int]) -> str:
    """How a run goes on whose time is over."""
    run_dir, minutes = config.run.dir, f"{config.run.max_minutes:g}"
    trained, rounds = _rounds(read_records(Path(run_dir)), samples)
    command = shlex.join(["opdlm", "train", f"{run_dir}/config.yaml", "--resume", "--minutes", minutes])
    return f"stopped after round {trained} of {rounds}, its {minutes} minutes are over; go on with: {command}"


def _rounds(records: Iterable[Mapping[str, Any]], samples: tuple[int, int]) -> tuple[int, int]:
    """Rounds trained, and rounds of the run. `samples`: in a round and in the run."""
    return max((r["round"] for r in records if r["kind"] == "round"), default=0), -(-samples[1] // samples[0])


def _trial(config: OpdlmConfig) -> str:
    """A command that decodes with the trained student."""
    task = next(problems(get_task(config.data.task), "test", 0)).prompt if config.data.task else "your prompt"
    chat = ["--chat"] if config.data.chat_template else []
    return shlex.join(["opdlm", "generate", f"{config.run.dir}/student", "--prompt", task, *chat])
