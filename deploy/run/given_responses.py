"""Given responses for `off_policy_kd` and `cft`: from the data, or written once by the teacher and kept as parquet."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.exceptions import RayError

from opdlm.actors.pool import ActorPool
from opdlm.common.batches import in_groups
from opdlm.common.config import OpdlmConfig
from opdlm.common.data.prompts import Prompt
from opdlm.common.errors import ConfigError, OpdlmError, first_line, last_line
from opdlm.common.files import atomic_file
from opdlm.common.model.facts import read_facts
from opdlm.common.model.shards import weights_fingerprint
from opdlm.common.retry import Attempts, StoreWait, store_is_full
from opdlm.common.seeds import sample_seed
from opdlm.deploy.observe.progress import RunProgress

log = logging.getLogger("opdlm.given_responses")

_CALLS_PER_BATCH = 4
_KEY = b"opdlm"
_TOKENS = pa.large_list(pa.int32())
"""Lists of token ids with 64-bit offsets: a million long responses have more than 2^31 tokens."""
TASK = "teacher responses"
"""The name under which their progress is shown."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a file of responses depends on; a file of another recipe is refused."""

    teacher: str
    """Fingerprint of the teacher's weights."""
    prompts: str
    """Fingerprint of the prompts."""
    end_tokens: list[int]
    """Ids at which the teacher ends a response."""
    max_new_tokens: int
    temperature: float
    seed: int
    dtype: str
    """Number format in which the teacher computes (`teacher.dtype`)."""

    @property
    def digest(self) -> str:
        """Fingerprint of the recipe."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class GivenResponses:
    """Responses by prompt id, and the compute that made them (also where they came from a cache)."""

    by_prompt: dict[str, np.ndarray]  # [R] int32 each
    forward_tokens: int
    """Tokens that went through the teacher; 0 for responses from data."""
    cached: bool

    def cut_at_inner_end(self, eos_ids: Sequence[int]) -> int:
        """Number of responses with an end-of-sequence token before their last token; they end at the first."""
        return sum(bool(np.isin(r[:-1], eos_ids).any()) for r in self.by_prompt.values())


def known_responses(config: OpdlmConfig, prompts: Sequence[Prompt], digest: str) -> GivenResponses | None:
    """Responses that need no actor: from the data or from the cache. None: some are missing, or none are needed.

    Args:
        prompts: the prompts that the run trains on (`PromptOrder.used`).
        digest: fingerprint of all prompts of the data.

    Raises:
        ConfigError: see `read_responses`.
    """
    if config.objective.kind not in ("cft", "off_policy_kd"):
        return None
    if config.offline.responses == "data":
        return GivenResponses({p.prompt_id: p.response for p in prompts if p.response is not None}, 0, False)
    held = read_responses(cache_file(config), response_recipe(config, digest))
    return None if held is None or _missing(held, prompts) else _chosen(held.by_prompt, prompts, cached=True)


def cache_file(config: OpdlmConfig) -> Path:
    """Where the teacher's responses are kept."""
    return Path(config.offline.cache or Path(config.run.dir) / "offline_responses.parquet")


def response_recipe(config: OpdlmConfig, prompts_digest: str) -> Recipe:
    """The recipe of this run's responses."""
    length = config.curriculum.max_new_tokens
    longest = config.rollout.max_new_tokens
    if length is not None:  # no round trains on longer responses
        longest = int(max(length.start, length.end or 0))
    return Recipe(
        weights_fingerprint(config.model.teacher),
        prompts_digest,
        list(read_facts(config.model.teacher).eos_ids),
        longest,
        config.offline.temperature,
        config.run.seed,
        config.teacher.dtype,
    )


def read_responses(file: Path, expected: Recipe) -> GivenResponses | None:
    """The responses of a cache file, without the compute that made them; None where there is no file.

    Raises:
        ConfigError: the file is no cache of responses, or it has another recipe.
    """
    if not file.exists():
        return None
    try:
        table = pq.read_table(file)
        made = json.loads((table.schema.metadata or {})[_KEY])
        held = dict(made["recipe"])
        ids = table.column("prompt_id").to_pylist()
        responses = _arrays(table.column("response_ids"))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(f"offline.cache: {file} is no file of teacher responses from opdlm: {reason}") from None
    held = {"dtype": expected.dtype} | held  # files of earlier versions do not say it
    differing = [f"{k} (there {held.get(k)!r}, here {v!r})" for k, v in asdict(expected).items() if held.get(k) != v]
    if differing:
        raise ConfigError(
            f"offline.cache: {file} was made with other settings: {', '.join(differing)}; remove it, or give another"
            " offline.cache"
        )
    return GivenResponses(dict(zip(ids, responses, strict=True)), 0, True)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column, `[R] int32` each, without a Python number for every token."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.null_count:
        raise TypeError(f"the column response_ids holds {column.type}; expected lists of token ids")
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy().astype(np.int32, copy=False)
        arrays += [values[start:end] for start, end in itertools.pairwise(offsets.tolist())]
    return arrays


