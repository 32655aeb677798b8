"""lm-eval's requests for likelihoods: the teacher's own for a lossless student, a bound for others that ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from opdlm.common.batches import in_groups
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.facts import ModelFacts, never_drawn, read_facts, require_mask
from opdlm.deploy.evaluate.decoders import CheckpointDecoder, Decoder
from opdlm.deploy.evaluate.likelihood import Bound, clean_likelihoods, likelihood_bound

EXACT = ("generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling")
WITH_BOUND = ("generate_until", "multiple_choice")
"""Kinds of requests with `--likelihood bound`. The others also ask whether greedy decoding writes the text, or for
perplexities, of which a bound says little."""
BOUND_SAMPLES = 32


class Likelihoods:
    """The part of `OpdlmLM` that answers requests for likelihoods."""

    decoder: Decoder
    seed: int
    batch_size: int
    likelihood: str | None
    """`bound`: a lower bound stands for a student's likelihood. None: only exact likelihoods are given."""
    likelihood_samples: int
    """Samples of each bound."""
    _templated: bool
    bounds: list[Bound]
    """Those that were estimated so far."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p(continuation | context), and whether greedy decoding writes it; a bound says False of the latter.

        Raises:
            OpdlmError: the checkpoint has no likelihood, or none was asked for.
        """
        check_likelihood("loglikelihood", self.decoder.facts, self.likelihood, (*WITH_BOUND, "loglikelihood"))
        pairs = [self._encode_pair(*request.args) for request in requests]
        return self._likelihoods(pairs, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of whole texts, each token with as much context as fits; not with a bound.

        Raises:
            OpdlmError: the checkpoint has no exact likelihood.
        """
        facts, owners, pairs = self.decoder.facts, list[int](), list[tuple[np.ndarray, np.ndarray]]()
        check_likelihood("loglikelihood_rolling", facts, self.likelihood, WITH_BOUND)
        for i, request in enumerate(requests):
            (text,) = request.args
            ids = self.decoder.tokenizer(text, add_special_tokens=False)["input_ids"]
            # A window's text needs as many positions as its context before it and itself but one.
            for window in get_rolling_token_windows(ids, facts.eos_ids[0], facts.context - 1, 1):
                context, part = make_disjoint_window(window)
                owners.append(i)
                pairs.append((np.array(context, dtype=np.int32), np.array(part, dtype=np.int32)))
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._likelihoods(pairs, [], disable_tqdm), strict=True):
            totals[i] += total
        return totals

    def _encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Context and continuation `[P]` and `[R]` int32, split where the tokens of the context end."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation  # a token most often begins with the space
        if not stripped:
            begin = np.array(self.decoder.facts.eos_ids[:1], dtype=np.int32)
            return begin, self.decoder.encode(continuation, templated=True)
        before = self.decoder.encode(stripped, self._templated)
        whole = self.decoder.encode(stripped + continuation, self._templated)
        return whole[: len(before)], whole[len(before) :]

    def _likelihoods(
        self, pairs: list[tuple[np.ndarray, np.ndarray]], requests: list[Instance], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        decoder, facts = self.decoder, self.decoder.facts
        if not isinstance(decoder, CheckpointDecoder):
            raise OpdlmError("--actors: likelihoods are computed in this process; give --actors 0")
        grid = BlockGrid(decoder.base.block_size, decoder.base.block_grid)
        for i, (context, text) in enumerate(pairs):
            name = f"{requests[i].task_name} document {requests[i].doc_id}" if requests else f"text {i}"
            end = len(context) + len(text)
            if self.likelihood is not None:  # to the end of its last block
                end = len(context) + grid.kept_length(len(context), max(len(text), 1))
            if not len(text) or end > facts.context:
                found = f"takes {end} positions of {facts.context}" if len(text) else "has no tokens behind its context"
                raise OpdlmError(f"{name}: a text {found}, so it has no likelihood")
        never, answers = never_drawn(facts), list[tuple[float, bool]]()
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as bar:
            for first, part in enumerate(in_groups(pairs, self.batch_size)):
                if self.likelihood is None:
                    new = clean_likelihoods(decoder.model, part, never, self.batch_size)
                else:
                    bounds = [
                        likelihood_bound(
                            decoder.model,
                            context,
                            text,
                            grid,
                            facts.form,
                            never,
                            require_mask(facts),
                            self.likelihood_samples,
                            np.random.default_rng([self.seed, first * self.batch_size + i]),
                        )
                        for i, (context, text) in enumerate(part)
                    ]
                    self.bounds += bounds
                    new = [(bound.mean, False) for bound in bounds]
                answers += new
                bar.update(len(part))
        return answers

    def likelihood_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results about the likelihoods; nothing where none was asked for."""
        if not self.bounds:
            return {}
        return {
            "likelihood": "lower bound",
            "likelihood_samples": self.likelihood_samples,
            "likelihood_stderr": float(np.mean([bound.stderr for bound in self.bounds])),
        }


def check_likelihood(what: str, facts: ModelFacts, likelihood: str | None, with_bound: tuple[str, ...]) -> None:
    """Raises `OpdlmError` for a request of a kind that this checkpoint does not answer.

    Args:
        what: kind of request, or `output_type` of a task.
        likelihood: see `Likelihoods.likelihood`.
        with_bound: kinds that a bound answers.
    """
    if facts.has_noisy_adapters:
        if likelihood is not None:
            raise OpdlmError(
                f"--likelihood: found {likelihood}; {facts.folder} is a lossless student, whose likelihoods are its "
                "teacher's, exactly; leave the option out"
            )
        return
    if what != "generate_until" and not (facts.is_student and likelihood == "bound" and what in with_bound):
        raise OpdlmError(no_likelihood(what, facts.folder, likelihood))
    if likelihood is not None and not facts.is_student:
        raise OpdlmError(f"--likelihood: found {likelihood}; {facts.folder} is autoregressive; leave the option out")


def no_likelihood(what: str, folder: Path, likelihood: str | None = None) -> str:
    """Why a request of this type is refused for this checkpoint, and what to do instead."""
    hint = "use tasks that generate (`output_type: generate_until`)"
    if not read_facts(folder).is_student:
        return (
            f"lm-eval asks for {what}, which `opdlm` gives for no checkpoint of this kind; {folder} is autoregressive, "
            f"so lm-eval's own `hf` model does (--model hf --model_args pretrained={folder}); or {hint}"
        )
    if likelihood == "bound":
        return f"lm-eval asks for {what}, which a lower bound does not answer (it does multiple_choice); {hint}"
    return (
        f"lm-eval asks for {what}, but a block-diffusion model gives no exact sequence likelihood in one pass: "
        f"the tokens of a block are revealed in many possible orders, over which it would be a sum; {hint}, or for "
        "multiple_choice take a lower bound in its place: --likelihood bound"
    )
