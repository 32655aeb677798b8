"""Given responses for `off_policy_kd` and `cft`: from the data, or made once by the teacher and kept as parquet."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.pool import ActorPool
from common.config import OpdlmConfig
from common.errors import ConfigError
from common.prompts import Prompt

_CALLS_PER_BATCH = 4
_KEY = b"opdlm"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a file of responses was made of; another one is another file."""

    teacher: str
    """Fingerprint of the teacher's weights."""
    prompts: str
    """Fingerprint of the prompts."""
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class GivenResponses:
    """Responses by prompt id, and what making them took (also where they came from a cache)."""

    by_prompt: dict[str, np.ndarray]  # [R] int32 each
    forward_tokens: int
    """Tokens that went through the teacher; 0 for responses from data."""
    cached: bool


def known_responses(config: OpdlmConfig, prompts: Sequence[Prompt], digest: str) -> GivenResponses | None:
    """Responses that need no actor: from the data, or from the cache. None: there are none yet, or none are needed.

    Raises:
        ConfigError: as `read_responses`.
    """
    if config.objective.kind == "opd":
        return None
    if config.offline.responses == "data":
        return GivenResponses({p.prompt_id: p.response for p in prompts if p.response is not None}, 0, False)
    return read_responses(cache_file(config), recipe(config, digest))


def cache_file(config: OpdlmConfig) -> Path:
    """Where the teacher's responses are kept."""
    return Path(config.offline.cache or Path(config.run.dir) / "offline_responses.parquet")


def recipe(config: OpdlmConfig, prompts_digest: str) -> Recipe:
    """What this run's responses are made of."""
    return Recipe(
        weights_fingerprint(Path(config.model.teacher)),
        prompts_digest,
        config.rollout.max_new_tokens,
        config.offline.temperature,
        config.run.seed,
    )


def read_responses(file: Path, expected: Recipe) -> GivenResponses | None:
    """The cache's responses; None where there is no file.

    Raises:
        ConfigError: the file is something else, or was made of something else.
    """
    if not file.exists():
        return None
    try:
        table = pq.read_table(file)
        made = json.loads((table.schema.metadata or {})[_KEY])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"offline.cache: {file} is not a file of teacher responses of ours: {reason}") from None
    differing = [
        f"{k} (there {made['recipe'].get(k)!r}, here {v!r})"
        for k, v in asdict(expected).items()
        if made["recipe"].get(k) != v
    ]
    if differing:
        raise ConfigError(
            f"offline.cache: {file} was made otherwise: {', '.join(differing)}; remove it, or give another"
            " offline.cache"
        )
    ids = table.column("prompt_id").to_pylist()
    responses = [np.array(r, dtype=np.int32) for r in table.column("response_ids").to_pylist()]
    return GivenResponses(dict(zip(ids, responses, strict=True)), made["forward_tokens"], True)


async def generate_responses(
    config: OpdlmConfig,
    prompts: Sequence[Prompt],
    teachers: ActorPool,
    made_of: Recipe,
    progress: Callable[[int, int], None],
) -> GivenResponses:
    """Has the teacher actors answer every prompt, writes the cache (whole or not at all), returns the responses.

    `progress` is told (prompts answered, prompts in all).
    """
    size = config.offline.batch_size * _CALLS_PER_BATCH
    chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    done = 0

    async def answer(number: int, chunk: Sequence[Prompt]) -> list[np.ndarray]:
        nonlocal done
        _, (responses, _) = await teachers.call(
            "generate",
            [p.ids for p in chunk],
            config.rollout.max_new_tokens,
            config.offline.batch_size,
            config.offline.temperature,
            config.run.seed * 1_000_003 + number,
        )
        done += len(chunk)
        progress(done, len(prompts))
        return responses

    parts = await asyncio.gather(*(answer(i, chunk) for i, chunk in enumerate(chunks)))
    responses = [r for part in parts for r in part]
    tokens = sum(len(p.ids) + len(r) - 1 for p, r in zip(prompts, responses, strict=True))
    given = GivenResponses({p.prompt_id: r for p, r in zip(prompts, responses, strict=True)}, tokens, False)
    _write(cache_file(config), prompts, responses, {"recipe": asdict(made_of), "forward_tokens": tokens})
    return given


def _write(file: Path, prompts: Sequence[Prompt], responses: Sequence[np.ndarray], made: dict[str, Any]) -> None:
    schema = pa.schema(
        [("prompt_id", pa.string()), ("prompt_ids", pa.list_(pa.int32())), ("response_ids", pa.list_(pa.int32()))],
        metadata={_KEY: json.dumps(made)},
    )
    columns = [[p.prompt_id for p in prompts], [p.ids for p in prompts], list(responses)]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        pq.write_table(table, staging)
        staging.rename(file)
    finally:
        staging.unlink(missing_ok=True)


def weights_fingerprint(folder: Path) -> str:
    """Of config.json and both ends of each weight file: enough to tell two trainings apart without reading it all."""
    running = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            head = stream.read(_ENDS)
            stream.seek(max(file.stat().st_size - _ENDS, 0))
            running.update(head + stream.read(_ENDS))
    return running.hexdigest()[:16]


_ENDS = 1 << 22  # bytes read at each end of a weight file
