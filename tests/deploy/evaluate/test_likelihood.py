"""Likelihoods against exact enumeration. `pytest tests/deploy/evaluate/test_likelihood.py`"""

from __future__ import annotations

from itertools import combinations, permutations
from math import comb
from typing import Any

import numpy as np
import pytest
import torch

from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import block_causal
from opdlm.common.model.load import hidden_states
from opdlm.deploy.evaluate.likelihood import clean_likelihoods, likelihood_bound
from tests.actors.rollout.test_verify import drafting_model
from tests.tiny import FORMS_AND_GRIDS, MASK, request, tiny_model

SIZE, NEVER = 3, (MASK, 30)


@torch.no_grad()
def conditional(model: Any, tokens: list[int], masked: set[int], grid: BlockGrid, form: StudentForm, p: int) -> Any:
    """`[T, V]`: log-probabilities of the tokens of the last block's sequence, with masks at some positions."""
    length = len(tokens)
    ids = torch.tensor([[MASK if i in masked else token for i, token in enumerate(tokens)]])
    blocks = ((torch.arange(length) + grid.offset(p)) // grid.block_size)[None]
    seen = block_causal(blocks, blocks)
    if form.causal:
        last = blocks[0] == blocks[0, -1]
        seen = seen & (last[:, None] | torch.ones(length, length).tril().bool())
    logits = model.lm_head(hidden_states(model, ids, mask=seen))[0]
    if form.logit_shift:
        clean = torch.tensor([tokens])
        before = model.lm_head(hidden_states(model, clean, mask=_clean(seen, blocks, form)))[0]
        start = int((blocks[0] == blocks[0, -1]).nonzero()[0])
        logits = logits.roll(1, 0)
        if start > 0:
            logits[start] = before[start - 1]
    logits[:, list(NEVER)] = float("-inf")
    return logits.log_softmax(-1)


def _clean(seen: torch.Tensor, blocks: torch.Tensor, form: StudentForm) -> torch.Tensor:
    return torch.ones(seen.shape).tril().bool() if form.causal else block_causal(blocks, blocks)


def enumerated(model: Any, context: list[int], text: list[int], grid: BlockGrid, form: StudentForm) -> Any:
    """The bound as it is estimated, and as it is defined, and log p of a decoder with a uniform order."""
    p, by_masks, by_orders, exact = len(context), 0.0, 0.0, 0.0
    positions = np.arange(p, p + len(text))
    blocks = (positions + grid.offset(p)) // grid.block_size
    for block in np.unique(blocks):
        members = positions[blocks == block].tolist()
        end = (int(block) + 1) * grid.block_size - grid.offset(p)
        tokens = [*context, *text, *[MASK] * grid.block_size][:end]
        rest, cache = set(range(members[-1] + 1, end)), {}

        def at(masked: tuple[int, ...], i: int, tokens=tokens, rest=rest, cache=cache) -> float:
            if masked not in cache:
                cache[masked] = conditional(model, tokens, {*masked, *rest}, grid, form, p)
            return float(cache[masked][i, tokens[i]])

        n, orders = len(members), list(permutations(members))
        for k in range(1, n + 1):
            for masked in combinations(members, k):
                by_masks += sum(at(masked, i) for i in masked) / (k * comb(n, k))
        sums = [sum(at(tuple(sorted(order[j:])), order[j]) for j in range(n)) for order in orders]
        by_orders += float(np.mean(sums))
        exact += float(np.log(np.mean(np.exp(sums))))
    return by_masks, by_orders, exact


@pytest.mark.parametrize(("form", "kind"), FORMS_AND_GRIDS)
def test_the_bound_against_enumeration(form: StudentForm, kind: Any) -> None:
    model, grid = tiny_model(3), BlockGrid(SIZE, kind)
    for prompt, length in ((4, 5), (3, 2)):
        context, text = request(prompt, 1, vocab=28).prompt_ids, request(length, 2, vocab=28).prompt_ids
        by_masks, by_orders, exact = enumerated(model, context.tolist(), text.tolist(), grid, form)
        assert by_masks == pytest.approx(by_orders, abs=1e-4)
        assert by_orders < exact + 1e-6
        rng = np.random.default_rng(0)
        found = likelihood_bound(model, context, text, grid, form, NEVER, MASK, 600, rng)
        assert found.samples == 600
        assert abs(found.mean - by_masks) < 4 * found.stderr + 1e-4
        assert 0 < found.stderr < 0.1 * abs(found.mean)


def test_blocks_of_one_token_are_exact() -> None:
    """With causal context and logit shift they are autoregressive: the clean path's likelihood."""
    model, form = tiny_model(3), StudentForm(logit_shift=True, context="causal")
    context, text = request(4, 1, vocab=28).prompt_ids, request(5, 2, vocab=28).prompt_ids
    rng = np.random.default_rng(0)
    found = likelihood_bound(model, context, text, BlockGrid(1, "response"), form, NEVER, MASK, 3, rng)
    ((clean, _),) = clean_likelihoods(model, [(context, text)], NEVER, 4)
    assert found.mean == pytest.approx(clean, abs=1e-4)
    assert found.stderr == pytest.approx(0, abs=1e-5)


def test_the_clean_path_of_a_lossless_student_is_its_base_model() -> None:
    """Whatever the adapters are; a text that greedy decoding writes is told as such."""
    base, student = tiny_model(0), drafting_model(0)
    pairs = [(request(n, n, vocab=28).prompt_ids, request(m, 9, vocab=28).prompt_ids) for n, m in ((3, 4), (7, 1))]
    context = pairs[0][0]
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([context.tolist()])).logits[0, -1]
        logits[list(NEVER)] = float("-inf")
    pairs.append((context, np.array([int(logits.argmax())], dtype=np.int32)))
    found = clean_likelihoods(student, pairs, NEVER, 2)
    for (prompt, text), (total, _) in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([[*prompt.tolist(), *text.tolist()]])).logits[0]
        logits[:, list(NEVER)] = float("-inf")
        logprobs = logits.log_softmax(-1)
        places = zip(range(len(prompt) - 1, len(prompt) + len(text) - 1), text.tolist(), strict=True)
        assert total == pytest.approx(sum(float(logprobs[i, token]) for i, token in places), abs=1e-4)
    assert [greedy for _, greedy in found] == [False, False, True]
