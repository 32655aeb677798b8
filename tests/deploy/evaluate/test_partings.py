"""Where answers part from the teacher's. `pytest tests/deploy/evaluate/test_partings.py`"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.partings import partings
from tests.deploy.cli.test_cli import opdlm
from tests.tiny import request, save_lossless, save_teacher


@torch.no_grad()
def test_gaps_are_those_of_brute_force(tmp_path) -> None:
    teacher = CheckpointDecoder(save_teacher(tmp_path / "teacher"))
    requests = [request(length, i, 9, vocab=17) for i, length in enumerate((3, 5, 4, 6))]
    theirs = teacher.answer(requests, teacher.base, 4).responses
    ours = [ids.copy() for ids in theirs]
    tops = [
        teacher.model(torch.from_numpy(np.concatenate([r.prompt_ids, ids]).astype(np.int64))[None])
        .logits[0, len(r.prompt_ids) - 1 : -1, : teacher.facts.tokens.end]
        .topk(3)
        for r, ids in zip(requests, theirs, strict=True)
    ]
    gaps = [(top.values[:, 0] - top.values[:, 1]).numpy() for top in tops]
    parted = {0: (0, 1), 2: (2, 2)}  # by answer, the first place that differs and the rank of its token
    for i, (place, rank) in parted.items():
        ours[i][place] = tops[i].indices[place, rank]
        ours[i][place + 1 :] = 0  # what comes later says nothing
    ours[3] = ours[3][:-1]  # an answer that ends early has no token that differs
    found = partings(teacher.model, requests, ours, theirs, 1000, teacher.facts.tokens)
    assert found is not None
    assert (found.answers, found.among_two_best) == (2, 0.5)
    expected = [gaps[i][place] for i, (place, _) in parted.items()]
    assert (found.median_gap, found.largest_gap) == pytest.approx((np.median(expected), max(expected)), abs=1e-5)
    assert found.median_gap_of_all == pytest.approx(np.median(np.concatenate(gaps)), abs=1e-5)
    assert partings(teacher.model, requests, theirs, theirs, 1000, teacher.facts.tokens) is None


def test_eval_looks_where_verified_answers_differ(chain_teacher, tmp_path) -> None:
    """In float32 nowhere; beside another teacher's answers it says where."""
    student, other = save_lossless(chain_teacher, tmp_path), tmp_path / "other"
    asked = ("--task", "chain", "--problems", 8, "--max-new-tokens", 12, "--output", tmp_path / "o.json")
    text = opdlm("eval", student, *asked, "--teacher", chain_teacher)
    row = json.loads((tmp_path / "o.json").read_text())["rows"][1]
    assert (row["decoding"], row["agreement"], row["partings"]) == ("verified", 1, None)
    assert "two best logits" not in text
    changed = CheckpointDecoder(chain_teacher)
    changed.model.get_output_embeddings().weight.data.neg_()
    changed.model.save_pretrained(other)
    changed.tokenizer.save_pretrained(other)
    text = opdlm("eval", student, *asked, "--teacher", other)
    row = json.loads((tmp_path / "o.json").read_text())["rows"][1]
    assert row["partings"]["answers"] == 8
    assert row["partings"]["largest_gap"] >= row["partings"]["median_gap"] > 0
    assert "two best logits" in text
