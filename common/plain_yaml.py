"""YAML as plain data, in which nothing is lost: a key that is there twice in one mapping is an error."""

from __future__ import annotations

from typing import Any

import yaml

from opdlm.common.errors import OpdlmError


def parse_yaml(text: str) -> Any:
    """The data of one YAML document. Anchors and merge keys (`<<`) work; tags that would build objects are refused.

    Raises:
        OpdlmError: it is no YAML, it has a key twice, or it nests without end; the text names the line.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise OpdlmError(_reason(error)) from None
    except yaml.YAMLError as error:
        raise OpdlmError(" ".join(str(error).split())) from None
    except RecursionError:
        raise OpdlmError("it is nested too deeply") from None
    except ValueError as error:  # a number or date that Python cannot hold
        long_number = "integer string conversion" in str(error)
        raise OpdlmError("a number has more than 4,300 digits" if long_number else str(error)) from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader keeps the last value of a key that is there twice; this one refuses the mapping."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Here, and not where values are built: merge keys have been put in by then, and a key may override those.
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (key.tag, key.value) in first:
                    before = first[key.tag, key.value]
                    raise OpdlmError(f"line {line}: `{key.value}` is there twice, first in line {before}; keep one")
                first[key.tag, key.value] = line
        return node


def _reason(error: yaml.MarkedYAMLError) -> str:
    where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    problem = " ".join(f"{error.problem} {error.note or ''}".split())
    if "found another document" in problem:
        return f"{where}a second document begins; keep one"
    if "'\\t'" in problem:
        return f"{where}{problem}; indent with spaces, not with tabs"
    context = f" ({error.context})" if error.context and "while" in error.context else ""
    return f"{where}{problem}{context}"
