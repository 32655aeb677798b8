"""The teacher as a vLLM engine: top-K targets from prompt log-probabilities. vLLM is imported when a teacher is made.

A trajectory's clean tokens except the last are vLLM's prompt, and vLLM generates one token. Row i of the prompt's
log-probabilities is the distribution after tokens `< i`. So response positions 0 to R - 2 have the rows from P on, and
position R - 1 has the row of the generated token. The context only has to hold the trajectory itself.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from opdlm.actors.progress import OnBatch, unheard
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.model.facts import read_facts
from opdlm.common.types import TeacherTargets, TopKTargets, Trajectory

_LOGITS_BYTES = 1 << 29
"""Most bytes of float32 logits `[scheduled tokens, V]` at one time. vLLM makes the logits of a whole prefill chunk at
once, in memory that its profile of the GPU does not count."""
_MEMORY_SHARE = 0.9
"""vLLM's share of the actor's part of a GPU; the rest is for those logits and their log-softmax."""


class FlatRows(Protocol):
    """vLLM's `FlatLogprobs`: the entries of all rows, one after another.

    Row i has the entries from `start_indices[i]` up to `end_indices[i]`, exclusive. The first entry is the actual token
    of the sequence; the next K are the likeliest tokens, best first.
    """

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


class VllmTeacher:
    """A `TeacherBackend` (actors/teacher/backends.py) for `targets: topk`, tensor-parallel inside its own actor."""

    def __init__(self, folder: str, config: TeacherConfig) -> None:
        # The actor already has a process of its own. The engine runs in it, so no log-probability is pickled.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        vllm: Any = importlib.import_module("vllm")
        facts = read_facts(folder)
        self._sampling_params: Any = vllm.SamplingParams
        self._eos_ids, self._vocab_size, self._top_k = facts.eos_ids, facts.tokens.end, config.top_k
        chunk = max(min(config.batch_tokens, _LOGITS_BYTES // (4 * facts.vocab_size)), 1)
        share = {"gpu_memory_utilization": _MEMORY_SHARE * min(config.gpus_per_actor, 1)}
        self._engine: Any = vllm.LLM(
            model=folder,
            dtype=config.dtype,
            skip_tokenizer_init=True,
            generation_config="vllm",  # vLLM's defaults instead of the settings in the model's folder
            load_format="safetensors",  # `auto` might unpickle a file
            trust_remote_code=False,
            enforce_eager=True,
            enable_prefix_caching=False,  # a cached prefix has no log-probabilities
            max_model_len=facts.context,
            max_logprobs=config.top_k,
            max_num_batched_tokens=chunk,
            max_num_seqs=min(chunk, 256),
            tensor_parallel_size=config.tensor_parallel,
            # Without `mp`, vLLM finds itself inside Ray and would start Ray actors for its workers.
            distributed_executor_backend="mp" if config.tensor_parallel > 1 else None,
            disable_log_stats=True,
            **(share if config.gpus_per_actor else {}),
        )
        if others := facts.tokens.others(facts.vocab_size):  # runs in every worker of the engine
            self._engine.apply_model(functools.partial(exclude_rows, others))

    def score(self, trajectories: list[Trajectory], on_batch: OnBatch = unheard) -> list[TeacherTargets]:
        """The `TopKTargets` of each trajectory, in order. `on_batch` is not called: vLLM scores them in one call."""
        sampling = self._sampling_params(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self._top_k,
            logprobs=self._top_k,
            flat_logprobs=True,  # flat lists: dicts, the default, cost four times as much
            detokenize=False,
        )
        clean = [np.concatenate([t.prompt_ids, t.response])[:-1] for t in trajectories]
        outputs = self._run(clean, sampling)
        return [
            parse_targets(t, output.prompt_logprobs, output.outputs[0].logprobs, self._top_k, self._vocab_size)
            for t, output in zip(trajectories, outputs, strict=True)
        ]

    def generate(
        self,
        prompts: list[np.ndarray],
        max_new_tokens: int,
        batch_size: int,
        temperature: float,
        seed: int,
        on_batch: OnBatch = unheard,
        stops: Sequence[Sequence[str]] = (),
    ) -> list[np.ndarray]:
        """Responses `[R] int32`, up to and with the first end-of-sequence token, in the order of the prompts.

        Every prompt has its own random generator, seeded with `seed` plus the prompt's index. `batch_size` is ignored:
        vLLM batches by the memory that it has. `on_batch` is not called: vLLM answers all prompts in one call.

        Raises:
            OpdlmError: there are stop strings; the engine has no tokenizer that would find them.
        """
        if any(stops):
            raise OpdlmError("teacher.backend: found vllm; stop strings need the backend transformers")
        sampling = [
            self._sampling_params(
                max_tokens=max_new_tokens,
                temperature=temperature,
                seed=(seed + index) % 2**63 if temperature > 0 else None,
                stop_token_ids=list(self._eos_ids),
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        return [np.array(output.outputs[0].token_ids, dtype=np.int32) for output in self._run(prompts, sampling)]

    def probe(self) -> None:
        """See `TeacherBackend`."""
        sampling = self._sampling_params(max_tokens=1, temperature=0.0, detokenize=False)
        self._run([np.zeros(1, dtype=np.int32)], sampling)

    def _run(self, prompts: list[np.ndarray], sampling: Any) -> list[Any]:
        """vLLM's answers to the prompts; `sampling`: parameters for all prompts, or a list with those of each."""
        return self._engine.generate([{"prompt_token_ids": p.tolist()} for p in prompts], sampling, use_tqdm=False)


