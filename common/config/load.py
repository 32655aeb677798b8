"""Loads a run file: YAML and `--set a.b=c` overrides become a checked config, or an error with a line per mistake."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from opdlm.common.config.checks import check_config
from opdlm.common.config.redact import redact_credentials
from opdlm.common.config.schema import OpdlmConfig
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.files import read_yaml


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> OpdlmConfig:
    """Reads a run file, applies the overrides, and checks every field and every combination of fields.

    Args:
        path: a YAML file.
        overrides: strings of the form `section.field=value`. The value is read as YAML: `null`, `true`, `[1, 2]`,
            text.

    Raises:
        ConfigError: with one line per mistake, which names the setting by its path in the file.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"run file: {file} does not exist; give a YAML file such as `opdlm recipes demo` prints")
    try:
        raw = read_yaml(file)
    except OpdlmError as error:
        raise ConfigError(f"run file: {error}") from None
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
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}") from None


def dump_config(config: OpdlmConfig) -> str:
    """Returns the config as YAML with every default filled in. Loading the YAML gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _describe(item: Any) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        *parents, last = [str(part) for part in item["loc"]]
        known = _fields_at(parents)
        close = difflib.get_close_matches(last, known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(known))}"
        return f"{location}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{location}: missing; it has no default"
    return f"{location}: {item['msg'][0].lower()}{item['msg'][1:]}; found {redact_credentials(repr(item['input']))}"


def _fields_at(parents: Sequence[str]) -> list[str]:
    model: type[BaseModel] = OpdlmConfig
    for parent in parents:
        field = model.model_fields.get(parent)
        annotation: Any = field.annotation if field else None
        candidates = [annotation, *get_args(annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
