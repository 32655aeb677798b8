"""Teacher and student of one tokenizer, whose matrices are padded to other sizes: folders in, losses out.

`pytest tests/learner/test_padded_vocabularies.py`
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.backends import make_backend
from opdlm.common.config.schema import ObjectiveConfig, TeacherConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.grid import BlockGrid
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import check_vocabularies, read_facts, shared_tokens
from opdlm.common.model.load import load_model, load_output_matrix
from opdlm.common.model.tokenizer import check_tokenizers
from opdlm.common.token_ids import TokenIds
from opdlm.common.types import ScoredTrajectory
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import collate
from opdlm.learner.rows import build_rows
from opdlm.learner.targets import gather_targets
from tests.tiny import request, save_teacher

TOKENS, HOLE = 17, 9
"""Tokens of the chain task's tokenizer, and one that the tests take out of it."""
OBJECTIVES = [
    ObjectiveConfig(exclude_eos=False),
    ObjectiveConfig(exclude_eos=False, reverse_weight=1.0),
    ObjectiveConfig(exclude_eos=False, reverse_weight=0.3),
    ObjectiveConfig(exclude_eos=False, divergence="jsd"),
    ObjectiveConfig(exclude_eos=False, top_k=5),
    ObjectiveConfig(exclude_eos=False, top_k=5, tail="bucket", reverse_weight=0.5),
]
KINDS = ["hidden", "logits", "topk"]


def pad(source: Path, destination: Path, rows: int) -> Path:
    """A copy of a checkpoint whose matrices have `rows` rows more, with larger logits than any token has."""
    model = load_model(source)
    spare = 30 * torch.randn(rows, model.config.hidden_size, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        matrices = [torch.cat([m.weight, spare]) for m in (model.get_input_embeddings(), model.lm_head)]
    model.resize_token_embeddings(len(matrices[0]), mean_resizing=False)
    with torch.no_grad():
        for module, matrix in zip((model.get_input_embeddings(), model.lm_head), matrices, strict=True):
            module.weight.copy_(matrix)
    shutil.copytree(source, destination)
    model.save_pretrained(destination)
    return destination


def take_out(folder: Path, token: int) -> None:
    """Takes a token out of a tokenizer; the ids of the others stay."""
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocabulary = raw["model"]["vocab"]
    del vocabulary[next(text for text, i in vocabulary.items() if i == token)]
    file.write_text(json.dumps(raw))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path_factory):
    """(teacher, student) without padding, and the same models with padding. The student is wider than the teacher."""
    root = tmp_path_factory.mktemp("padded")
    teacher = save_teacher(root / "teacher", 1, hidden_size=16)
    small = save_teacher(root / "small", 2, hidden_size=24, tied=request.param)
    convert_checkpoint(small, root / "student", 4, "absolute")
    padded = pad(teacher, root / "padded-teacher", 15), pad(root / "student", root / "padded-student", 7)
    return (teacher, root / "student"), padded


def rollouts(student: Path):
    facts = read_facts(student)
    settings = DecodeSettings(temperature=1.0, strategy="low_confidence_static")
    decoder = BlockDecoder(load_model(student), settings, facts.mask_id, facts.eos_ids, 4, tokens=facts.tokens)
    return decoder.decode([request(p, i, 9, vocab=HOLE) for i, p in enumerate((3, 4, 6, 9))])[0]


def losses_of(trajectories, teacher: Path, student: Path, kind: str, objective: ObjectiveConfig, top_k: int = TOKENS):
    """The losses at all loss positions, and the student after a backward pass."""
    tokens, mask_id = shared_tokens(read_facts(teacher), read_facts(student)), read_facts(student).mask_id
    config = TeacherConfig(targets=kind, top_k=top_k, dtype="float32")
    scored = make_backend(str(teacher), config).score(trajectories)
    rows = [
        row
        for t, s in zip(trajectories, scored, strict=True)
        for row in build_rows(ScoredTrajectory(t, s), BlockGrid(4), objective, mask_id, np.random.default_rng(t.index))
    ]
    head = load_output_matrix(teacher, "float32") if kind == "hidden" else None
    batch, targets = collate(rows), gather_targets(rows, head, objective, tokens)
    model = load_model(student)
    loss, losses = DistillModule(model, objective, 5)(batch, targets, torch.ones(len(batch.loss_row)))
    loss.backward()
    return losses, model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_padding_changes_no_rollout_no_loss_and_no_gradient(folders, kind, objective) -> None:
    (teacher, student), (padded_teacher, padded_student) = folders
    if kind == "topk" and not objective.top_k:
        objective = objective.model_copy(update={"top_k": TOKENS})
    check_vocabularies(read_facts(padded_teacher), read_facts(padded_student))
    check_tokenizers(read_facts(padded_teacher), read_facts(padded_student))
    before, after = rollouts(student), rollouts(padded_student)
    assert [t.response_ids.tolist() for t in before] == [t.response_ids.tolist() for t in after]
    expected, plain = losses_of(before, teacher, student, kind, objective)
    losses, model = losses_of(after, padded_teacher, padded_student, kind, objective)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(losses).all()
    assert losses.max() > 0.01, "two random models differ"
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient.shape != wanted[name].shape:
            assert not gradient[len(wanted[name]) :].any(), "no row of padding learns"
            gradient = gradient[: len(wanted[name])]
        torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_hole_between_the_tokens_is_no_outcome(folders, tmp_path, kind, objective) -> None:
    """However likely teacher or student find a row that no token has, it is never drawn and changes no loss."""
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders[1]]
    for folder in copies:
        take_out(folder, HOLE)
    if kind == "topk" and not objective.top_k:
        objective = objective.model_copy(update={"top_k": TOKENS - 1})
    facts = [read_facts(folder) for folder in copies]
    assert shared_tokens(*facts) == TokenIds(TOKENS, frozenset([HOLE]))
    check_vocabularies(*facts)
    before = rollouts(copies[1])
    expected, _ = losses_of(before, *copies, kind, objective, TOKENS - 1)
    for folder in copies:
        model = load_model(folder)
        with torch.no_grad():
            model.lm_head.weight[HOLE] = -40 * model.lm_head.weight[HOLE]
        model.save_pretrained(folder)
    after = rollouts(copies[1])
    assert all(HOLE not in t.response_ids and t.response_ids.max() < TOKENS for t in after)
    losses, model = losses_of(before, *copies, kind, objective, TOKENS - 1)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    if not model.config.tie_word_embeddings:
        assert not model.lm_head.weight.grad[HOLE].any()


def test_the_teacher_writes_tokens_only(folders) -> None:
    """The rows of padding have the largest logits, and a high temperature makes all rows likely."""
    _, (teacher, _) = folders
    backend = make_backend(str(teacher), TeacherConfig(dtype="float32"))
    prompts = [np.array([i], np.int32) for i in range(3, TOKENS)]
    for temperature in (0.0, 1.0, 50.0):
        assert max(ids.max() for ids in backend.generate(prompts, 12, 8, temperature, 0)) < TOKENS


def test_other_tokens_are_a_mismatch(folders, tmp_path) -> None:
    (teacher, student), _ = folders
    other = Path(shutil.copytree(student, tmp_path / "other"))
    take_out(other, HOLE)
    with pytest.raises(OpdlmError, match=r"vocabulary mismatch: the teacher .* has 17 tokens, the student "):
        check_vocabularies(read_facts(teacher), read_facts(other))
