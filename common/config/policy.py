"""What the settings of a policy gradient must agree on (METHOD.md section 7)."""

from __future__ import annotations

from collections.abc import Iterator

from opdlm.common.config.schema import OpdlmConfig

_OF_DISTILLATION: dict[str, object] = {
    "divergence": "kl",
    "reverse_weight": 0,
    "top_k": 0,
    "tail": "drop",
    "teacher_temperature": 1,
}
"""Settings of the objectives with a teacher, and their defaults."""


def check_policy_gradient(config: OpdlmConfig) -> Iterator[str]:
    """Yields a line for each setting that `objective.kind: rl` cannot have."""
    rollout, reward = config.rollout, config.reward
    if rollout.responses_per_prompt < 2:
        yield "rollout.responses_per_prompt: found 1 with objective.kind `rl`, which compares responses; give 8, say"
    if rollout.temperature == 0:
        yield "rollout.temperature: found 0 with objective.kind `rl`, whose responses must differ; give 1"
    for field, default in (("top_k", 0), ("top_p", 1)):
        if getattr(rollout, field) != default:
            yield (
                f"rollout.{field}: found {getattr(rollout, field):g} with objective.kind `rl`, whose tokens are drawn "
                f"from the whole distribution; leave it at {default}"
            )
    longest = rollout.responses_per_prompt * reward.time_limit_seconds
    if reward.kind == "python" and longest >= config.resources.call_timeout_seconds:
        yield (
            f"reward.time_limit_seconds: found {reward.time_limit_seconds:g}; the {rollout.responses_per_prompt} "
            f"responses to a prompt are judged in one call, which may take {config.resources.call_timeout_seconds:g} s "
            f"(resources.call_timeout_seconds), so give less than "
            f"{config.resources.call_timeout_seconds / rollout.responses_per_prompt:g}"
        )
    if reward.validity_alone and reward.kind != "rerank":
        yield f"reward.validity_alone: found true with reward.kind {reward.kind!r}; only `rerank` has it, leave it out"
    for field, usual in _OF_DISTILLATION.items() if not config.objective.asks_teacher else ():
        value = getattr(config.objective, field)
        if value != usual:
            yield (
                f"objective.{field}: found {value!r} with objective.kind `rl` and objective.opd_weight 0, which asks "
                f"no teacher; leave it at {usual!r}"
            )
    if (reward.kind == "python") != (reward.function is not None):
        found = "no reward.function" if reward.function is None else f"reward.function {reward.function}"
        yield f"reward.kind: found {reward.kind!r} with {found}; `python` needs one, and no other kind takes one"
    for setting, is_given in (
        ("run.dump_rollouts", config.run.dump_rollouts),
        ("run.replay", config.run.replay is not None),
    ):
        if is_given:
            yield f"{setting}: found with objective.kind `rl`, which does not have it yet; leave it out"
