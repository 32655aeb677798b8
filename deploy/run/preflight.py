"""Checks everything that can be known before an actor starts: models, tokenizer, prompts, settings. Writes nothing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from opdlm.common.config import OpdlmConfig
from opdlm.common.config.base import AnswerKind
from opdlm.common.data.answers import answer_check
from opdlm.common.data.prompts import Prompt, PromptOrder, PromptSet, load_prompts
from opdlm.common.data.reranking import RerankCase
from opdlm.common.data.tasks import get_task
from opdlm.common.errors import ConfigError
from opdlm.common.form import StudentForm
from opdlm.common.model.config import read_config
from opdlm.common.model.facts import ModelFacts, check_vocabularies, read_facts, require_mask
from opdlm.common.model.families import A2D_PREFIX
from opdlm.common.model.mask_token import check_mask_row, choose_mask
from opdlm.common.model.shards import check_finite, read_shards
from opdlm.common.model.tokenizer import check_tokenizers, load_tokenizer
from opdlm.common.rewards import make_reward
from opdlm.deploy.evaluate.best import check_best_figure
from opdlm.deploy.evaluate.exam import load_known
from opdlm.deploy.evaluate.known_answers import KnownAnswers
from opdlm.deploy.run.longest import LongRequest, check_cache, longest_question, longest_rollout
from opdlm.deploy.run.notes import end_token_notes, slow_bfloat16_notes
from opdlm.deploy.run.paths import check_job_paths
from opdlm.deploy.run.replay import check_replay
from opdlm.deploy.run.student_checks import check_attention, check_base, check_grid, check_noisy
from opdlm.learner.schedule import TrainingSchedule


@dataclass(frozen=True, slots=True)
class Preflight:
    """A config that passed the checks, and what they read."""

    config: OpdlmConfig
    teacher: ModelFacts
    student: ModelFacts
    """The given student; the teacher where the run converts one from it."""
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    order: PromptOrder
    schedule: TrainingSchedule
    notes: tuple[str, ...]
    """What the user should know before the run starts, a line each."""
    longest_question: LongRequest | None = None
    """The longest request of the run's evaluations; None where it has none."""
    questions: KnownAnswers | None = None
    """The questions of `evaluation.data`; None without them, and in a replay, which evaluates nothing."""

    @property
    def form(self) -> StudentForm:
        """The student's form."""
        return self.student.form if self.config.model.student else self.config.model.converted_form

    def samples_of_round(self, round_: int) -> dict[str, int]:
        """How many samples of a round (from 0) come from each of `data.sources`, as `samples_of_NAME`."""
        start = round_ * self.schedule.prompts_per_round
        indices = range(start, min(start + self.schedule.prompts_per_round, self.schedule.total))
        return {f"samples_of_{name}": count for name, count in self.order.samples_by_source(indices).items()}


