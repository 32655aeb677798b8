"""`opdlm train --replay`: saved rollouts as the source of samples, and the checks before anything starts."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import asdict
from pathlib import Path

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError
from opdlm.common.model.config import read_config
from opdlm.common.model.facts import ModelFacts
from opdlm.common.model.shards import weights_fingerprint
from opdlm.common.samples import SampleRef, sample_refs
from opdlm.common.types import WeightHandle
from opdlm.learner.rollout_files import RolloutFacts, RoundHeader, facts_of, read_header, round_file
from opdlm.learner.rollout_tasks import ReadFacts, start_read
from opdlm.learner.schedule import TrainingSchedule

_WHERE = {
    "prompts_per_round": "rollout.prompts_per_round",
    "block_size": "rollout.block_size",
    "block_grid": "rollout.block_grid",
    "vocab_size": "model.teacher (its vocabulary)",
    "targets": "teacher.targets",
    "data_digest": "data (fingerprint of the prompts)",
    "teacher": "model.teacher (fingerprint and teacher.dtype)",
    "drafts": "rollout.strategy `verified`",
}


class ReplaySource:
    """Reads the samples of a run from the files of an earlier run. Nothing is decoded, so no weights are needed.

    Args:
        folder: where the files are, on every node.
        prompts_per_round: samples in a round.
        per_reference: samples that share a reference.
    """

    def __init__(self, folder: Path, prompts_per_round: int, per_reference: int) -> None:
        self._folder = folder
        self._prompts_per_round = prompts_per_round
        self._per_reference = per_reference
        self.together = prompts_per_round

    async def room(self) -> int:
        """See `SampleSource`. The queue's slots are the limit."""
        return self._prompts_per_round

    async def sample(self, indices: list[int], weights: WeightHandle) -> tuple[list[SampleRef], list[int]]:
        """Reads the samples; returns their references and weight versions, in order.

        The arrays go from the disk to the object store in a task; they never pass through this process.
        """
        size = self._per_reference
        parts = itertools.groupby(indices, key=lambda index: index // self._prompts_per_round)
        read = [start_read(round_file(self._folder, round_), list(part), size) for round_, part in parts]
        facts: list[ReadFacts] = await asyncio.gather(*(facts for _, facts in read))
        made = zip((groups for groups, _ in read), (of.lengths for of in facts), strict=True)
        samples = [sample for groups, lengths in made for sample in sample_refs(groups, size, lengths)]
        return samples, [version for of in facts for version in of.weight_versions]


def check_replay(
    config: OpdlmConfig, folder: Path, teacher: ModelFacts, schedule: TrainingSchedule, data_digest: str
) -> None:
    """Checks that a run can train on saved rollouts. Objective, optimizer and learner may differ from the saved run's.

    Raises:
        ConfigError: rounds or samples are missing, or what a trajectory or its targets depend on differs.
    """
    files = [round_file(folder, round_) for round_ in range(schedule.rounds)]
    missing = [round_ for round_, file in enumerate(files) if not file.is_file()]
    if len(missing) == len(files):
        inside = folder / "rollouts"
        hint = f"did you mean {inside}?" if inside.is_dir() else "expected RUN/rollouts of a run with --dump-rollouts"
        raise ConfigError(f"run.replay: {folder} holds no {files[0].name}; {hint}")
    if missing:
        raise ConfigError(
            f"run.replay: {folder} lacks {len(missing)} of the run's {schedule.rounds} rounds, the first is "
            f"{files[missing[0]].name}"
            + (f"; run.rounds {missing[0]} would do with what is there" if missing[0] else "")
        )
    facts = facts_of(config, teacher.vocab_size, data_digest, weights_fingerprint(teacher.folder))
    hidden_size = read_config(config.model.teacher).hidden_size
    for round_, file in enumerate(files):
        header = read_header(file)
        _check_facts(file, header.facts, facts)
        _check_samples(file, header, schedule, round_, config)
        _check_states(file, header, config)
        _check_targets(file, header, config, hidden_size)


def _check_facts(file: Path, held: RolloutFacts, ours: RolloutFacts) -> None:
    before, now = asdict(held), asdict(ours)
    differing = [f"{_WHERE[key]} was {before[key]!r}, is now {now[key]!r}" for key in now if before[key] != now[key]]
    if differing:
        raise ConfigError(f"run.replay: {file} belongs to another run: {', '.join(differing)}; these must agree")


def _check_samples(
    file: Path, header: RoundHeader, schedule: TrainingSchedule, round_: int, config: OpdlmConfig
) -> None:
    start = round_ * schedule.prompts_per_round
    wanted = range(start, min(start + schedule.prompts_per_round, schedule.total))
    absent = [index for index in wanted if index not in header.weight_versions]
    if absent:
        raise ConfigError(
            f"run.replay: {file} lacks {len(absent)} of the round's {len(wanted)} samples (the first is {absent[0]}); "
            "ask for at most the samples that were saved (run.rounds, data.prompts, data.epochs)"
        )
    staleness = round_ - min(header.weight_versions[index] for index in wanted)
    if staleness > config.queue.max_staleness:
        raise ConfigError(
            f"queue.max_staleness: found {config.queue.max_staleness}, but samples in {file} are {staleness} rounds "
            f"older than the weights that they train; at least {staleness}"
        )


def _check_states(file: Path, header: RoundHeader, config: OpdlmConfig) -> None:
    if not header.visited_states and config.objective.resolved_selection != "random_mask":
        raise ConfigError(
            f"objective.selection: found {config.objective.resolved_selection!r}, but the responses in {file} were "
            "given, not decoded, and have no visited states; use `random_mask`"
        )


def _check_targets(file: Path, header: RoundHeader, config: OpdlmConfig, hidden_size: int) -> None:
    narrowest, widest = min(header.target_widths.values()), max(header.target_widths.values())
    if header.facts.targets == "hidden" and not narrowest == widest == hidden_size:
        raise ConfigError(
            f"model.teacher: its hidden states have {hidden_size} numbers, those in {file} {narrowest}; give the "
            "teacher that scored them"
        )
    if header.facts.targets == "topk" and narrowest < config.objective.top_k:
        raise ConfigError(
            f"objective.top_k: found {config.objective.top_k}; {file} holds {narrowest} tokens per position"
        )
