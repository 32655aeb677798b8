"""Whether the processes of a run import this `opdlm`: Ray puts folders of the driver first on its workers' path."""

from __future__ import annotations

import os
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import opdlm
from opdlm.common.errors import OpdlmError


def check_import_name() -> None:
    """Checks that the workers would import this package, before Ray is started or joined.

    Another checkout of the same version is allowed: a job may run the command of one and the code of the other.

    Raises:
        OpdlmError: a file or package in the working directory, or in the folder of the driver's script, has our name.
    """
    script = os.path.dirname(os.path.realpath(sys.argv[0]))
    for folder in ([script] if script in sys.path else []) + [os.getcwd()]:
        found = PathFinder.find_spec("opdlm", [folder])
        if found is None or found.origin is None:  # None: a folder without __init__.py, which a package goes before
            continue
        other, ours = Path(found.origin).resolve(), Path(str(opdlm.__file__)).resolve()
        if other != ours and not _is_opdlm(other):
            raise OpdlmError(
                f"{found.origin} is in the way: the processes of the run would import it instead of {ours}, because "
                f"Ray puts {folder} first on their path; rename it, or start the command in another folder"
            )


def _is_opdlm(init: Path) -> bool:
    if not (init.parent / "deploy" / "cli").is_dir():
        return False
    version = re.search(r'^__version__ = "(.*)"', init.read_text(errors="replace"), re.MULTILINE)
    return version is not None and version[1] == opdlm.__version__