def preflight(config: OpdlmConfig) -> Preflight:
    """Checks a config against the files that it names.

    Raises:
        OpdlmError: what the first failing check found, one line per mistake.
    """
    check_job_paths(config)
    teacher = read_facts(config.model.teacher)
    student = read_facts(config.model.student) if config.model.student else teacher
    tokenizer = load_tokenizer(config.model.student or config.model.teacher, own_mask=config.model.mask_token is None)
    _check_backend(config, teacher)
    _check_transport(config)
    _check_lora(config, student)
    if config.run.wandb_project is not None:
        _require_package("wandb", f"run.wandb_project: found `{config.run.wandb_project}`", "opdlm-ray[wandb]")
    if config.model.student:
        _check_mask(config, student)
        check_vocabularies(teacher, student)
        check_tokenizers(teacher, student)
        check_grid(config, student)
    else:
        _check_conversion(config, teacher)
    check_attention(config, student)
    check_noisy(config, student)
    for setting, top_k in (("teacher.top_k", _teacher_top_k(config)), ("objective.top_k", config.objective.top_k)):
        if top_k > len(teacher.tokens):
            raise ConfigError(f"{setting}: found {top_k}, more than the teacher's {len(teacher.tokens)} tokens")
    for task in evaluated_tasks(config):
        get_task(task)
    longest = _longest_prompt(config, teacher, student)
    room = min(teacher.context, student.context) - config.evaluation.max_new_tokens - (config.rollout.block_size - 1)
    questions, refused = load_known(config, tokenizer, room, {*teacher.eos_ids, *student.eos_ids})
    kinds = questions.chosen(config.evaluation.limit).kinds if questions is not None else None
    check_best_figure(config.checkpoint.keep_best, evaluated_tasks(config), kinds, config.starts_teachers)
    prompts = load_prompts(config.data, tokenizer, longest, config.run.seed, teacher.tokens, student.eos_ids)
    per_round, responses = config.rollout.samples_per_round, config.rollout.responses_per_prompt
    per_epoch = prompts.samples_per_epoch * responses
    check_references(config, prompts.prompts)
    mark_of_reasoning(config, tokenizer)
    total = config.data.epochs * per_epoch if config.run.rounds is None else config.run.rounds * per_round
    epochs = -(-total // per_epoch)
    learner = config.learner
    schedule = TrainingSchedule(total, per_round, learner.batch_size, config.run.seed, learner.passes)
    question = longest_question(config, evaluated_tasks(config), tokenizer, questions)
    check_cache(config, longest_rollout(config, prompts, schedule.rounds), question)
    order = PromptOrder(prompts.prompts, config.run.seed, epochs, prompts.shares, responses)
    if config.run.replay is not None:
        check_replay(config, Path(config.run.replay), teacher, schedule, order.digest)
    slow = slow_bfloat16_notes(config, torch.backends.cpu.get_cpu_capability())
    notes = (*end_token_notes(teacher, student, tokenizer), *([refused] if refused else []), *slow)
    return Preflight(config, teacher, student, tokenizer, prompts, order, schedule, notes, question, questions)


def check_references(config: OpdlmConfig, prompts: Sequence[Prompt]) -> None:
    """Checks that the reward can be asked: its function is there, and every prompt has what it compares with.

    Raises:
        ConfigError: it cannot; the first such prompt is named.
    """
    kind = config.reward.kind
    if config.objective.kind != "rl":
        return
    if kind == "python":
        make_reward(config.reward)
        return
    wanted: type = RerankCase if kind == "rerank" else str
    for prompt in prompts:
        if not isinstance(prompt.reference, wanted):
            raise ConfigError(
                f"reward.kind: found {kind!r}, but {prompt.prompt_id} has no "
                + (
                    "re-ranking case; give its columns `candidates` and `target`, or use data.task `rerank`"
                    if kind == "rerank"
                    else "answer as text; name its column in data.response_field"
                )
            )
    if kind == "math":
        _require_package("math_verify", "reward.kind: found `math`", "opdlm-ray[eval]")
    if kind in ("exact", "math"):
        _check_answers(kind, prompts)


def _check_answers(kind: AnswerKind, prompts: Sequence[Prompt]) -> None:
    """Checks that every prompt's answer can be read: one that cannot would end the run when its turn comes."""
    for prompt in prompts:
        try:
            answer_check(kind, [str(prompt.reference)])
        except ValueError as error:
            raise ConfigError(f"reward.kind: found {kind!r}, but the answer of {prompt.prompt_id}: {error}") from error


def mark_of_reasoning(config: OpdlmConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of `objective.weights.mark`; None without weights.

    Raises:
        ConfigError: the text is not one token that the tokenizer knows.
    """
    weights = config.objective.weights
    if weights is None:
        return None
    ids = tokenizer(weights.mark, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        what = f"{len(ids)} tokens of the tokenizer" if len(ids) != 1 else "unknown to the tokenizer"
        raise ConfigError(f"objective.weights.mark: found {weights.mark!r}, which is {what}; expected one token")
    return int(ids[0])


def check_weights(config: OpdlmConfig) -> None:
    """Reads all weights of the given models once, because one NaN would show only when the actors have started.

    Raises:
        OpdlmError: a weight is NaN or infinite, or not the teacher's where it must be; its tensor is named.
    """
    for folder in sorted({config.model.teacher, config.model.student or config.model.teacher}):
        check_finite(read_shards(folder))
    if config.rollouts_bring_targets and config.model.student:
        check_base(read_shards(config.model.teacher), read_shards(config.model.student))


def evaluated_tasks(config: OpdlmConfig) -> list[str]:
    """Names of the tasks on which the run evaluates."""
    return config.evaluation.tasks or ([config.data.task] if config.data.task else [])


def _teacher_top_k(config: OpdlmConfig) -> int:
    """Tokens per position that the teacher sends; 0 where it sends something else."""
    return config.teacher.top_k if config.teacher.targets == "topk" else 0


def _longest_prompt(config: OpdlmConfig, teacher: ModelFacts, student: ModelFacts) -> int:
    """Longest prompt that leaves room for a whole response, to the end of its last block, in both models."""
    room, setting = config.rollout.max_new_tokens, "rollout.max_new_tokens"
    asks = evaluated_tasks(config) or config.evaluation.data is not None
    evaluates = asks and (config.evaluation.every_rounds or config.evaluation.final_problems)
    if evaluates and config.evaluation.max_new_tokens > room:
        room, setting = config.evaluation.max_new_tokens, "evaluation.max_new_tokens"
    context = min(teacher.context, student.context)
    longest = context - room - (config.rollout.block_size - 1)
    if longest < 1:
        raise ConfigError(
            f"{setting}: found {room}; the model's context of {context} tokens leaves no room for a prompt"
        )
    return longest


def _check_mask(config: OpdlmConfig, student: ModelFacts) -> None:
    if student.mask_id is None:
        grid = f"--block-size {config.rollout.block_size} --block-grid {config.rollout.block_grid}"
        raise ConfigError(
            f"model.student: {student.folder} has no mask token; convert it first (opdlm convert {student.folder} DST "
            f"{grid}) and set model.student to DST"
        )
    require_mask(student)


def _check_conversion(config: OpdlmConfig, teacher: ModelFacts) -> None:
    """Checks that the teacher can be converted: which mask token the student would get."""
    wanted = config.model.mask_token
    tokenizer = load_tokenizer(teacher.folder, own_mask=wanted is None)
    mask_id = choose_mask(teacher.folder, read_config(teacher.folder), tokenizer, teacher.eos_ids, wanted)
    check_mask_row(mask_id, teacher.vocab_size)


def _check_backend(config: OpdlmConfig, teacher: ModelFacts) -> None:
    if config.teacher.backend == "vllm":
        _require_package("vllm", "teacher.backend: found `vllm`", "opdlm-ray[vllm]")
        family = json.loads((teacher.folder / "config.json").read_text())["model_type"]
        if family.startswith(A2D_PREFIX):
            raise ConfigError(
                f"teacher.backend: found `vllm`, which cannot load model_type `{family}` of {teacher.folder}; use "
                "`transformers`"
            )
    if config.teacher.device_map == "auto":
        _require_package("accelerate", "teacher.device_map: found `auto`", "opdlm-ray[device-map]")


def _check_transport(config: OpdlmConfig) -> None:
    if config.rollout.weight_transport == "nixl":
        _require_package("nixl", "rollout.weight_transport: found `nixl`", "opdlm-ray[nixl]")


def _check_lora(config: OpdlmConfig, student: ModelFacts) -> None:
    lora = config.model.lora
    if lora is None:
        return
    _require_package("peft", "model.lora: found adapters", "opdlm-ray[lora]")
    shards = read_shards(student.folder)
    layers = {n.split(".")[-2] for n in shards.file_of if ".layers." in n and len(shards.shape(n)) == 2}
    if unknown := sorted(set(lora.target_modules) - layers):
        raise ConfigError(
            f"model.lora.target_modules: found {', '.join(unknown)}; the student's layers have "
            f"{', '.join(sorted(layers))}"
        )


def _require_package(name: str, found: str, requirement: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"{found}, which needs the package {name}; pip install '{requirement}'")
