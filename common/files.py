"""JSON and YAML files that others wrote: data only, and one clear line where they are something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from common.errors import OpdlmError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OpdlmError: the file is not JSON (a pickle, say), or holds no object.
    """
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also what is not text
        raise OpdlmError(f"{file} is not JSON: {error}") from None
    if not isinstance(held, dict):
        raise OpdlmError(f"{file} holds a {type(held).__name__}; expected an object")
    return held


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file; tags that would build Python objects are refused.

    Raises:
        OpdlmError: the file is not plain YAML, or holds no mapping.
    """
    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise OpdlmError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(held, dict):
        raise OpdlmError(f"{file} holds a {type(held).__name__}; expected sections such as `model:`")
    return held
