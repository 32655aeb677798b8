"""Checks that need two fields. Each says what, where, what was found, and what would be right; all are reported."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

from opdlm.common.config.redact import holds_secret, redact
from opdlm.common.config.schema import OpdlmConfig, Schedule
from opdlm.common.errors import ConfigError


def check_config(config: OpdlmConfig) -> None:
    """Raises `ConfigError` with one line per contradiction between fields."""
    checks = (_run, _data, _objective, _rollout, _teacher, _targets, _learner, _curriculum, _resources)
    problems = [*_secrets(config.model_dump()), *(problem for check in checks for problem in check(config))]
    if problems:
        raise ConfigError("\n".join(problems))


def _secrets(section: dict[str, Any], path: str = "") -> Iterator[str]:
    """A run's config is written to its directory and to model cards, so that a secret in it would be published."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _secrets(value, f"{path}{key}.")
        elif isinstance(value, str) and holds_secret(value):
            yield f"{path}{key}: found credentials in {redact(value)!r}; leave them out and set HF_TOKEN instead"


def _run(config: OpdlmConfig) -> Iterator[str]:
    if config.run.replay is not None and config.run.dump_rollouts:
        yield f"run.dump_rollouts: found with run.replay; the rollouts are in {config.run.replay} already, drop one"


def _data(config: OpdlmConfig) -> Iterator[str]:
    data = config.data
    if (data.task is None) == (data.path is None):
        found = "neither" if data.task is None else "both"
        yield f"data: found {found} of `task` and `path`; give exactly one (e.g. `task: chain`)"
    if data.task is not None and data.prompts is None:
        yield "data.prompts: missing; a task needs to know how many prompts an epoch has (e.g. 20000)"
    if data.task is None and not config.evaluation.tasks and config.evaluation.every_rounds is not None:
        yield "evaluation.every_rounds: needs `evaluation.tasks` or `data.task`, which know answers; found neither"
    if config.evaluation.actors and config.evaluation.every_rounds is None:
        yield (
            f"evaluation.actors: found {config.evaluation.actors} without evaluation.every_rounds; they do periodic "
            "evaluations only, so set that or drop them"
        )
    if data.task is not None and data.chat_template:
        yield "data.chat_template: built-in tasks have no chat form; it goes with data.path"
    for field in ("system_prompt", "thinking"):
        if getattr(data, field) is not None and not data.chat_template:
            yield f"data.{field}: found {getattr(data, field)!r} without data.chat_template; set that to true"


def _objective(config: OpdlmConfig) -> Iterator[str]:
    objective = config.objective
    if objective.kind == "opd":
        return
    if objective.states != "random_mask":
        yield (
            f"objective.selection: found {objective.states!r}; the responses of objective.kind {objective.kind!r} have "
            "no visited states; use `random_mask`"
        )
    if config.offline.responses == "data" and config.data.task is None and config.data.response_field is None:
        yield "offline.responses: found `data`, but data.response_field names no column; name it, or use `teacher`"
    if objective.kind == "cft" and (objective.divergence, objective.reverse_weight, objective.tail) != (
        "kl",
        0,
        "drop",
    ):
        yield (
            f"objective: `cft` is a cross-entropy; found divergence {objective.divergence!r}, reverse_weight "
            f"{objective.reverse_weight:g}, tail {objective.tail!r}; leave those three at their defaults"
        )


def _rollout(config: OpdlmConfig) -> Iterator[str]:
    rollout = config.rollout
    if rollout.denoising_steps is not None and rollout.denoising_steps > rollout.block_size:
        yield (
            f"rollout.denoising_steps: found {rollout.denoising_steps}, more than rollout.block_size "
            f"{rollout.block_size}; a step reveals at least one token, so at most the block size"
        )
    if rollout.weight_transport == "nixl":
        if (rollout.gpus_per_actor > 0) != (config.learner.gpus_per_worker > 0):
            yield (
                f"rollout.weight_transport: found `nixl` with rollout.gpus_per_actor {rollout.gpus_per_actor:g} and "
                f"learner.gpus_per_worker {config.learner.gpus_per_worker:g}; it reads from GPU to GPU (or from CPU to "
                "CPU), use `object_store`"
            )
        if config.evaluation.actors:
            yield (
                f"rollout.weight_transport: found `nixl` with evaluation.actors {config.evaluation.actors}, which may "
                "need a version that died with a rank of the learner; set evaluation.actors to 0, or use `object_store`"
            )
    if rollout.cuda_graphs and rollout.gpus_per_actor == 0:
        yield "rollout.cuda_graphs: found true with rollout.gpus_per_actor 0; it needs a GPU, so drop it or reserve one"


