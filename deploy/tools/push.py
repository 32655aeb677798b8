"""`opdlm push`: uploads a finished student or export to the Hugging Face hub, in one commit, with its model card."""

from __future__ import annotations

import fnmatch
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from opdlm.common.errors import OpdlmError
from opdlm.common.export.card import Card, write_card
from opdlm.common.export.names import LAYOUTS, LayoutName
from opdlm.common.model.adapters import NOISY_FILE
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import check_tensors
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.hub import BESIDE_WEIGHTS, REPOSITORY
from opdlm.common.model.shards import Shards, check_finite, read_shards
from opdlm.common.model.tokenizer import load_tokenizer

_CARD = "README.md"
_SENT = (*BESIDE_WEIGHTS, "model.safetensors.index.json", _CARD)
"""What is sent beside weights and the layout's code; nothing else leaves the machine."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What would be sent."""

    files: dict[str, Path]
    """Name in the repository -> file here."""
    left_out: tuple[str, ...]
    """Names in the folder that are not sent."""


def run_push(
    folder: Path, repository: str, private: bool | None, base_model: str | None, dry_run: bool, console: Console
) -> None:
    """Checks the folder, lists what is sent, and sends it.

    Args:
        private: whether a new repository is private; None: the hub's default.
        base_model: hub id for a card that is written here.

    Raises:
        OpdlmError: the folder holds no finished student, the name has another form, there is no token, or the hub
            cannot be reached or refuses.
    """
    if not REPOSITORY.fullmatch(repository):
        raise OpdlmError(f"push: found {repository!r}; expected a repository on the hub, as ORG/NAME")
    with tempfile.TemporaryDirectory() as temporary:
        upload = collect(folder, base_model, Path(temporary))
        for name, file in upload.files.items():
            console.print(f"{_size(file.stat().st_size):>10}  {name}", highlight=False, markup=False, soft_wrap=True)
        if upload.left_out:
            print(f"opdlm: not sent: {', '.join(upload.left_out)}", file=sys.stderr)
        total = _size(sum(file.stat().st_size for file in upload.files.values()))
        if dry_run:
            line = f"{len(upload.files)} files, {total}, would be sent to {repository}"
            console.print(line, highlight=False, soft_wrap=True)
            return
        address = _send(upload, repository, private, folder)
        line = f"{address}: {len(upload.files)} files, {total}"
        console.print(line, highlight=False, soft_wrap=True)


def collect(folder: Path, base_model: str | None, temporary: Path) -> Upload:
    """Finds the files of a finished student folder; a missing card is written into `temporary`.

    Raises:
        OpdlmError: the folder holds no student, or not all of one, or weights that are NaN or infinite.
    """
    config, facts, shards = read_config(folder), read_facts(folder), read_shards(folder)
    if not facts.is_student:
        raise OpdlmError(
            f"push: {folder} is an autoregressive model; this command sends students: a run's `student`, a folder of "
            "`opdlm convert`, or of `opdlm export`"
        )
    require_mask(facts)
    if facts.block_size is None:
        raise OpdlmError(f"push: {folder}/config.json names no block_size, so nobody could decode with it")
    load_tokenizer(folder)
    check_tensors(config, shards)
    check_finite(shards)
    code = {name for layout in LAYOUTS.values() for name in layout.files}
    wanted = {*shards.headers, *code}
    here = sorted(path for path in folder.iterdir())
    sent = [p for p in here if p.is_file() and (p.name in wanted or any(fnmatch.fnmatch(p.name, s) for s in _SENT))]
    files = {path.name: path for path in sent}
    if facts.has_noisy_adapters:
        sent.append(folder / Path(NOISY_FILE).parts[0])
        files[NOISY_FILE] = folder / NOISY_FILE
    if _CARD in files and base_model is not None:
        raise OpdlmError(f"--base-model: found {base_model}, but {folder} has a card already: change it in {_CARD}")
    if _CARD not in files:
        files[_CARD] = _new_card(folder, config, facts.block_size, facts.block_grid, shards, base_model, temporary)
    return Upload(files, tuple(p.name for p in here if p not in sent))


def _new_card(
    folder: Path, config: Any, block_size: int, grid: str | None, shards: Shards, base_model: str | None, where: Path
) -> Path:
    from opdlm.common.export.layouts import PLAIN_WARNING, engine_warnings
    from opdlm.common.files import read_json

    raw = read_json(folder / "config.json")
    named = cast(LayoutName, raw["model_type"])
    layout = LAYOUTS[named]
    config.update({"block_size": block_size, "block_grid": grid or "absolute"})
    warnings = engine_warnings(config) if named == "sdar" else [] if layout.files else [PLAIN_WARNING]
    auto_map = layout.auto_map if all((folder / name).is_file() for name in layout.files) else {}
    write_card(Card(folder, named, config, load_tokenizer(folder), auto_map, base_model), warnings, where / _CARD)
    return where / _CARD


def _send(upload: Upload, repository: str, private: bool | None, folder: Path) -> str:
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise OpdlmError("push: no token for the hub; log in with `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi()
    operations = [huggingface_hub.CommitOperationAdd(name, str(file)) for name, file in upload.files.items()]
    existed = _asked(repository, lambda: api.repo_exists(repository))
    if existed and private is not None:
        state = "private" if private else "public"
        print(f"opdlm: {repository} exists; whether it is {state} is left as it is on the hub", file=sys.stderr)
    _asked(repository, lambda: api.create_repo(repository, private=private, exist_ok=True))
    message = f"{folder.resolve().name}, by opdlm push"
    commit = _asked(repository, lambda: api.create_commit(repository, operations=operations, commit_message=message))
    return str(commit.repo_url)


def _asked(repository: str, request: Callable[[], Any]) -> Any:
    from huggingface_hub import errors

    try:
        return request()
    except errors.OfflineModeIsEnabled:
        raise OpdlmError(f"push: HF_HUB_OFFLINE is set, so {repository} cannot be reached; unset it") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        advice = "; is the token allowed to write there?" if status in (401, 403, 404) else ""
        raise OpdlmError(f"push: the hub refused {repository} ({status}): {_line(error)}{advice}") from None
    except Exception as error:  # network libraries raise errors of many classes; the user gets one line
        raise OpdlmError(f"push: {repository} cannot be reached: {_line(error)}; nothing is published") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(count: int) -> str:
    size, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
