"""The section of a run file that says where prompts come from, and how the rows of the data are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated

from pydantic import Field

from opdlm.common.config.base import Number, PathText, PositiveInt, Section, Switch


class DataSource(Section):
    """One of several data sets of a run. What it leaves empty is as `data` says."""

    path: PathText
    """Data with prompts, as `data.path`."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """How many times an epoch uses each prompt of this source. 2: twice. 0.5: half of them, and the next epoch uses the
    other half; no prompt comes again before all others of its source did. An epoch has `weight` times the source's
    prompts, rounded, in one random order with those of the other sources."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")] | None = None
    """Name in the plan, in metrics (`samples_of_NAME`) and before the names of its rows: letters, digits and `_`.
    Empty: the file's name without its ending, with `_` for other signs."""
    domain: str | None = None
    """Domain of rows that name none, for `curriculum.max_new_tokens_per_domain`. Empty: they have none."""
    prompts: PositiveInt | None = None
    """Only the first rows of the data are used. Empty: all rows."""
    subset: str | None = None
    """Configuration name of a data set on the hub. Empty: its default configuration."""
    split: str | None = None
    """Split, as `data.split`."""
    prompt_field: str | None = None
    """Column with the prompt, as `data.prompt_field`."""
    response_field: str | None = None
    """Column with the response, as `data.response_field`."""


class DataConfig(Section):
    """Where prompts come from, how many there are, and how rows of the data are read. Give one of `task`, `path` and
    `sources`."""

    task: str | None = None
    """Built-in task that makes the prompts and checks answers: `chain`, `add`, `sub`, `sort`, `copy`, `reverse` or
    `rerank`. Several names joined by `+` are mixed in equal shares (`add+sort`). Empty: prompts are read from
    `path`."""
    path: PathText | None = None
    """Data with prompts: a .jsonl or .parquet file, a folder that `datasets` saved, or the id of a data set on the
    Hugging Face hub. Empty: `task` makes the prompts."""
    sources: list[DataSource] = Field(default_factory=list)
    """Several data sets, each with a weight, in place of `path`. Empty: there is one."""
    subset: str | None = None
    """Configuration name of a data set on the hub. Empty: its default configuration."""
    split: str = "train"
    """Split of a `datasets` folder or of a data set on the hub."""
    prompt_field: str = "prompt"
    """Column with the prompt: text, a list of token ids, or a list of chat messages. A message has a `role` (system,
    developer, user, assistant, tool) and a `content`: text, or a list of text parts, which are joined."""
    response_field: str | None = None
    """Column with the response, as text or token ids; required with `offline.responses: data` and a `path`. Empty: none
    is read."""
    domain_field: str = "domain"
    """Column with the domain of a row, such as `math`, by which `curriculum.max_new_tokens_per_domain` limits
    responses. The data need not have it."""
    max_new_tokens_field: str = "max_new_tokens"
    """Column with a row's own limit of its response, in tokens. The data need not have it."""
    chat_template: Switch = False
    """Put each prompt through the tokenizer's chat template. A prompt that is text becomes one user message; token ids
    stay as they are."""
    system_prompt: str | None = None
    """System message at the start of every conversation; needs `chat_template: true`. Empty: none."""
    thinking: Switch | None = None
    """Value of `enable_thinking` for the chat template (Qwen3 has it); needs `chat_template: true`. Empty: the
    template's default."""
    prompts: PositiveInt | None = None
    """Number of prompts in an epoch. With `task` it is required. With `path` only the first rows of the data are used;
    empty: all rows. With `sources`, each has a number of its own."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt in tokens. A longer one is refused and counted, never cut. Empty: the longest that leaves room for
    its response in the model's context."""
    epochs: PositiveInt = 1
    """Number of times that every prompt is used (with `sources`: times its weight); each epoch has its own random
    order. `run.rounds` overrides it."""


def source_names(data: DataConfig) -> list[str]:
    """The names of `data.sources`, given or made from their paths."""
    return [source.name or _name(source.path) for source in data.sources]


def _name(path: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", PurePath(path).stem).strip("_")
    return plain if plain[:1].isalpha() else f"source_{plain}"


def source_data(data: DataConfig, place: int) -> DataConfig:
    """The settings by which the rows of one source are read: its own, and those of `data` where it has none."""
    source = data.sources[place]
    own = {name: getattr(source, name) for name in ("split", "prompt_field", "response_field")}
    given = {name: value for name, value in own.items() if value is not None}
    # `data.prompts` is none of a run file's (`checks.py`); `opdlm trace` reads only a few rows by it.
    limit = source.prompts if data.prompts is None else data.prompts
    return data.model_copy(
        update={"path": source.path, "subset": source.subset, "prompts": limit, "sources": [], **given}
    )


def check_sources(data: DataConfig) -> Iterator[str]:
    """Finds settings that `data.sources` has no use for, and names that two sources share; a line per mistake."""
    for field in ("prompts", "subset") if data.sources else ():
        if (value := getattr(data, field)) is not None:
            yield f"data.{field}: found {value!r} with data.sources; give it to a source (data.sources[0].{field})"
    names = source_names(data)
    for place, name in enumerate(names):
        if name in names[:place]:
            yield (
                f"data.sources[{place}].name: {name!r} is the name of data.sources[{names.index(name)}], too; give "
                "each source a name of its own"
            )


def has_responses(data: DataConfig) -> bool:
    """Whether every row has a response: a task's solution, or a column of the data."""
    fields = [source.response_field or data.response_field for source in data.sources] or [data.response_field]
    return data.task is not None or None not in fields
