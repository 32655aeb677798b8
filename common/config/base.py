"""What all sections of the configuration share: their base class, and the names of values and value ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Strategy = Literal["low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "sequential", "random"]
Grid = Literal["absolute", "response"]
Dtype = Literal["float32", "bfloat16"]
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
"""Bytes of one number in each `Dtype`."""
OnNewWeights = Literal["finish", "continue"]
Attention = Literal["auto", "sdpa", "flex_attention"]

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base class of every section.

    It refuses unknown keys, takes a field's description from the docstring below the field, and cannot be changed once
    loaded.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, protected_namespaces=())
