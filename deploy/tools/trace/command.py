"""`opdlm trace`: decodes a few prompts with a run's student and writes an HTML page of what each denoising step did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.scoring import score
from opdlm.common.checkpoint import latest_checkpoint
from opdlm.common.config import OpdlmConfig, load_config
from opdlm.common.config.schema import Strategy
from opdlm.common.data.chat import ChatRefused, ChatTemplate
from opdlm.common.data.prompts import load_prompts
from opdlm.common.data.tasks import get_task
from opdlm.common.data.unknown import UnknownCharacters
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.files import write_text
from opdlm.common.model.facts import check_vocabularies, read_facts, require_mask, shared_tokens
from opdlm.common.model.load import load_model
from opdlm.common.seeds import sample_seed
from opdlm.common.text import text_fault
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import HiddenTargets, RolloutRequest, Trajectory
from opdlm.deploy.evaluate.commands import check_output
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from opdlm.deploy.run.saved_student import put_checkpoint
from opdlm.deploy.tools.trace.drafts import DraftRecorder
from opdlm.deploy.tools.trace.page import render_page
from opdlm.deploy.tools.trace.record import Recorder, block_records, mean_kl

_SLOTS = 8
_SAMPLES = 3
"""Prompts from the run's task or data where none is given."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """The options of the command line. None: the run's own setting.

    The strategy is not the run's, but the one that is usual for the student: rollouts of `low_confidence_static` would
    not show how a finished student decodes.
    """

    student: Path | None
    prompts: list[str]
    samples: int | None
    strategy: Strategy | None
    threshold: float | None
    temperature: float | None
    max_new_tokens: int | None
    top: int
    out: Path | None


def run_trace(run: Path, options: TraceOptions, console: Console) -> None:
    """Decodes and scores the prompts, decodes them again with a `Recorder`, and writes the page.

    Raises:
        OpdlmError: a folder that holds no run or no student, a prompt that does not fit, or an unusable `--out`.
    """
    config = _run_config(run)
    page = options.out or run / "trace.html"
    check_output(page, "--out")
    student, student_name = _student(run, config, options.student)
    teacher_facts = read_facts(config.model.teacher)
    check_vocabularies(teacher_facts, student.facts)
    settings = _settings(config, student, options)
    requests = _requests(config, student, settings.block_size, options, console)
    with console.status("decoding ..."):
        teacher = load_model(config.model.teacher, config.teacher.dtype).to(student.model.device)
        tokens = shared_tokens(teacher_facts, student.facts)
        record = trace(student, teacher, tokens, requests, settings, options.top, config.teacher.batch_tokens)
    shown = ("strategy", "threshold", "temperature", "block_size", "block_grid")
    record |= {
        "run": str(run),
        "student": student_name,
        "teacher": str(config.model.teacher),
        "settings": {name: getattr(settings, name) for name in shown},
    }
    write_text(page, render_page(record, f"opdlm trace: {run.resolve().name}"))
    size = page.stat().st_size
    console.print(
        f"{page}: {len(requests)} trajectories, {size / 1e3:,.0f} kB; open it in a browser",
        highlight=False,
        soft_wrap=True,
    )


def trace(
    student: CheckpointDecoder,
    teacher: Any,
    tokens: TokenIds,
    requests: Sequence[RolloutRequest],
    settings: DecodeSettings,
    top: int,
    batch_tokens: int,
) -> dict[str, Any]:
    """What the page shows, as data for JSON: `tokens` (text by id) and `trajectories` (see `_entry`).

    Args:
        tokens: the tokens that teacher and student share.

    Raises:
        OpdlmError: decoding a prompt a second time gave another response.
    """
    mask_id = require_mask(student.facts)
    slots = min(_SLOTS, len(requests))
    facts = student.facts
    decoder = BlockDecoder(student.model, settings, mask_id, facts.eos_ids, slots, tokens=facts.tokens, form=facts.form)
    trajectories, _ = decoder.decode(requests)
    targets = [t for t in score(teacher, trajectories, "hidden", 0, batch_tokens) if isinstance(t, HiddenTargets)]
    kind = DraftRecorder if settings.strategy == "verified" else Recorder
    recorder = kind(trajectories, targets, teacher.lm_head, mask_id, tokens, top)
    again, _ = decoder.decode(requests, observer=recorder)
    for one, other in zip(trajectories, again, strict=True):
        if not np.array_equal(one.response_ids, other.response_ids):
            raise OpdlmError(
                f"{one.prompt_id}: decoding it twice gave two responses; the device's kernels do not repeat"
            )
    entries = [_entry(student, t, recorder) for t in trajectories]
    return {"tokens": _texts(student, entries), "trajectories": entries}


def _entry(student: CheckpointDecoder, trajectory: Trajectory, recorder: Recorder) -> dict[str, Any]:
    """One trajectory: texts, ids, reveal steps, the teacher's top tokens at each response position, blocks, totals."""
    tokenizer, index = student.tokenizer, trajectory.index
    steps = recorder.steps[index]
    return {
        "name": trajectory.prompt_id,
        "prompt": tokenizer.decode(trajectory.prompt_ids),
        "response": student.text(trajectory.response),
        "prompt_ids": trajectory.prompt_ids.tolist(),
        "response_ids": trajectory.response_ids.tolist(),
        "response_length": trajectory.response_length,
        "reveal_step": trajectory.reveal_step.tolist(),
        "finish_reason": trajectory.finish_reason,
        "denoising_steps": trajectory.denoising_steps,
        "tokens_per_step": round(trajectory.response_length / trajectory.denoising_steps, 4),
        "mean_kl": mean_kl(steps),
        "teacher": recorder.teacher_tops[index],
        "blocks": block_records(trajectory, steps),
    }


