"""Saved rollouts: one safetensors file per round, from which a run can train without decoding and scoring.

    RUN/rollouts/round-000012.safetensors
        INDEX.prompt_ids, INDEX.response_ids, INDEX.reveal_step     each sample's arrays, as in `Trajectory`
        INDEX.token_versions        only for a sample that several weight versions decoded
        INDEX.reveal_logprob, INDEX.loss_weight     only where the objective needs them
        INDEX.hidden | INDEX.logits | INDEX.token_ids, INDEX.logprobs    its targets
        metadata `rollouts`, JSON: `facts` (see `RolloutFacts`), `samples` (the fields that are not arrays)

A file appears whole or not at all. It holds no pickle and no time, so writing a round again gives the same bytes. This
module is light to import (no torch, no Ray), because the tasks of `rollout_tasks.py` load it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.files import atomic_file
from opdlm.common.types import (
    HiddenTargets,
    LogitsTargets,
    PolicyTargets,
    ScoredTrajectory,
    TeacherTargets,
    TopKTargets,
    Trajectory,
)

_TARGETS: dict[str, type[HiddenTargets] | type[LogitsTargets] | type[TopKTargets]] = {
    "hidden": HiddenTargets,
    "logits": LogitsTargets,
    "topk": TopKTargets,
    "tokens": TopKTargets,
}
"""Types of the targets by `RolloutFacts.targets`."""
_TRAJECTORY_ARRAYS = ("prompt_ids", "response_ids", "reveal_step")
_OPTIONAL = ("token_versions", "reveal_logprob", "loss_weight", "clean_hidden")
"""Arrays of a trajectory that not every one has."""


@dataclass(frozen=True, slots=True)
class RolloutFacts:
    """What saved rollouts depend on. A run that trains on them must have the same facts."""

    prompts_per_round: int
    block_size: int
    block_grid: str
    vocab_size: int
    """The teacher's V."""
    targets: str
    """Kind of the targets: `hidden`, `topk`, `logits`, or `tokens` (the tokens of given responses)."""
    data_digest: str
    """Fingerprint of the prompts (`PromptOrder.digest`)."""
    teacher: str
    """Fingerprint and number format of the teacher that scored the rollouts; empty for `tokens`."""
    drafts: bool = False
    """Whether they were decoded with `verified`: steps that revealed tokens say where drafts began, not which blocks'
    states were visited. Files of earlier versions do not say so: they have none."""


def facts_of(config: OpdlmConfig, vocab_size: int, data_digest: str, fingerprint: str) -> RolloutFacts:
    """The facts of a run.

    Args:
        vocab_size: the teacher's V.
        data_digest: fingerprint of the run's prompts.
        fingerprint: of the teacher's weights.
    """
    rollout, scored = config.rollout, config.objective.kind != "cft"
    return RolloutFacts(
        prompts_per_round=rollout.samples_per_round,
        block_size=rollout.block_size,
        block_grid=rollout.block_grid,
        vocab_size=vocab_size,
        targets=config.teacher.targets if scored else "tokens",
        data_digest=data_digest,
        teacher=f"{fingerprint} {config.teacher.dtype}" if scored else "",
        drafts=rollout.strategy == "verified",
    )


@dataclass(frozen=True, slots=True)
class RoundHeader:
    """What a round's file says without its arrays being read."""

    facts: RolloutFacts
    weight_versions: dict[int, int]
    """By sample index, in the order of the file."""
    target_widths: dict[int, int]
    """By sample index: D for hidden states, K for top tokens, V for logits."""
    visited_states: bool
    """Whether every response was decoded step by step. A given response was not."""


def round_file(folder: Path, round_: int) -> Path:
    """The path of a round's file."""
    return folder / f"round-{round_:06d}.safetensors"


