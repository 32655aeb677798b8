"""Checks that need two fields of the config. Each error says where, what was found, and what would be right.

A check yields one line per mistake, and all mistakes are reported together.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from opdlm.common.config.base import WITH_THRESHOLD
from opdlm.common.config.data import check_sources, has_responses
from opdlm.common.config.policy import check_policy_gradient
from opdlm.common.config.schema import OpdlmConfig, Schedule
from opdlm.common.config.teacher import check_teacher
from opdlm.common.config.values import no_texts, secrets
from opdlm.common.errors import ConfigError


def check_config(config: OpdlmConfig) -> None:
    """Checks that no two fields contradict each other, and that no value contains credentials.

    Raises:
        ConfigError: with one line per mistake, which names the setting by its path.
    """
    checks = (
        _run,
        _checkpoint,
        _data,
        _model,
        _objective,
        _rollout,
        check_teacher,
        _learner,
        _curriculum,
        _resources,
    )
    values = config.model_dump()
    problems = [
        *no_texts(values),
        *secrets(values),
        *(problem for check in checks for problem in check(config)),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _run(config: OpdlmConfig) -> Iterator[str]:
    if config.run.replay is not None and config.run.dump_rollouts:
        yield f"run.dump_rollouts: found with run.replay; {config.run.replay} holds the rollouts already, leave one out"


def _checkpoint(config: OpdlmConfig) -> Iterator[str]:
    if config.checkpoint.keep_best is None:
        return
    if config.run.replay is not None:
        yield "checkpoint.keep_best: found with run.replay, which evaluates nothing; leave one of them out"
    elif config.evaluation.every_rounds is None:
        yield (
            "checkpoint.keep_best: found without evaluation.every_rounds; the best is chosen among the evaluations "
            "during training, so set evaluation.every_rounds"
        )


def _data(config: OpdlmConfig) -> Iterator[str]:
    data = config.data
    given = [name for name in ("task", "path", "sources") if getattr(data, name)]
    if len(given) != 1:
        found = " and ".join(f"`{name}`" for name in given) or "none"
        yield f"data: found {found} of `task`, `path` and `sources`; give exactly one (e.g. `task: chain`)"
    yield from check_sources(data)
    if data.task is not None and data.prompts is None:
        yield "data.prompts: missing; a task needs to know how many prompts an epoch has (e.g. 20000)"
    evaluation = config.evaluation
    if not (data.task or evaluation.tasks or evaluation.data) and evaluation.every_rounds is not None:
        yield (
            "evaluation.every_rounds: found neither evaluation.tasks nor data.task to evaluate on; name a task in one, "
            "or questions in evaluation.data"
        )
    for field in ("answer_field", "mark", "chat_template", "limit"):
        if evaluation.data is None and getattr(evaluation, field) is not None:
            found = f"evaluation.{field}: found {getattr(evaluation, field)!r} without evaluation.data"
            yield f"{found}; name a file of questions there, or leave it out"
    if config.evaluation.actors and config.evaluation.every_rounds is None:
        yield (
            f"evaluation.actors: found {config.evaluation.actors} without evaluation.every_rounds; these actors do the "
            "evaluations during training only, so set evaluation.every_rounds, or leave evaluation.actors out"
        )
    if data.task is not None and data.chat_template:
        yield "data.chat_template: found true with data.task; built-in tasks have no chat form, use it with data.path"
    for field in ("system_prompt", "thinking"):
        if getattr(data, field) is not None and not data.chat_template:
            found = f"data.{field}: found {getattr(data, field)!r} without data.chat_template"
            yield f"{found}; set data.chat_template to true"


def _model(config: OpdlmConfig) -> Iterator[str]:
    if config.model.mask_token is not None and config.model.student is not None:
        yield f"model.mask_token: found {config.model.mask_token!r}, but model.student has its mask token already"
    if config.model.context == "causal" and config.rollout.block_grid != "response":
        yield (
            f"model.context: found 'causal' with rollout.block_grid {config.rollout.block_grid!r}; set "
            "rollout.block_grid to 'response', which starts the response in a block of its own"
        )
    lora, verified = config.model.lora, config.rollout.strategy == "verified"
    if lora is not None and lora.tokens == "noisy":
        for name, needed in (("logit_shift", True), ("context", "causal")):
            found = getattr(config.model, name)
            if found != needed and (found is not None or config.model.student is None):
                yield (
                    f"model.{name}: found {found!r} with model.lora.tokens `noisy`; set it to {needed!r}: only then is "
                    "the clean path the teacher's"
                )
    if verified != (config.objective.selection == "drafts"):
        yield (
            f"objective.selection: found {config.objective.selection!r} with rollout.strategy "
            f"{config.rollout.strategy!r}; `drafts` goes with `verified`, and with nothing else"
        )
    elif verified and config.objective.kind != "opd":
        yield (
            f"rollout.strategy: found `verified` with objective.kind {config.objective.kind!r}; drafts are trained "
            "with `opd` only"
        )
    if verified and (lora is None or lora.tokens != "noisy"):
        yield (
            "model.lora: found no adapters on noisy tokens with rollout.strategy `verified`; set lora.tokens to "
            "`noisy`: otherwise training changes the clean path, which verifies drafts"
        )
    if verified and config.rollout.block_size < 2:
        yield f"rollout.block_size: found {config.rollout.block_size} with rollout.strategy `verified`; give 2 or more"
    if verified and config.evaluation.order is not None:
        yield f"evaluation.order: found {config.evaluation.order!r} with rollout.strategy `verified`; leave it out"
    if verified and config.rollout.cuda_graphs:
        yield "rollout.cuda_graphs: found true with rollout.strategy `verified`, whose forwards are not recorded yet"
    if config.rollouts_bring_targets and config.teacher.targets != "hidden":
        yield (
            f"teacher.targets: found {config.teacher.targets!r} with rollouts that bring the teacher's hidden states "
            "(rollout.strategy `verified`, model.lora.tokens `noisy`); set it to `hidden`"
        )


def _objective(config: OpdlmConfig) -> Iterator[str]:
    objective = config.objective
    of_policy = objective.resolved_selection in ("revealed", "one_sampled_state")
    if of_policy != (objective.kind == "rl"):
        yield (
            f"objective.selection: found {objective.selection!r} with objective.kind {objective.kind!r}; `rl` takes "
            "`revealed` or `one_sampled_state`, and no other kind does"
        )
        return
    if objective.kind == "rl":
        yield from check_policy_gradient(config)
    if objective.kind in ("opd", "rl"):
        if objective.weights is not None:
            yield (
                f"objective.weights: found with objective.kind {objective.kind!r}; only given responses (`cft`, "
                "`off_policy_kd`) have weights, so leave it out"
            )
        return
    if config.rollout.responses_per_prompt > 1:
        yield (
            f"rollout.responses_per_prompt: found {config.rollout.responses_per_prompt} with objective.kind "
            f"{objective.kind!r}, which has one given response to each prompt; leave it at 1"
        )
    if objective.resolved_selection != "random_mask":
        yield (
            f"objective.selection: found {objective.selection!r} with objective.kind {objective.kind!r}, whose given "
            "responses have no visited states; use `random_mask`"
        )
    if config.offline.responses == "data" and not has_responses(config.data):
        yield "offline.responses: found `data`, but data.response_field names no column; name one, or use `teacher`"
    if objective.kind == "cft" and (objective.divergence, objective.reverse_weight, objective.tail) != (
        "kl",
        0,
        "drop",
    ):
        yield (
            f"objective: `cft` is a cross-entropy; found divergence {objective.divergence!r}, reverse_weight "
            f"{objective.reverse_weight:g}, tail {objective.tail!r}; leave these three at their defaults"
        )


def _rollout(config: OpdlmConfig) -> Iterator[str]:
    rollout = config.rollout
    if rollout.denoising_steps is not None and rollout.denoising_steps > rollout.block_size:
        yield (
            f"rollout.denoising_steps: found {rollout.denoising_steps}, more than rollout.block_size "
            f"{rollout.block_size}; a step reveals at least one token, so give at most the block size"
        )
    if rollout.weight_transport == "nixl":
        if (rollout.gpus_per_actor > 0) != (config.learner.gpus_per_worker > 0):
            yield (
                f"rollout.weight_transport: found `nixl` with rollout.gpus_per_actor {rollout.gpus_per_actor:g} and "
                f"learner.gpus_per_worker {config.learner.gpus_per_worker:g}; `nixl` reads from GPU to GPU or from "
                "CPU to CPU, so use `object_store`"
            )
        if config.evaluation.actors:
            yield (
                f"rollout.weight_transport: found `nixl` with evaluation.actors {config.evaluation.actors}, which may "
                "need a version that was lost with a rank of the learner; set evaluation.actors to 0, or use "
                "`object_store`"
            )
    if rollout.cuda_graphs and rollout.gpus_per_actor == 0:
        yield "rollout.cuda_graphs: found true with rollout.gpus_per_actor 0; reserve a GPU, or leave cuda_graphs out"


def _learner(config: OpdlmConfig) -> Iterator[str]:
    learner, rollout = config.learner, config.rollout
    if learner.batch_size > rollout.samples_per_round:
        per_prompt = "" if rollout.responses_per_prompt == 1 else " times rollout.responses_per_prompt"
        yield (
            f"learner.batch_size: found {learner.batch_size}, more than rollout.prompts_per_round{per_prompt} "
            f"{rollout.samples_per_round}; a step trains trajectories of one round, so give at most that number"
        )
    if learner.batch_size < learner.workers:
        yield (
            f"learner.workers: found {learner.workers}, more than learner.batch_size {learner.batch_size}; "
            "every rank needs a trajectory in each step, so give at most that number"
        )
    if learner.zero.offload_weights and learner.zero.stage != 3:
        yield f"learner.zero.offload_weights: needs stage 3; found stage {learner.zero.stage}"
    if 0 < learner.gpus_per_worker < 1 and learner.workers > 1:  # NCCL refuses two ranks on one GPU
        yield (
            f"learner.gpus_per_worker: found {learner.gpus_per_worker:g} with learner.workers {learner.workers}; each "
            "of several ranks needs a whole GPU (1) or none (0); a part of a GPU needs learner.workers 1"
        )
    if learner.gpus_per_worker > 1:
        yield f"learner.gpus_per_worker: found {learner.gpus_per_worker:g}; a rank uses one GPU, raise learner.workers"
    if learner.gpus_per_worker == 0 and config.model.attention == "flex_attention":
        yield (
            "model.attention: found `flex_attention` with learner.gpus_per_worker 0; flex_attention has no backward on "
            "the CPU, use `sdpa` or `auto`"
        )


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
        if rollout.strategy not in WITH_THRESHOLD:
            yield (
                f"curriculum.threshold: found with rollout.strategy `{rollout.strategy}`, which has no threshold; "
                f"use `{'` or `'.join(WITH_THRESHOLD)}`, or leave the schedule out"
            )
        ends = [curriculum.threshold.start, curriculum.threshold.end or 0.0]
        if min(ends) < 0 or max(ends) > 1:
            yield f"curriculum.threshold: found {ends[0]:g} to {ends[1]:g}; expected probabilities within 0 and 1"


def _resources(config: OpdlmConfig) -> Iterator[str]:
    resources = config.resources
    if not is_loopback(resources.dashboard_host) and not resources.local_dashboard:
        yield (
            f"resources.dashboard_host: found {resources.dashboard_host!r} with resources.local_dashboard false; set "
            "resources.local_dashboard to true, or leave resources.dashboard_host out"
        )
    if not is_loopback(resources.dashboard_host) and resources.ray_address:
        yield (
            f"resources.dashboard_host: found {resources.dashboard_host!r} with resources.ray_address, but it is for "
            "a local Ray only; set the dashboard of a cluster where its head is started (ray start --dashboard-host)"
        )


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only.

    Of host names, only `localhost` counts as such; others are not resolved.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
