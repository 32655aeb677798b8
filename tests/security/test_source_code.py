"""The packages call nothing that executes code from a file. `pytest tests/security/test_source_code.py`"""

from __future__ import annotations

import ast

from tests.package.source_files import code_files

CALLS = {
    "torch.load", "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads",
    "joblib.load", "marshal.loads", "shelve.open", "pd.read_pickle", "pandas.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "os.system", "__import__",
}  # fmt: skip
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}
"""Arguments that no call may set to anything but False."""
IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def forbidden(source: str) -> list[str]:
    """`LINE: NAME` of each call, argument and import that is forbidden. Comments and strings do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: {a.name}" for a in node.names if a.name.split(".")[0] in IMPORTS]
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in IMPORTS or names & CALLS:
                found.append(f"{node.lineno}: {node.module}")
        if isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in CALLS:
                found.append(f"{node.lineno}: {name}")
            found += [
                f"{node.lineno}: {k.arg}"
                for k in node.keywords
                if k.arg in KEYWORDS and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            ]
    return found


def test_the_scan_finds_what_is_forbidden_and_nothing_else() -> None:
    bad = (
        "torch.load(f)", "import pickle", "from pickle import loads", "from torch import load", "yaml.load(f, L)",
        "x(f, trust_remote_code=True)", "x(f, trust_remote_code=flag)", "np.load(f, allow_pickle=True)", "eval(t)",
    )  # fmt: skip
    assert [line for line in bad if not forbidden(line)] == []
    assert forbidden("model.eval()\nyaml.safe_load(t)\nx(f, trust_remote_code=False)\n'torch.load(f)'") == []


def test_no_package_executes_code_from_a_file() -> None:
    assert {str(file): found for file in code_files() if (found := forbidden(file.read_text()))} == {}
