"""What a student must be for the settings of a run: its grid, its form, its adapters, its attention."""

from __future__ import annotations

import torch

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import NOISY_LORA
from opdlm.common.model.config import NARROWEST_FLEX_HEAD, head_width, read_config
from opdlm.common.model.convert import tied_copies
from opdlm.common.model.facts import ModelFacts
from opdlm.common.model.shards import Shards


def check_noisy(config: OpdlmConfig, student: ModelFacts) -> None:
    """Checks the form of a given student for adapters on noisy tokens, and those that it has."""
    if not config.model.student:
        return
    lora, form = config.model.lora, student.form
    noisy = lora is not None and lora.tokens == "noisy"
    if noisy and not (form.logit_shift and form.causal):
        raise ConfigError(
            f"model.student: found a student with {form}; model.lora.tokens `noisy` needs logit shift and causal "
            "context: convert the teacher again, with both"
        )
    if student.has_noisy_adapters:
        ours = lora.model_dump(mode="json") if lora is not None and noisy else None
        theirs = getattr(read_config(config.model.student), NOISY_LORA)
        if ours != theirs:
            raise ConfigError(
                f"model.lora: found {ours}, but the student {student.folder} has adapters with {theirs}; give the same"
            )


def check_base(teacher: Shards, student: Shards) -> None:
    """Checks that a given student has the teacher's own weights: its clean path is the teacher (METHOD.md section 11).

    A tensor that the student has in another number format is compared in that. A matrix of the student may have rows
    behind the teacher's, as conversion adds one for the mask token. One tensor of each is in memory at a time.

    Raises:
        ConfigError: a tensor differs, or the student lacks it.
    """
    for name in sorted(teacher.file_of.keys() - tied_copies(read_config(teacher.folder), teacher)):
        found = student.load(name) if name in student.file_of else None
        if found is not None:
            own = teacher.load(name).to(found.dtype)
            if found.shape[1:] == own.shape[1:] and torch.equal(found[: len(own)], own):
                continue
        how = "lacks" if found is None else "has other values in"
        raise ConfigError(
            f"model.student: found {student.folder}, which {how} {name} of the teacher {teacher.folder}; with "
            "rollout.strategy `verified` and model.lora.tokens `noisy` the student's own weights are the teacher: give "
            "a student that was converted from this teacher and has learnt nothing but such adapters, or leave "
            "model.student out"
        )


def check_grid(config: OpdlmConfig, student: ModelFacts) -> None:
    """Checks blocks and form of a given student."""
    ours = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
    for field, theirs in (("block_size", student.block_size), ("block_grid", student.block_grid)):
        found = ours.block_size if field == "block_size" else ours.kind
        if theirs is not None and theirs != found:
            raise ConfigError(
                f"rollout.{field}: found {found!r}, but the student {student.folder} was made for {theirs!r}; "
                f"set rollout.{field} to that, or convert the student (opdlm convert {student.folder} DST "
                f"--block-size {ours.block_size} --block-grid {ours.kind})"
            )
    for field in ("logit_shift", "context"):
        asked, theirs = getattr(config.model, field), getattr(student.form, field)
        if asked not in (None, theirs):
            raise ConfigError(
                f"model.{field}: found {asked!r}, but the student {student.folder} was made for {theirs!r}; leave "
                f"model.{field} out, or convert the student again"
            )


def check_attention(config: OpdlmConfig, student: ModelFacts) -> None:
    """Checks that flex_attention, where the run file asks for it, can compute the student's heads."""
    if config.model.attention != "flex_attention":
        return
    if (width := head_width(read_config(student.folder))) < NARROWEST_FLEX_HEAD:
        raise ConfigError(
            f"model.attention: found `flex_attention`, but the heads of {student.folder} are {width} wide, and its "
            f"kernels need {NARROWEST_FLEX_HEAD}; use `sdpa` or `auto`"
        )
