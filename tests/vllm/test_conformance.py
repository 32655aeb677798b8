"""The vLLM teacher gives what the transformers teacher gives. `make test-vllm`; skipped where vLLM is not installed."""

from __future__ import annotations

import numpy as np
import pytest

from opdlm.actors.teacher.backends import TransformersTeacher, make_backend
from opdlm.actors.teacher.vllm import VllmTeacher
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.types import LogitsTargets, TopKTargets, Trajectory
from tests.tiny import EOS, VOCABULARY, tiny_model, trajectory

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

CONTEXT = 128
LENGTHS = [(1, 1), (1, 6), (4, 1), (7, 20), (25, 3), (40, 60), (100, 28)]
"""Tokens of each prompt and response; the last pair fills the context."""


# Chunks of 24 tokens are much shorter than the longest sequence, so vLLM prefills it in several chunks.
@pytest.fixture(scope="module", params=[(4, False, 24), (16, True, 4096)], ids=["K=4, chunks", "K=16, tied"])
def teachers(request, tmp_path_factory) -> tuple[VllmTeacher, TransformersTeacher, TransformersTeacher]:
    """The teacher by vLLM, by transformers, and by transformers with logits of the whole vocabulary."""
    top_k, tied, chunk = request.param
    folder = str(tmp_path_factory.mktemp("teacher"))
    # vLLM's attention on a CPU supports head sizes from 32 on.
    tiny_model(1, tied=tied, context=CONTEXT, head_dim=32).save_pretrained(folder)

    def backend(**fields):
        settings = {"top_k": top_k, "dtype": "float32", "batch_tokens": chunk} | fields
        return make_backend(folder, TeacherConfig.model_validate(settings))

    return backend(backend="vllm", targets="topk"), backend(targets="topk"), backend(targets="logits")


def _trajectories() -> list[Trajectory]:
    rng = np.random.default_rng(0)
    return [
        trajectory(rng.integers(0, 31, p).tolist(), rng.integers(0, 31, r).tolist(), list(range(1, r + 1)))
        for p, r in LENGTHS
    ]


def test_same_targets(teachers) -> None:
    ours, expected, with_logits = (t.score(_trajectories()) for t in teachers)
    for (_, length), a, b, full in zip(LENGTHS, ours, expected, with_logits, strict=True):
        assert isinstance(a, TopKTargets)
        assert isinstance(b, TopKTargets)
        assert isinstance(full, LogitsTargets)
        assert a.token_ids.shape == b.token_ids.shape
        assert len(a.token_ids) == length
        assert (a.token_ids.dtype, a.logprobs.dtype, a.vocab_size) == (np.int32, np.float32, VOCABULARY)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        # By value: tokens of equal probability may have either order, and either of them may be the K-th.
        logprobs = full.logits - np.log(np.exp(full.logits.astype(np.float64)).sum(-1, keepdims=True))
        np.testing.assert_allclose(a.logprobs, np.take_along_axis(logprobs, a.token_ids, -1), atol=1e-4)
        assert all(len(set(row)) == len(row) for row in a.token_ids.tolist()), "a token twice in one row"


def test_same_greedy_answers(teachers) -> None:
    prompts = [t.prompt_ids for t in _trajectories()]
    ours, expected = (t.generate(prompts, 20, 4, 0.0, 0) for t in teachers[:2])
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert {a[-1] == EOS for a in ours} == {True, False}, (
        "some answers end with the end-of-sequence token, others at the limit"
    )


def test_samples_depend_on_the_seed_alone(teachers) -> None:
    # Prompts within one chunk: on a CPU, vLLM 0.32 cannot cut a prompt whose answer is sampled with a seed.
    prompts = [t.prompt_ids for t in _trajectories()[:4]]
    first, again, other = (teachers[0].generate(prompts, 20, 4, 1.0, seed) for seed in (3, 3, 4))
    assert [a.tolist() for a in first] == [a.tolist() for a in again]
    assert [a.tolist() for a in first] != [a.tolist() for a in other]
    assert all(0 < len(a) <= 20 and (a[:-1] != EOS).all() for a in first)


def test_the_engine_answers_a_probe(teachers) -> None:
    teachers[0].probe()