async def generate_responses(
    config: OpdlmConfig,
    prompts: Sequence[Prompt],
    teachers: ActorPool,
    recipe: Recipe,
    progress: RunProgress,
) -> GivenResponses:
    """Has the teacher actors answer the prompts, writes the cache, and returns the responses.

    A response that the cache holds already is kept: an earlier run may have needed fewer rounds. Answered chunks are
    kept beside the cache until it is complete, so a later call asks only for the missing ones.

    Args:
        prompts: the prompts that the run trains on, in the order of their first use.
        recipe: what the responses depend on.
        progress: is told how many prompts are answered.

    Raises:
        OpdlmError: the cache's folder cannot be written, a chunk failed `resources.sample_attempts` times, or the
            object store was full for `resources.call_timeout_seconds`.
    """
    file = cache_file(config)
    parts = file.with_name(f".{file.name}.{recipe.digest}.parts")
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpdlmError(f"offline.cache: {file} cannot be written: {error}") from None
    size = config.offline.batch_size * _CALLS_PER_BATCH
    held = read_responses(file, recipe)
    missing = _missing(held, prompts)
    first = -(-len(held.by_prompt) // size) if held else 0  # a chunk's number seeds it, so no number is used twice

    async def answer(number: int, chunk: Sequence[Prompt]) -> list[np.ndarray]:
        part = parts / f"{number:06d}.parquet"
        kept = read_responses(part, recipe)
        if kept is None or list(kept.by_prompt) != [p.prompt_id for p in chunk]:
            seed = sample_seed(config.run.seed, number)
            responses = await _ask(config, teachers, chunk, recipe.max_new_tokens, seed, progress)
            _write(part, chunk, responses, recipe)
        else:
            responses = list(kept.by_prompt.values())
            with progress.call(TASK, range(len(chunk))):  # answered before an interruption
                pass
        return responses

    chunks = in_groups(missing, size)
    with progress.task(TASK, len(missing)):
        answered = await asyncio.gather(*(answer(first + i, chunk) for i, chunk in enumerate(chunks)))
    _write(file, missing, [r for responses in answered for r in responses], recipe, extend=held is not None)
    shutil.rmtree(parts)
    made = read_responses(file, recipe)
    assert made is not None, "it was just written"
    return _chosen(made.by_prompt, prompts, cached=False)


def _missing(held: GivenResponses | None, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without a response."""
    return [prompt for prompt in prompts if held is None or prompt.prompt_id not in held.by_prompt]


def _chosen(responses: Mapping[str, np.ndarray], prompts: Sequence[Prompt], cached: bool) -> GivenResponses:
    """The responses to these prompts alone, and the compute that they took."""
    by_prompt = {prompt.prompt_id: responses[prompt.prompt_id] for prompt in prompts}
    return GivenResponses(by_prompt, _forward_tokens(prompts, list(by_prompt.values())), cached)


async def _ask(
    config: OpdlmConfig,
    teachers: ActorPool,
    chunk: Sequence[Prompt],
    max_new_tokens: int,
    seed: int,
    progress: RunProgress,
) -> list[np.ndarray]:
    offline, first = config.offline, chunk[0].prompt_id
    what = f"the teacher's responses to {len(chunk)} prompts (the first is {first})"
    attempts = Attempts(what, config.resources.sample_attempts)
    store = StoreWait(config.resources.call_timeout_seconds)
    arguments = ([p.ids for p in chunk], max_new_tokens, offline.batch_size, offline.temperature, seed)
    while True:
        try:
            with progress.call(TASK, range(len(chunk))) as call:
                _, (responses, _) = await teachers.call("generate", *arguments, *call.watch)
                call.tokens = sum(map(len, responses))
            return responses
        except RayError as error:
            log.warning("%s, attempt %d: %s", what, attempts.failed + 1, last_line(error))
            if store_is_full(error):
                await asyncio.sleep(store.pause(what))
            else:
                attempts.note(error)


def _write(
    file: Path, prompts: Sequence[Prompt], responses: Sequence[np.ndarray], recipe: Recipe, extend: bool = False
) -> None:
    """Writes a file of responses; `extend`: in addition to those that it holds."""
    schema = pa.schema([("prompt_id", pa.large_string()), ("prompt_ids", _TOKENS), ("response_ids", _TOKENS)])
    columns = [[p.prompt_id for p in prompts], [p.ids for p in prompts], list(responses)]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    if extend:
        table = pa.concat_tables([pq.read_table(file).cast(schema), table])
    made = {"recipe": asdict(recipe)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as staging:
        pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(made)}), staging)


def _forward_tokens(prompts: Sequence[Prompt], responses: Sequence[np.ndarray]) -> int:
    """Tokens that went through the teacher to generate the responses."""
    return sum(len(p.ids) + len(r) - 1 for p, r in zip(prompts, responses, strict=True))
