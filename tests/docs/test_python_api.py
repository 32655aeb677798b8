"""The blocks of docs/python-api.md run, in order, in one namespace. `pytest tests/docs/test_python_api.py`

The page's folders are tiny random models. Blocks marked `no-test` need Ray: they must compile and name what exists.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import opdlm
from tests.docs.pages import DOCS, Block, blocks
from tests.tiny import save_teacher

PAGE = DOCS / "python-api.md"


def compiled(block: Block) -> Any:
    """The block's code; a traceback names the page and its line."""
    return compile("\n" * (block.line - 1) + block.code, str(PAGE), "exec")


def test_the_page_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    save_teacher(Path("models/teacher"))
    opdlm.convert("models/teacher", "models/student", block_size=4, block_grid="absolute")
    namespace: dict[str, Any] = {}
    tested = [block for block in blocks(PAGE) if block.info == "python"]
    assert len(tested) >= 6
    for block in tested:
        exec(compiled(block), namespace)
    assert "47+8-3=" in capsys.readouterr().out
    before = opdlm.load("models/student").model.state_dict()
    after = namespace["module"].student.state_dict()
    assert any((after[name] != before[name]).any() for name in before), "the training step changed no weight"


def test_blocks_that_need_a_cluster_name_what_exists() -> None:
    untested = [block for block in blocks(PAGE) if block.info == "python no-test"]
    assert untested
    for block in untested:
        compiled(block)
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "opdlm":
                assert hasattr(opdlm, node.attr), f"opdlm.{node.attr}"