def _teacher(config: OpdlmConfig) -> Iterator[str]:
    teacher = config.teacher
    if teacher.backend == "vllm":
        if teacher.targets != "topk" and config.objective.kind != "cft":  # which asks for no score
            yield (
                f"teacher.targets: found `{teacher.targets}` with teacher.backend `vllm`, which gives top-K "
                f"log-probabilities only; set it to `topk` (with objective.top_k of 1 to {teacher.top_k}), or the "
                "backend to `transformers`"
            )
        if teacher.device_map != "none":
            yield (
                f"teacher.device_map: found `{teacher.device_map}` with teacher.backend `vllm`; it is for "
                "`transformers`, vLLM splits layers by teacher.tensor_parallel"
            )
        if max(teacher.gpus_per_actor, teacher.tensor_parallel) > 1 and (
            teacher.gpus_per_actor != teacher.tensor_parallel
        ):
            yield (
                f"teacher.tensor_parallel: found {teacher.tensor_parallel} with teacher.gpus_per_actor "
                f"{teacher.gpus_per_actor:g}; an actor uses the GPUs that it reserves, so both are one number"
            )
    elif teacher.tensor_parallel > 1:
        yield (
            f"teacher.tensor_parallel: found {teacher.tensor_parallel} with teacher.backend `transformers`; set the "
            "backend to `vllm`, or teacher.device_map to `auto`"
        )
    elif teacher.gpus_per_actor > 1 and teacher.device_map == "none":
        yield (
            f"teacher.gpus_per_actor: found {teacher.gpus_per_actor:g} with teacher.device_map `none`, which uses one; "
            "set teacher.device_map to `auto`"
        )


def _targets(config: OpdlmConfig) -> Iterator[str]:
    objective, teacher = config.objective, config.teacher
    if teacher.targets == "topk" and objective.kind != "cft":
        if objective.top_k == 0:
            yield (
                "teacher.targets: found `topk` with objective.top_k 0 (full vocabulary); set objective.top_k to "
                f"{teacher.top_k} or teacher.targets to `hidden`"
            )
        elif objective.top_k > teacher.top_k:
            yield (
                f"objective.top_k: found {objective.top_k}, more than the {teacher.top_k} that the teacher sends "
                "(teacher.top_k); at most that"
            )
    if objective.tail == "bucket" and objective.top_k == 0:
        yield "objective.tail: `bucket` needs objective.top_k > 0; over the full vocabulary there is no tail"


def _learner(config: OpdlmConfig) -> Iterator[str]:
    learner, rollout = config.learner, config.rollout
    if learner.batch_size > rollout.prompts_per_round:
        yield (
            f"learner.batch_size: found {learner.batch_size}, more than rollout.prompts_per_round "
            f"{rollout.prompts_per_round}; a step trains trajectories of one round, so at most that"
        )
    if learner.batch_size < learner.workers:
        yield (
            f"learner.workers: found {learner.workers}, more than learner.batch_size {learner.batch_size}; "
            "every rank needs a trajectory a step"
        )
    if learner.zero.offload_weights and learner.zero.stage != 3:
        yield f"learner.zero.offload_weights: needs stage 3; found stage {learner.zero.stage}"
    if 0 < learner.gpus_per_worker < 1 and learner.workers > 1:  # NCCL refuses two ranks on one GPU
        yield (
            f"learner.gpus_per_worker: found {learner.gpus_per_worker:g} with learner.workers {learner.workers}; each "
            "of several ranks needs a whole GPU (1), or 0 for the CPU; a part of one goes with learner.workers 1"
        )
    if learner.gpus_per_worker > 1:
        yield f"learner.gpus_per_worker: found {learner.gpus_per_worker:g}; a rank uses one GPU, raise learner.workers"
    if learner.gpus_per_worker == 0 and config.model.attention == "flex_attention":
        yield "model.attention: flex_attention has no backward on the CPU; use `sdpa` or `auto`"


def _curriculum(config: OpdlmConfig) -> Iterator[str]:
    curriculum, rollout = config.curriculum, config.rollout
    schedules: list[tuple[str, Schedule | None]] = [
        ("curriculum.max_new_tokens", curriculum.max_new_tokens),
        ("curriculum.threshold", curriculum.threshold),
    ]
    for where, schedule in schedules:
        if schedule and schedule.kind != "constant" and (schedule.end is None or schedule.rounds is None):
            found = f"end {schedule.end}, rounds {schedule.rounds}"
            yield f"{where}: `{schedule.kind}` needs `end` and `rounds`; found {found}"
    if curriculum.max_new_tokens:
        lengths = [curriculum.max_new_tokens.start, curriculum.max_new_tokens.end or 1]
        if min(lengths) < 1 or max(lengths) > rollout.max_new_tokens:
            yield (
                f"curriculum.max_new_tokens: found {lengths[0]:g} to {lengths[1]:g} tokens; expected within 1 and "
                f"rollout.max_new_tokens {rollout.max_new_tokens}"
            )
    if curriculum.threshold:
        if rollout.strategy != "low_confidence_dynamic":
            yield (
                f"curriculum.threshold: found with rollout.strategy `{rollout.strategy}`, which has no threshold; "
                "use `low_confidence_dynamic` or drop it"
            )
        ends = [curriculum.threshold.start, curriculum.threshold.end or 0.0]
        if min(ends) < 0 or max(ends) > 1:
            yield f"curriculum.threshold: found {ends[0]:g} to {ends[1]:g}; a probability, so within 0 and 1"


def _resources(config: OpdlmConfig) -> Iterator[str]:
    resources = config.resources
    if not is_loopback(resources.dashboard_host) and not resources.local_dashboard:
        yield (
            f"resources.dashboard_host: found {resources.dashboard_host!r} with resources.local_dashboard false; turn "
            "that on or drop this"
        )
    if not is_loopback(resources.dashboard_host) and resources.ray_address:
        yield (
            f"resources.dashboard_host: found {resources.dashboard_host!r} with resources.ray_address; it is for a Ray "
            "started here, a cluster's own dashboard is set where its head starts (ray start --dashboard-host)"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`; a name other than `localhost` is not known."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