def save_round(file: Path, samples: Sequence[ScoredTrajectory], facts: RolloutFacts) -> None:
    """Writes the samples of one round to `file`, in place of an earlier file of that name.

    Raises:
        OSError, SafetensorError: it could not be written (a full disk, say); an earlier file is unchanged.
    """
    arrays: dict[str, np.ndarray] = {}
    plain: list[dict[str, Any]] = []
    for sample in samples:
        fields = _fields(sample.trajectory) | _fields(sample.targets)
        index = sample.trajectory.index
        tensors = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
        arrays |= {f"{index}.{name}": np.ascontiguousarray(value) for name, value in tensors.items()}
        plain.append({name: value for name, value in fields.items() if name not in tensors and value is not None})
    # One key alone: safetensors writes several in an order that varies.
    metadata = {"rollouts": json.dumps({"facts": asdict(facts), "samples": plain})}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as staging:
        save_file(arrays, staging, metadata)


def load_samples(file: Path, indices: Sequence[int]) -> list[ScoredTrajectory]:
    """The samples of the given indices from a round's file, in that order. Only their arrays are read.

    Raises:
        OpdlmError: the file is damaged, or not a file of saved rollouts.
    """
    with _open(file) as tensors:
        facts, plain = _metadata(tensors, file)
        target_type, names = _TARGETS[facts.targets], set(tensors.keys())
        samples = []
        for index in indices:
            optional = [name for name in _OPTIONAL if f"{index}.{name}" in names]
            arrays = {name: tensors.get_tensor(f"{index}.{name}") for name in [*_array_names(target_type), *optional]}
            arrays["reveal_step"] = _widened(arrays["reveal_step"], file, index)
            fields = dict.fromkeys(_OPTIONAL) | plain[index] | arrays
            trajectory = Trajectory(**_pick(Trajectory, fields))
            samples.append(ScoredTrajectory(trajectory, target_type(**_pick(target_type, fields))))
        return samples


def read_header(file: Path) -> RoundHeader:
    """Facts and samples of a round's file.

    Raises:
        OpdlmError: the file is damaged, or not a file of saved rollouts.
    """
    with _open(file) as tensors:
        facts, plain = _metadata(tensors, file)
        target = _array_names(_TARGETS[facts.targets])[-1]
        return RoundHeader(
            facts=facts,
            weight_versions={index: fields["weight_version"] for index, fields in plain.items()},
            target_widths={index: tensors.get_slice(f"{index}.{target}").get_shape()[-1] for index in plain},
            visited_states=all(fields["denoising_steps"] > 0 for fields in plain.values()),
        )


def _widened(reveal_step: np.ndarray, file: Path, index: int) -> np.ndarray:
    """Reveal steps as int32. Files of earlier versions have int16, in which steps from 32,768 on became negative."""
    if reveal_step.size and reveal_step.min() < 0:
        raise OpdlmError(
            f"saved rollouts: {file}: sample {index} has more than 32,767 denoising steps, which the version that "
            "wrote it could not keep; decode it again"
        )
    return reveal_step.astype(np.int32)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise OpdlmError(f"saved rollouts: {file} cannot be read: {' '.join(str(error).split())}") from None


def _metadata(tensors: Any, file: Path) -> tuple[RolloutFacts, dict[int, dict[str, Any]]]:
    """The facts, and each sample's fields that are not arrays, by its index."""
    text = (tensors.metadata() or {}).get("rollouts")
    if text is None:
        raise OpdlmError(
            f"saved rollouts: {file} holds something else; expected a file of a run with run.dump_rollouts"
        )
    try:
        record = json.loads(text)
        facts = RolloutFacts(**record["facts"])
        _TARGETS[facts.targets]
        return facts, {fields["index"]: fields for fields in record["samples"]}
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise OpdlmError(f"saved rollouts: {file} cannot be read: its metadata `rollouts`: {reason}") from None


def _fields(record: Trajectory | TeacherTargets | PolicyTargets) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).__slots__}


def _pick(record_type: Any, fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in record_type.__slots__}


def _array_names(target_type: Any) -> list[str]:
    """Arrays that each sample has with targets of this type. The last dimension of the last one is their width."""
    return [*_TRAJECTORY_ARRAYS, *(name for name in target_type.__slots__ if name != "vocab_size")]
