"""Loads a run file: YAML and `--set a.b=c` overrides become a checked config, or an error with a line per mistake."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from opdlm.common.config.checks import check_config
from opdlm.common.config.redact import redact_credentials
from opdlm.common.config.schema import OpdlmConfig
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.files import home_path, read_yaml
from opdlm.common.plain_yaml import parse_yaml

_HINTS = {
    "string_type": ' (write it in quotes: "...")',
    "bool": " (true or false)",
}
"""What an error of pydantic's types that begin so does not say."""
_REPLACED = {
    "learner.micro_batch_rows": (
        "is now learner.micro_batch_tokens, the most tokens of a forward; a row of P prompt and R response tokens has "
        "P + 2R of them"
    ),
    "rollout.prompts_per_call": "is gone: requests go to an actor one by one, as it has room; leave it out",
}
"""Settings that are gone, and what took their place."""
_SHOWN = 100
"""Characters of an override that an error quotes."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 2, 10, 10, 1000, 200


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> OpdlmConfig:
    """Reads a run file, applies the overrides, and checks every field and every combination of fields.

    Args:
        path: a YAML file.
        overrides: strings of the form `section.field=value`. The value is read as YAML: `null`, `true`, `[1, 2]`,
            text.

    Raises:
        ConfigError: with one line per mistake, which names the setting by its path in the file.
    """
    file = Path(home_path(str(path)))
    if file.is_dir():
        raise ConfigError(f"run file: {file} is a folder; give a YAML file")
    if not file.exists():
        raise ConfigError(f"run file: {file} does not exist; give a YAML file such as `opdlm recipes demo` prints")
    try:
        raw = read_yaml(file)
    except OpdlmError as error:
        raise ConfigError(f"run file: {error}") from None
    _check_overrides(overrides)
    for override in overrides:
        apply_override(raw, override)
    return config_from_dict(raw)


def config_from_dict(raw: Mapping[str, Any]) -> OpdlmConfig:
    """Checks a nested mapping, as YAML gives it, and returns the config.

    Raises:
        ConfigError: with one line per mistake, which names the setting by its path.
    """
    try:
        config = OpdlmConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(item) for item in error.errors())) from None
    check_config(config)
    return config


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one field of a nested dict, in place. `override` has the form `section.field=value`.

    Raises:
        ConfigError: the override has another form, or its path leads through a value that is no section.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected section.field=value, e.g. --set learner.batch_size=16")
    *parents, last = key.strip().split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section; give section.field=value")
        node = child
    try:
        node[last] = parse_yaml(value)
    except OpdlmError as error:
        shown = override if len(override) <= _SHOWN else f"{override[:_SHOWN]}..."
        raise ConfigError(f"--set {shown}: the value is not YAML: {error}") from None


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuses two overrides of which the later one would undo the earlier one."""
    given: list[list[str]] = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        path = key.split(".")
        for earlier in given:
            if earlier[: len(path)] == path:
                which = "it is given twice" if earlier == path else f"it would undo --set {'.'.join(earlier)}"
                raise ConfigError(f"--set {key}: {which}; leave one out")
        given.append(path)


def dump_config(config: OpdlmConfig) -> str:
    """Returns the config as YAML with every default filled in. Loading the YAML gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _describe(item: Any) -> str:
    location = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
    if location in _REPLACED:
        return f"{location}: {_REPLACED[location]}"
    if item["type"] == "extra_forbidden":
        *parents, last = [str(part) for part in item["loc"]]
        known = _fields_at(parents)
        close = difflib.get_close_matches(last, known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(known))}"
        return f"{location}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{location}: missing; it has no default"
    message = item["msg"].removeprefix("Value error, ")
    hint = next((hint for kind, hint in _HINTS.items() if item["type"].startswith(kind)), "")
    if item["input"] is None:
        hint = " (or leave it out)"
    return f"{location}: {message[0].lower()}{message[1:]}{hint}; found {redact_credentials(_found(item['input']))}"


def _found(value: Any) -> str:
    """A value as Python writes it, of bounded length: anchors can make a few lines of YAML a huge value."""
    return repr(value) if isinstance(value, str) else _SHORT.repr(value)


def _fields_at(parents: Sequence[str]) -> list[str]:
    model: type[BaseModel] = OpdlmConfig
    for parent in parents:
        if parent.isdecimal():  # a place in a list of sections, whose fields are those of the list's field
            continue
        field = model.model_fields.get(parent)
        annotation: Any = field.annotation if field else None
        candidates = [annotation, *get_args(annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