def exclude_rows(rows: list[int], model: Any) -> None:
    """Has a model of vLLM give these rows of its vocabulary the logit minus infinity.

    They are the rows that no token has. vLLM itself knows of no such rows, and would count them in its softmax.
    """
    compute_logits = model.compute_logits

    def over_tokens(*args: Any, **kwargs: Any) -> Any:
        logits = compute_logits(*args, **kwargs)
        if logits is not None:  # a worker that gathers no logits has none
            logits.index_fill_(-1, logits.new_tensor(rows, dtype=torch.int64), float("-inf"))
        return logits

    model.compute_logits = over_tokens


def parse_targets(
    trajectory: Trajectory, prompt: FlatRows, generated: FlatRows, top_k: int, vocab_size: int
) -> TopKTargets:
    """Targets `[R, K]` of one trajectory from vLLM's answer to its clean tokens except the last (METHOD.md section 3).

    Args:
        prompt: log-probabilities of the prompt: P + R - 1 rows. Row 0 is empty, the others have K + 1 entries.
        generated: log-probabilities of the generated token: one row of K + 1 entries.
        top_k: K.
        vocab_size: the teacher's rows up to its last token.

    Raises:
        OpdlmError: the rows have another layout or hold a NaN. A score is never made up.
    """
    first, response = len(trajectory.prompt_ids), trajectory.response
    ids, logprobs = (
        np.concatenate(parts) for parts in zip(_rows(prompt, first, top_k), _rows(generated, 0, top_k), strict=True)
    )
    aligned = len(ids) == len(response) and (ids[:-1, 0] == response[:-1]).all()
    ordered = (np.diff(logprobs[:, 1:]) <= 0).all() and not np.isnan(logprobs[:, 1:]).any()
    if not aligned or not ordered:
        raise OpdlmError(
            f"teacher: vLLM's log-probabilities of sample {trajectory.index} are not {len(response)} rows of the "
            f"actual token and then the {top_k} likeliest tokens, best first; use teacher.backend `transformers`"
        )
    # Column 0 is dropped: if the actual token is one of the K likeliest, another column has it too.
    return TopKTargets(np.ascontiguousarray(ids[:, 1:]), np.ascontiguousarray(logprobs[:, 1:]), vocab_size)


def _rows(flat: FlatRows, first: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows from `first` on: token ids `[rows, K + 1] int32` and log-probabilities `[rows, K + 1] float32`."""
    starts, ends = flat.start_indices[first:], flat.end_indices[first:]
    widths = {end - start for start, end in zip(starts, ends, strict=True)}
    if not widths <= {top_k + 1}:
        raise OpdlmError(
            f"teacher: vLLM gave rows of {sorted(widths)} log-probabilities where {top_k + 1} were expected (the "
            f"actual token and the {top_k} likeliest); use teacher.backend `transformers`"
        )
    inside = slice(starts[0], ends[-1]) if starts else slice(0)
    ids = np.array(flat.token_ids[inside], dtype=np.int32)
    logprobs = np.array(flat.logprobs[inside], dtype=np.float32)
    return ids.reshape(-1, top_k + 1), logprobs.reshape(-1, top_k + 1)