def _texts(student: CheckpointDecoder, entries: Sequence[dict[str, Any]]) -> dict[int, str]:
    """The texts of all tokens on the page, by token id."""
    used: set[int] = set()
    for entry in entries:
        used.update(entry["prompt_ids"], entry["response_ids"], *(tops[::2] for tops in entry["teacher"]))
        masks = [mask for block in entry["blocks"] for step in block["steps"] for mask in step["at"]]
        used.update(*(mask[5][::2] for mask in masks), (mask[1] for mask in masks))
        used.update(wrong for mask in masks for wrong in mask[6:] if wrong is not None)
    return {token: student.tokenizer.decode([token]) for token in sorted(used)}


def _run_config(run: Path) -> OpdlmConfig:
    file = run / "config.yaml"
    if not file.is_file():
        raise OpdlmError(f"{run} is no run directory: it has no config.yaml (opdlm train makes one)")
    return load_config(file)


def _student(run: Path, config: OpdlmConfig, given: Path | None) -> tuple[CheckpointDecoder, str]:
    """The student and its folder: `given`, else the run's finished one, else its newest checkpoint, else its start."""
    if given is not None or (run / "student").is_dir():
        folder = given or run / "student"
        return CheckpointDecoder(folder), str(folder)
    made = run / "student_init"  # of the teacher, or of a given student that was to get adapters on noisy tokens
    start = made if made.is_dir() or not config.model.student else Path(config.model.student)
    if not start.is_dir():
        raise OpdlmError(f"{run} has neither student/ nor student_init/; train it, or give --student CKPT")
    student = CheckpointDecoder(start)
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        return student, str(start)
    put_checkpoint(student.model, config, checkpoint.folder)
    return student, str(checkpoint.folder)


def _settings(config: OpdlmConfig, student: CheckpointDecoder, options: TraceOptions) -> DecodeSettings:
    require_mask(student.facts)
    given = {name: getattr(options, name) for name in ("threshold", "temperature")}
    given["strategy"] = options.strategy or student.facts.usual_strategies[-1]
    return replace(
        DecodeSettings.from_config(config.rollout),
        block_size=student.facts.block_size or config.rollout.block_size,
        block_grid=student.facts.block_grid or config.rollout.block_grid,
        **{name: value for name, value in given.items() if value is not None},
    )


def _requests(
    config: OpdlmConfig, student: CheckpointDecoder, block_size: int, options: TraceOptions, console: Console
) -> list[RolloutRequest]:
    """The given prompts, then held-out problems of the run's task; without a task, the first prompts of its data."""
    limit = options.max_new_tokens or config.rollout.max_new_tokens
    longest = student.facts.context - limit - (block_size - 1)
    if longest < 1:
        raise ConfigError(
            f"--max-new-tokens: {limit} leaves no room for a prompt in the student's context of {student.facts.context}"
        )
    chosen = [(_name(prompt), _encode(prompt, config, student)) for prompt in options.prompts]
    unknown = UnknownCharacters(student.tokenizer)
    for prompt, (name, ids) in zip(options.prompts, chosen, strict=True):
        unknown.note(name, prompt, ids.tolist())
    count = (0 if options.prompts else _SAMPLES) if options.samples is None else options.samples
    if count and config.data.task:
        held_out = HeldOutProblems([get_task(config.data.task)], student.tokenizer, count)
        chosen += [(f"{config.data.task}/test/{i}", ids) for i, ids in enumerate(held_out.prompt_ids)]
    elif count:
        each = -(-count // max(len(config.data.sources), 1))
        first = config.data.model_copy(update={"prompts": each})
        found = load_prompts(first, student.tokenizer, longest, config.run.seed, student.facts.tokens)
        for line in found.refused:
            console.print(f"refused prompt {line}", highlight=False, markup=False)
        chosen += [(prompt.prompt_id, prompt.ids) for prompt in found.prompts[:count]]
        if found.unknown is not None:
            console.print(found.unknown, highlight=False, soft_wrap=True, markup=False)
    if (told := unknown.line()) is not None:
        console.print(told, highlight=False, soft_wrap=True, markup=False)
    for name, ids in chosen:
        if not 0 < len(ids) <= longest:
            raise OpdlmError(
                f"{name}: {len(ids)} tokens; expected 1 to {longest} (context {student.facts.context}, "
                f"--max-new-tokens {limit})"
            )
    return [
        RolloutRequest(i, name, ids, limit, seed=sample_seed(config.run.seed, i))
        for i, (name, ids) in enumerate(chosen)
    ]


def _encode(prompt: str, config: OpdlmConfig, student: CheckpointDecoder) -> np.ndarray:
    """Token ids of a prompt, through the chat template where the run uses one."""
    data = config.data
    if fault := text_fault(prompt):
        raise OpdlmError(f"{_name(prompt)} holds {fault}; give text in UTF-8")
    if not data.chat_template:
        return student.encode(prompt)
    try:
        ids = ChatTemplate(student.tokenizer, data.system_prompt, data.thinking).ids(prompt)
    except ChatRefused as error:
        raise OpdlmError(f"{_name(prompt)}: {error}") from None
    return np.array(ids, dtype=np.int32)


def _name(prompt: str) -> str:
    return f"--prompt {prompt[:30]!r}"
