"""What a student must be for the settings of a run: its grid, its form, its adapters, its attention."""

from __future__ import annotations

from opdlm.common.config import OpdlmConfig
from opdlm.common.errors import ConfigError
from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import NOISY_LORA
from opdlm.common.model.config import NARROWEST_FLEX_HEAD, head_width, read_config
from opdlm.common.model.facts import ModelFacts


def check_noisy(config: OpdlmConfig, student: ModelFacts, form: StudentForm) -> None:
    """Checks the form for lossless decoding, and the adapters that a given student has."""
    lora = config.model.lora
    noisy = lora is not None and lora.tokens == "noisy"
    if (noisy or config.rollout.strategy == "verified") and not (form.logit_shift and form.causal):
        where = "model.lora.tokens `noisy`" if noisy else "rollout.strategy `verified`"
        mend = (
            "convert the teacher again, with both"
            if config.model.student
            else "set model.logit_shift and model.context"
        )
        raise ConfigError(
            f"{'model.student' if config.model.student else 'model'}: found a student with {form}; {where} needs logit "
            f"shift and causal context: {mend}"
        )
    if config.model.student and student.has_noisy_adapters:
        ours = lora.model_dump(mode="json") if lora is not None and noisy else None
        theirs = getattr(read_config(config.model.student), NOISY_LORA)
        if ours != theirs:
            raise ConfigError(
                f"model.lora: found {ours}, but the student {student.folder} has adapters with {theirs}; give the same"
            )


def check_grid(config: OpdlmConfig, student: ModelFacts) -> None:
    """Checks blocks and form of a given student."""
    ours = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
    for field, theirs in (("block_size", student.block_size), ("block_grid", student.block_grid)):
        found = ours.block_size if field == "block_size" else ours.kind
        if theirs is not None and theirs != found:
            raise ConfigError(
                f"rollout.{field}: found {found!r}, but the student {student.folder} was made for {theirs!r}; "
                f"set rollout.{field} to that, or convert the teacher again"
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
    width = head_width(read_config(student.folder))
    if config.model.attention == "flex_attention" and width < NARROWEST_FLEX_HEAD:
        raise ConfigError(
            f"model.attention: found `flex_attention`, but the heads of {student.folder} are {width} wide, and its "
            f"kernels need {NARROWEST_FLEX_HEAD}; use `sdpa` or `auto`"
        )
