"""Saved rollouts: one safetensors file a round, from which a run can be trained again without decoding and scoring.

    RUN/rollouts/round-000012.safetensors
        INDEX.prompt_ids, INDEX.response_ids, INDEX.reveal_step     of each sample, as in `Trajectory`
        INDEX.token_versions        only of a sample that several weight versions decoded
        INDEX.hidden | INDEX.logits | INDEX.token_ids, INDEX.logprobs    its targets
        metadata `rollouts`, a JSON: `facts` (what a run that trains on them must agree with), `samples` (small fields)

A file appears whole or not at all, and writing a round again gives the same bytes: no pickle, no time in it. This
module is light (no torch, no Ray): the processes that read and write for others load it.
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
from opdlm.common.types import HiddenTargets, LogitsTargets, ScoredTrajectory, TeacherTargets, TopKTargets, Trajectory

_TARGETS: dict[str, type[HiddenTargets] | type[LogitsTargets] | type[TopKTargets]] = {
    "hidden": HiddenTargets,
    "logits": LogitsTargets,
    "topk": TopKTargets,
    "tokens": TopKTargets,
}
_TRAJECTORY_ARRAYS = ("prompt_ids", "response_ids", "reveal_step")
_VERSIONS = "token_versions"


@dataclass(frozen=True, slots=True)
class RolloutFacts:
    """What saved rollouts and a run that trains on them must agree on."""

    prompts_per_round: int
    block_size: int
    block_grid: str
    vocab_size: int
    """The teacher's V."""
    targets: str
    """Kind of the targets: `hidden`, `topk`, `logits`, or `tokens` (of given responses)."""
    data_digest: str
    """Fingerprint of the prompts (`PromptOrder.digest`)."""
    teacher: str
    """Fingerprint and number format of the teacher whose scores these are; empty for `tokens`."""


def facts_of(config: OpdlmConfig, vocab_size: int, data_digest: str, fingerprint: str) -> RolloutFacts:
    """The facts of a run. `vocab_size`, `fingerprint`: the teacher's; `data_digest`: its prompts'."""
    rollout, scored = config.rollout, config.objective.kind != "cft"
    return RolloutFacts(
        prompts_per_round=rollout.prompts_per_round,
        block_size=rollout.block_size,
        block_grid=rollout.block_grid,
        vocab_size=vocab_size,
        targets=config.teacher.targets if scored else "tokens",
        data_digest=data_digest,
        teacher=f"{fingerprint} {config.teacher.dtype}" if scored else "",
    )


@dataclass(frozen=True, slots=True)
class RoundHeader:
    """What a file says without reading its arrays."""

    facts: RolloutFacts
    weight_versions: dict[int, int]
    """By sample index, in order."""
    target_widths: dict[int, int]
    """By sample index: D of hidden states, K of top tokens, V of logits."""
    visited_states: bool
    """Whether each response was decoded step by step; a given response was not."""


def round_file(folder: Path, round_: int) -> Path:
    """The file of a round."""
    return folder / f"round-{round_:06d}.safetensors"


def save_round(file: Path, samples: Sequence[ScoredTrajectory], facts: RolloutFacts) -> None:
    """Writes the samples of one round, aside and synced, then renamed over an earlier file of that name."""
    arrays: dict[str, np.ndarray] = {}
    small: list[dict[str, Any]] = []
    for sample in samples:
        fields = _fields(sample.trajectory) | _fields(sample.targets)
        index = sample.trajectory.index
        tensors = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
        arrays |= {f"{index}.{name}": np.ascontiguousarray(value) for name, value in tensors.items()}
        small.append({name: value for name, value in fields.items() if name not in tensors and value is not None})
    metadata = {"rollouts": json.dumps({"facts": asdict(facts), "samples": small})}  # one key: their order is not fixed
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as staging:
        save_file(arrays, staging, metadata)


def load_samples(file: Path, indices: Sequence[int]) -> list[ScoredTrajectory]:
    """Those samples of a round, in that order; only their arrays are read."""
    with _opened(file) as tensors:
        facts, small = _metadata(tensors, file)
        targets, held = _TARGETS[facts.targets], set(tensors.keys())
        found = []
        for index in indices:
            fields = small[index]
            optional = [_VERSIONS] if f"{index}.{_VERSIONS}" in held else []
            arrays = {name: tensors.get_tensor(f"{index}.{name}") for name in [*_array_names(targets), *optional]}
            both = {_VERSIONS: None} | fields | arrays
            found.append(ScoredTrajectory(Trajectory(**_pick(Trajectory, both)), targets(**_pick(targets, both))))
        return found


def read_header(file: Path) -> RoundHeader:
    """Facts and samples of a round's file.

    Raises:
        OpdlmError: the file is damaged, or no file of saved rollouts.
    """
    with _opened(file) as tensors:
        facts, small = _metadata(tensors, file)
        last = _array_names(_TARGETS[facts.targets])[-1]
        return RoundHeader(
            facts,
            {index: fields["weight_version"] for index, fields in small.items()},
            {index: tensors.get_slice(f"{index}.{last}").get_shape()[-1] for index in small},
            all(fields["denoising_steps"] > 0 for fields in small.values()),
        )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise OpdlmError(f"saved rollouts: {file} cannot be read: {' '.join(str(error).split())}") from None


def _metadata(tensors: Any, file: Path) -> tuple[RolloutFacts, dict[int, dict[str, Any]]]:
    held = (tensors.metadata() or {}).get("rollouts")
    if held is None:
        raise OpdlmError(
            f"saved rollouts: {file} holds something else; expected a file of a run with run.dump_rollouts"
        )
    try:
        record = json.loads(held)
        facts = RolloutFacts(**record["facts"])
        _TARGETS[facts.targets]
        return facts, {fields["index"]: fields for fields in record["samples"]}
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise OpdlmError(f"saved rollouts: {file} cannot be read: its metadata `rollouts`: {reason}") from None


def _fields(record: Trajectory | TeacherTargets) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).__slots__}


def _pick(kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in kind.__slots__}


def _array_names(targets: Any) -> list[str]:
    return [*_TRAJECTORY_ARRAYS, *(name for name in targets.__slots__ if name != "vocab_size")]
