"""Malicious content for files: pickles, YAML tags, Python code. Each one creates a marker path when it is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa

PYTHON_CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"
"""Python source that creates the marker; fill in the path with `.format(marker=str(path))`."""


class PickleAttack:
    """Unpickling an instance creates the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def yaml_attack(marker: Path) -> str:
    """YAML that creates the marker if a loader executes Python tags."""
    return f"model: !!python/object/apply:os.mkdir [{str(marker)!r}]\n"


def table_with_pickles(malicious_pickle: bytes) -> pa.Table:
    """One prompt and response, with a pickle in each place of the metadata that a reader may unpickle.

    The column's extension type is the one that pyarrow once unpickled on reading (CVE-2023-47248).
    """
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": malicious_pickle,
    }
    schema = pa.schema(
        [pa.field("prompt", pa.string(), metadata=extension), pa.field("response_ids", pa.list_(pa.int32()))],
        metadata={"pandas": malicious_pickle, "opdlm": malicious_pickle},
    )
    return pa.table([["1+2="], [[1, 2]]], schema=schema)


def edit_json(file: Path, **changes: object) -> None:
    """Sets keys of a JSON file; creates the file if it does not exist."""
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))
