"""A teacher of another size than its student (the paper's A.2): folders in, losses out.

`pytest tests/learner/test_two_sizes.py`
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.backends import make_backend
from opdlm.common.config.schema import ObjectiveConfig, TeacherConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import training_mask
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import check_vocabularies, read_facts
from opdlm.common.model.load import hidden_states, load_model, load_output_matrix
from opdlm.common.types import ScoredTrajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import collate
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import gather_targets
from tests.tiny import request, save_teacher

VOCABULARY = 17  # the chain task's


@pytest.fixture(scope="module", params=[(24, 16), (16, 40)], ids=["larger teacher", "larger student"])
def pair(request, tmp_path_factory):
    """Folders of a teacher and of a student converted from another model of another width."""
    folder, (teacher_width, student_width) = tmp_path_factory.mktemp("pair"), request.param
    teacher = save_teacher(folder / "teacher", 1, hidden_size=teacher_width)
    convert_checkpoint(save_teacher(folder / "small", 2, hidden_size=student_width), folder / "student", 4, "absolute")
    return teacher, folder / "student"


def _rollouts(student):
    facts = read_facts(student)
    decoder = BlockDecoder(load_model(student), DecodeSettings(temperature=1.0), facts.mask_id, facts.eos_ids, 4)
    return decoder.decode([request(p, i, 9, vocab=VOCABULARY) for i, p in enumerate((3, 4, 6, 9))])[0]


def _batch(trajectories, teacher, student, kind: str, objective: ObjectiveConfig):
    """The scored trajectories' rows as a micro-batch, and the targets at its loss positions."""
    config = TeacherConfig(targets=kind, top_k=VOCABULARY, dtype="float32")
    scored = make_backend(str(teacher), config).score(trajectories)
    mask_id = read_facts(student).mask_id
    rows = [
        row
        for t, s in zip(trajectories, scored, strict=True)
        for row in build_rows(ScoredTrajectory(t, s), BlockGrid(4), objective, mask_id, np.random.default_rng(t.index))
    ]
    head = load_output_matrix(teacher, "float32") if kind == "hidden" else None
    return collate(rows), gather_targets(rows, head, objective)


def _by_hand(batch, teacher, student) -> torch.Tensor:
    """KL(teacher || student) at each loss position from both models' plain logits."""
    mask = training_mask(batch.samples, batch.copies, batch.blocks)
    logits = student.lm_head(hidden_states(student, batch.input_ids, batch.position_ids, mask))
    ours = logits[batch.loss_line, batch.loss_column, :VOCABULARY].log_softmax(-1)
    theirs = []
    for row in batch.rows:
        t = row.scored.trajectory
        clean = torch.from_numpy(np.concatenate([t.prompt_ids, t.response]).astype(np.int64))
        after = teacher(clean[None]).logits[0].log_softmax(-1)
        theirs.append(after[torch.from_numpy(len(t.prompt_ids) + row.loss_positions - 1)])
    teacher_logprobs = torch.cat(theirs)
    return (teacher_logprobs.exp() * (teacher_logprobs - ours)).sum(-1)


@pytest.mark.parametrize("kind", ["hidden", "logits", "topk"])
def test_losses_are_those_of_the_plain_logits(pair, kind) -> None:
    teacher, student = pair
    check_vocabularies(read_facts(teacher), read_facts(student))
    objective = ObjectiveConfig(exclude_eos=False, top_k=VOCABULARY if kind == "topk" else 0)
    trajectories = _rollouts(student)
    batch, targets = _batch(trajectories, teacher, student, kind, objective)
    model = load_model(student)
    assert model.config.hidden_size != load_model(teacher).config.hidden_size
    with torch.no_grad():
        losses = DistillModule(model, objective, 5)(batch, targets, torch.ones(len(batch.loss_row)))[1]
        expected = _by_hand(batch, load_model(teacher), model)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert (losses > 0.01).any(), "two random models differ"


def test_the_student_learns_from_the_other_size(pair) -> None:
    teacher, student = pair
    objective = ObjectiveConfig(exclude_eos=False)
    batch, targets = _batch(_rollouts(student), teacher, student, "hidden", objective)
    module = DistillModule(load_model(student).train(), objective, 64)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    weights = torch.full((len(batch.loss_row),), 1 / len(batch.loss_row))
    history = []
    for _ in range(20):
        loss, _ = module(batch, targets, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 3
