"""What all sections of the configuration share: their base class, and the names of values and value ranges."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from opdlm.common.errors import OpdlmError
from opdlm.common.files import home_path

Strategy = Literal[
    "low_confidence_static",
    "low_confidence_dynamic",
    "entropy_bounded",
    "sequential",
    "sequential_dynamic",
    "random",
    "verified",
]
WITH_THRESHOLD: Collection[Strategy] = ("low_confidence_dynamic", "sequential_dynamic")
"""The strategies that reveal by a threshold of confidence."""
DecodingOrder = Literal["confidence", "sequential"]
STRATEGIES_BY_ORDER: Mapping[DecodingOrder, tuple[Strategy, Strategy]] = {
    "confidence": ("low_confidence_static", "low_confidence_dynamic"),
    "sequential": ("sequential", "sequential_dynamic"),
}
"""By which position a step reveals first, the most confident or the leftmost: the strategies without a threshold and
with one."""
Grid = Literal["absolute", "response"]
Confidence = Literal["sampled", "max_probability"]
AnswerKind = Literal["exact", "contains", "math"]
"""How answers are marked: see `common/data/answers.py`."""
Dtype = Literal["float32", "bfloat16"]
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
"""Bytes of one number in each `Dtype`."""
OnNewWeights = Literal["finish", "continue"]
Attention = Literal["auto", "sdpa", "flex_attention"]


def _no_bool(value: Any) -> Any:
    """Python counts true as 1; a run file that says true where a number belongs is mistaken."""
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


def _whole(value: Any) -> Any:
    """A whole number in the form of `1.0` or `1e3`, which YAML 1.1 takes for text, is a whole number."""
    try:
        number = float(value) if isinstance(value, float | str) else math.nan
    except ValueError:
        return value  # the error comes from pydantic
    is_short = math.isfinite(number) and abs(number) < 2**53  # a float holds larger whole numbers only roughly
    return int(number) if is_short and number.is_integer() else value


def _in_64_bits(value: int) -> int:
    if value >= 2**64:  # pydantic's own bound would name it with the digits that a float holds
        raise ValueError(f"input should be at most {2**64 - 1}, the largest number of 64 bits")
    return value


def _path(value: str) -> str:
    try:
        return home_path(value)
    except OpdlmError as error:
        raise ValueError(str(error)) from None


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
"""A finite number."""
Whole = Annotated[int, BeforeValidator(_whole), BeforeValidator(_no_bool)]
"""A whole number."""
PositiveInt = Annotated[Whole, Field(ge=1)]
NonNegativeInt = Annotated[Whole, Field(ge=0)]
Seed = Annotated[NonNegativeInt, AfterValidator(_in_64_bits)]
"""64 bits, as torch takes them."""
ZeroStage = Annotated[Literal[1, 2, 3], BeforeValidator(_whole), BeforeValidator(_no_bool)]
Probability = Annotated[Number, Field(ge=0.0, le=1.0)]
Switch = Annotated[bool, Field(strict=True)]
"""true or false; neither a number nor text counts."""
PathText = Annotated[str, Field(min_length=1), AfterValidator(_path)]
"""A path; `~` and `~user` become the home folder."""


class Section(BaseModel):
    """Base class of every section.

    It refuses unknown keys, takes a field's description from the docstring below the field, and cannot be changed once
    loaded.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, protected_namespaces=())
