"""What the settings of the teacher must agree on."""

from __future__ import annotations

from collections.abc import Iterator

from opdlm.common.config.schema import OpdlmConfig


def check_teacher(config: OpdlmConfig) -> Iterator[str]:
    """Yields a line for each setting of the teacher, or of what it is asked for, that contradicts another one."""
    if not config.starts_teachers:
        return
    yield from _backend(config)
    yield from _targets(config)


def _backend(config: OpdlmConfig) -> Iterator[str]:
    teacher = config.teacher
    if teacher.backend == "vllm":
        if teacher.targets != "topk" and config.objective.kind != "cft":  # `cft` asks for no scores
            yield (
                f"teacher.targets: found `{teacher.targets}` with teacher.backend `vllm`, which gives top-K "
                f"log-probabilities only; set it to `topk` (with objective.top_k of 1 to {teacher.top_k}), or the "
                "backend to `transformers`"
            )
        if teacher.device_map != "none":
            yield (
                f"teacher.device_map: found `{teacher.device_map}` with teacher.backend `vllm`; use it with "
                "`transformers`, vLLM spreads the teacher over GPUs by teacher.tensor_parallel"
            )
        if max(teacher.gpus_per_actor, teacher.tensor_parallel) > 1 and (
            teacher.gpus_per_actor != teacher.tensor_parallel
        ):
            yield (
                f"teacher.tensor_parallel: found {teacher.tensor_parallel} with teacher.gpus_per_actor "
                f"{teacher.gpus_per_actor:g}; an actor uses the GPUs that it reserves, so give both the same number"
            )
    elif teacher.tensor_parallel > 1:
        yield (
            f"teacher.tensor_parallel: found {teacher.tensor_parallel} with teacher.backend `transformers`; set the "
            "backend to `vllm`, or teacher.device_map to `auto`"
        )
    elif teacher.gpus_per_actor > 1 and teacher.device_map == "none":
        yield (
            f"teacher.gpus_per_actor: found {teacher.gpus_per_actor:g} with teacher.device_map `none`, which uses one "
            "GPU; set teacher.device_map to `auto`"
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
                "(teacher.top_k); give at most that number"
            )
    if objective.teacher_temperature != 1 and (objective.kind == "cft" or teacher.targets == "topk"):
        where = "objective.kind `cft`" if objective.kind == "cft" else "teacher.targets `topk`"
        yield (
            f"objective.teacher_temperature: found {objective.teacher_temperature:g} with {where}, which has no logits "
            "of the teacher; leave it at 1, or use objective.kind `opd` with teacher.targets `hidden`"
        )
    if objective.tail == "bucket" and objective.top_k == 0:
        yield "objective.tail: `bucket` needs objective.top_k > 0; found 0, the full vocabulary, which has no tail"
