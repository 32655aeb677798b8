"""Where a model lies: a local folder, or a model of the Hugging Face hub that is downloaded into the hub's cache.

`model_folder` is the one reading of a name that a user gives for a model. A local folder always wins; a name that looks
local is never asked from the hub. Only what opdlm reads is downloaded: settings, tokenizer and safetensors, no code and
no pickles. Network, token, cache and `HF_HUB_OFFLINE` are the library `huggingface_hub`'s own.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

from opdlm.common.errors import OpdlmError
from opdlm.common.files import home_path, read_json

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A model's id on the hub, ORG/NAME."""
_HUB_ID = re.compile(rf"(?P<id>{REPOSITORY.pattern})(@(?P<revision>[\w./-]+))?")
_LOCAL_BEGINNINGS = ("/", "./", "../", "~")
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "LICENSE*",
)
"""Files of a model folder beside its weights and its layout's code."""
_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    *BESIDE_WEIGHTS,
    "adapter_config.json",  # so that the folder is refused as an adapter
]
_NOT_WANTED = ["*/*", "consolidated*"]  # copies of the weights in other forms
_CACHED = re.compile(r"models--(.+?)--(.+)/snapshots/([0-9a-f]+)/*")


def model_folder(name: str | Path, setting: str = "model") -> Path:
    """The folder of the model that a user names, downloaded first where it is a hub id.

    Args:
        name: a folder; or a hub id such as `Qwen/Qwen3-0.6B`, with `@REVISION` behind it for another than the newest.
        setting: the setting or option that has the name, for errors.

    Returns: the folder as it was given (with `~` replaced), or the one in the hub's cache. A name that can only be
        local is returned even if nothing is there: whoever reads the folder says so.

    Raises:
        OpdlmError: the name is a GGUF file; or it is no folder and, as a hub id, cannot be downloaded.
    """
    given = str(name)
    path = Path(home_path(given))
    if path.suffix.lower() == ".gguf" and not os.path.isdir(path):
        raise OpdlmError(
            f"{setting}: {given} is a GGUF file; expected a model folder: make one with "
            f"`opdlm convert {given} --teacher DST` (the model itself) or `opdlm convert {given} DST` (a student)"
        )
    found = _HUB_ID.fullmatch(given)
    if os.path.lexists(path) or given.startswith(_LOCAL_BEGINNINGS) or found is None:
        return path
    try:
        return _download(found["id"], found["revision"])
    except _NoModel as error:
        raise OpdlmError(
            f"{setting}: {given} does not exist as a folder, and as a hub id it {error}; expected a checkpoint folder "
            "in Hugging Face layout or a hub id such as Qwen/Qwen3-0.6B (a path that begins with ./ is never asked for)"
        ) from None


def hub_id(folder: str | Path) -> str | None:
    """The hub id of a folder in the hub's cache; None for any other folder."""
    found = _CACHED.search(str(folder))
    return f"{found[1]}/{found[2]}" if found else None


class _NoModel(Exception):
    """Why the hub gives no model, in words that follow its id."""


@functools.cache  # one question to the hub in a command, however many settings and runs name the model
def _download(model: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    from opdlm.common.model.adapters import NOISY_FILE, NOISY_LORA

    print(f"opdlm: {model} is no folder here; asking the Hugging Face hub and its cache", file=sys.stderr)

    def download(wanted: list[str], not_wanted: list[str] | None) -> Path:
        bar = _progress_class()
        found = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=wanted, ignore_patterns=not_wanted, tqdm_class=bar
        )
        return Path(found)

    try:
        folder = download(_WANTED, _NOT_WANTED)
        if (folder / "config.json").is_file() and NOISY_LORA in read_json(folder / "config.json"):
            download([NOISY_FILE], None)
        return folder
    except errors.GatedRepoError:
        reason = "needs its owner's permission: ask for it on its page on the hub, then log in (`hf auth login`)"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = "is not on the hub, or is private and you are not logged in (`hf auth login`, or HF_TOKEN)"
    except errors.LocalEntryNotFoundError as error:
        reason = f"cannot be downloaded ({_offline(error)}) and is not, or not whole, in the hub's cache"
    except Exception as error:  # network libraries raise errors of many classes; the user gets one line
        reason = f"cannot be downloaded: {' '.join(str(error).split()) or type(error).__name__}"
    raise _NoModel(reason)


def _offline(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return "no connection to the hub"


def _progress_class() -> type[Any]:
    """tqdm's bar on a terminal, whatever HF_HUB_DISABLE_PROGRESS_BARS says: the commands set it for other bars."""
    from tqdm.auto import tqdm

    class Progress(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)  # the hub's name of a group of bars
            if not sys.stderr.isatty():
                settings["disable"] = True
            super().__init__(*args, **settings)

    return Progress
