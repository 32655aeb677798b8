"""The roles of a run: the replay queue and the pools of rollout, teacher, reward and evaluation actors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opdlm.actors.members import stop_actors
from opdlm.actors.pool import ActorPool
from opdlm.actors.queue.actor import start_queue
from opdlm.actors.reward.actor import start_reward_actor
from opdlm.actors.rollout.actor import start_rollout_actor
from opdlm.actors.teacher.actor import start_teacher_actor
from opdlm.common.config import OpdlmConfig
from opdlm.common.config.schema import OnNewWeights
from opdlm.deploy.cluster.placement import Places, reserve


@dataclass(slots=True)
class Roles:
    """The actors of a run, without the learner's ranks, which Ray Train starts."""

    queue: Any
    """The handle of the replay queue's actor; another one after the queue died."""
    rollouts: ActorPool
    teachers: ActorPool
    rewards: ActorPool | None = None
    """Of `rl`, which has teachers only with `objective.opd_weight`."""
    references: ActorPool | None = None
    """Rollout actors that hold the frozen reference of `objective.kl_beta`."""
    evaluators: ActorPool | None = None
    """Spare rollout actors for periodic evaluations (`evaluation.actors`)."""
    places: Mapping[str, Places] = field(default_factory=dict)
    """By role, where Ray puts its actors."""

    def sizes(self) -> dict[str, int]:
        """How many rollout and teacher actors can work now, by metric name."""
        return {"rollout_actors": self.rollouts.serving, "teacher_actors": self.teachers.serving}

    def pools(self) -> list[ActorPool]:
        """The pools of the run."""
        pools = self.rollouts, self.teachers, self.rewards, self.references, self.evaluators
        return [pool for pool in pools if pool is not None and pool.actors]

    def stop(self) -> None:
        """Ends all actors and gives their placement groups back."""
        stop_actors([self.queue, *(actor for pool in self.pools() for actor in pool.actors.values())])
        for places in self.places.values():
            places.free()


def start_roles(config: OpdlmConfig, student: str, total: int, first_round: int) -> Roles:
    """Starts the queue and the actors, under the names that Ray's dashboard shows. In a replay, the pools are empty.

    Args:
        student: folder of the student's start weights.
        total: samples in the run.
        first_round: the round that the run starts or resumes from.

    Raises:
        OpdlmError: a placement group found no room in time.
    """
    rollout, teacher, resources = config.rollout, config.teacher, config.resources
    timeout, retries = resources.call_timeout_seconds, resources.actor_restarts
    places = reserve(config)
    slots = rollout.samples_per_round, config.queue.max_staleness
    queue = start_queue(*slots, total, first_round, rollout.responses_per_prompt)
    if config.run.replay is not None:
        return Roles(queue, ActorPool({}, timeout, retries), ActorPool({}, timeout, retries))

    def start_students(role: str, name: str, count: int, on_new_weights: OnNewWeights) -> dict[str, Any]:
        decodes = {"cache_tokens": None} if role == "reference" else {}
        own = config.model_copy(update={"rollout": rollout.model_copy(update=decodes)})
        return {
            f"{name}-{i}": start_rollout(own, f"{name}-{i}", student, on_new_weights, places[role].options(i))
            for i in range(count)
        }

    has_rewards = config.objective.kind == "rl"
    teachers = {
        f"teacher-{i}": start_teacher(config, f"teacher-{i}", places["teacher"].options(i))
        for i in range(teacher.actors if config.starts_teachers else 0)
    }
    asked = student, config.reward, config.objective.advantage, retries
    judges = {
        f"reward-{i}": start_reward_actor(f"reward-{i}", *asked) for i in range(config.reward.actors * has_rewards)
    }
    rollouts = start_students("rollout", "rollout", rollout.actors, rollout.on_new_weights)
    spare = start_students("evaluation", "eval", config.evaluation.actors, "finish")
    # A reference decodes nothing, so it needs no cache.
    frozen = start_students("reference", "reference", config.reference_actors, "finish")
    return Roles(
        queue,
        ActorPool(rollouts, timeout, retries),
        ActorPool(teachers, timeout, retries),
        ActorPool(judges, timeout, retries) if has_rewards else None,
        ActorPool(frozen, timeout, retries) if frozen else None,
        ActorPool(spare, timeout, retries) if spare else None,
        places,
    )


def start_rollout(
    config: OpdlmConfig, name: str, student: str, on_new_weights: OnNewWeights, placement: Mapping[str, Any]
) -> Any:
    """Starts one rollout actor of a run.

    Args:
        student: folder of the student's start weights.
        placement: Ray's options that place the actor, from `Places.options`.
    """
    rollout = config.rollout
    each = (rollout.cpus_per_actor, rollout.gpus_per_actor, config.resources.actor_restarts)
    return start_rollout_actor(
        name,
        student,
        config.model.dtype,
        *each,
        on_new_weights,
        rollout.cuda_graphs,
        rollout.cache_tokens,
        **placement,
    )


def start_teacher(config: OpdlmConfig, name: str, placement: Mapping[str, Any]) -> Any:
    """Starts one teacher actor of a run. `placement`: as for `start_rollout`."""
    restarts, teacher = config.resources.actor_restarts, config.teacher
    if config.run.deterministic and teacher.backend == "transformers":
        # The last bits of a forward depend on what else is in it, and that on when trajectories came.
        teacher = teacher.model_copy(update={"batch_tokens": 1})
    return start_teacher_actor(name, config.model.teacher, teacher, restarts, **placement)
