"""The vLLM teacher without vLLM: from vLLM's rows to our targets. `pytest tests/actors/teacher/test_vllm.py`

The fake engine answers in the layout of vLLM 0.32 and takes its numbers from a transformers model.
`tests/vllm/test_conformance.py` checks the same with the real engine (`make test-vllm`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opdlm.actors.teacher.backends import TransformersTeacher, make_backend
from opdlm.actors.teacher.vllm import VllmTeacher, parse_targets
from opdlm.common.config.schema import TeacherConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.model.char_tokenizer import build_char_tokenizer
from opdlm.common.model.load import hidden_states, load_model
from opdlm.common.types import TopKTargets
from tests.tiny import EOS, VOCABULARY, tiny_model, trajectory

K = 4
TRAJECTORIES = [
    trajectory([5, 6, 7], [8, 9, 10, 11, EOS, 13, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 7, 9], 5),
    trajectory([5], [9], [1]),
    trajectory([5, 6, 7, 8], [9], [1]),
    trajectory([4], [9, 3, 3, 3], [1, 1, 2, 2]),
]


@dataclass
class Flat:
    """vLLM's `FlatLogprobs`: python lists with one entry per (row, rank); a row of None has no entries."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def add(self, logprobs: torch.Tensor | None, token: int = 0, k: int = K) -> None:
        """Adds a row: the actual token, then the top K tokens; the actual token occurs twice if it is one of them."""
        self.start_indices.append(len(self.logprobs))
        if logprobs is not None:
            top = logprobs.topk(k)
            self.token_ids += [token, *top.indices.tolist()]
            self.logprobs += [logprobs[token].item(), *top.values.tolist()]
            self.ranks += [int((logprobs >= logprobs[token]).sum()), *range(1, k + 1)]
            self.decoded_tokens += [None] * (k + 1)
        self.end_indices.append(len(self.logprobs))


class Engine:
    """The part of `vllm.LLM` that the teacher uses: greedy, with a transformers model."""

    made: dict

    def __init__(self, **arguments) -> None:
        Engine.made = arguments
        self.model = load_model(arguments["model"])
        self.model.compute_logits = self.model.lm_head.forward  # a method, as in vLLM

    def apply_model(self, function) -> None:
        function(self.model)

    @torch.no_grad()
    def generate(self, prompts, sampling, use_tqdm):
        each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        return [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, each, strict=True)]

    def _answer(self, prompt, sampling):
        tokens, logprobs = list(prompt), self._logprobs(prompt)
        asked, following, k = Flat(), Flat(), getattr(sampling, "logprobs", K)
        asked.add(None)
        for i in range(1, len(prompt)):
            asked.add(logprobs[i - 1], prompt[i], k)
        stops = getattr(sampling, "stop_token_ids", [])
        while len(tokens) - len(prompt) < sampling.max_tokens and tokens[-1] not in stops:
            row = self._logprobs(tokens)[-1]
            tokens.append(int(row.argmax()))
            following.add(row, tokens[-1], k)
        answer = SimpleNamespace(logprobs=following, token_ids=tokens[len(prompt) :])
        return SimpleNamespace(prompt_logprobs=asked, outputs=[answer])

    def _logprobs(self, tokens) -> torch.Tensor:
        hidden = hidden_states(self.model, torch.tensor([tokens]))
        return self.model.compute_logits(hidden)[0].float().log_softmax(-1)


@pytest.fixture
def fake_vllm(monkeypatch, tmp_path):
    """Makes `import vllm` give the engine above; returns a folder with the engine's model."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace))
    tiny_model(1).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def config(**fields) -> TeacherConfig:
    return TeacherConfig.model_validate({"targets": "topk", "top_k": K, "dtype": "float32"} | fields)


def test_targets_are_those_of_the_transformers_backend(fake_vllm) -> None:
    ours = make_backend(fake_vllm, config(backend="vllm"))
    assert isinstance(ours, VllmTeacher)
    expected = TransformersTeacher(fake_vllm, config()).score(TRAJECTORIES)
    for t, a, b in zip(TRAJECTORIES, ours.score(TRAJECTORIES), expected, strict=True):
        assert isinstance(a, TopKTargets)
        assert isinstance(b, TopKTargets)
        assert a.token_ids.shape == a.logprobs.shape == (t.response_length, K)
        assert (a.token_ids.dtype, a.logprobs.dtype, a.vocab_size) == (np.int32, np.float32, VOCABULARY)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_rows_that_no_token_has_are_no_target_and_are_not_generated(fake_vllm) -> None:
    """The folder's tokenizer has 24 tokens, and one of them leaves a hole; the matrix has 32 rows."""
    tokenizer = build_char_tokenizer("0123456789+-=;abcdefg")
    tokenizer.save_pretrained(fake_vllm)
    vocabulary = json.loads((tokenizer_file := Path(fake_vllm) / "tokenizer.json").read_text())
    del vocabulary["model"]["vocab"]["b"]
    tokenizer_file.write_text(json.dumps(vocabulary))
    ours, plain = make_backend(fake_vllm, config(backend="vllm", top_k=23)), make_backend(fake_vllm, config(top_k=23))
    missing = tokenizer.convert_tokens_to_ids("b")
    for a, b in zip(ours.score(TRAJECTORIES), plain.score(TRAJECTORIES), strict=True):
        assert isinstance(a, TopKTargets)
        assert isinstance(b, TopKTargets)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        assert all(sorted(row) == [i for i in range(24) if i != missing] for row in a.token_ids.tolist())
        np.testing.assert_allclose(np.exp(a.logprobs).sum(-1), 1, atol=1e-5)
    prompts = [np.array([i], np.int32) for i in range(3, 24)]
    for written in (t.generate(prompts, 12, 8, 0.0, 0) for t in (ours, plain)):
        assert all(ids.max() < 24 and missing not in ids for ids in written)
    assert max(plain.generate(prompts, 12, 8, 5.0, 0), key=lambda ids: ids.max()).max() < 24


def test_generation_ends_at_the_end_token_or_the_limit(fake_vllm) -> None:
    prompts = [np.array(ids, np.int32) for ids in ([3, 4, 5, 6, 7], [5, 9], [8])]
    ours = make_backend(fake_vllm, config(backend="vllm")).generate(prompts, 6, 2, 0.0, 0)
    expected = make_backend(fake_vllm, config()).generate(prompts, 6, 2, 0.0, 0)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == np.int32
        np.testing.assert_array_equal(a, b)


def test_the_engine_gets_the_settings_of_the_run_file(fake_vllm) -> None:
    make_backend(fake_vllm, config(backend="vllm", batch_tokens=99))
    on_cpu = Engine.made
    assert (on_cpu["max_model_len"], on_cpu["max_logprobs"], on_cpu["max_num_batched_tokens"]) == (128, K, 99)
    assert on_cpu["max_num_seqs"] <= 99  # vLLM refuses more sequences than tokens
    assert on_cpu["distributed_executor_backend"] is None
    assert "gpu_memory_utilization" not in on_cpu
    make_backend(fake_vllm, config(backend="vllm", tensor_parallel=2, gpus_per_actor=2))
    assert (Engine.made["tensor_parallel_size"], Engine.made["distributed_executor_backend"]) == (2, "mp")
    whole = Engine.made["gpu_memory_utilization"]
    make_backend(fake_vllm, config(backend="vllm", gpus_per_actor=0.5))
    assert Engine.made["gpu_memory_utilization"] == pytest.approx(whole / 2)


def _rows_of(t, k: int = K) -> tuple[Flat, Flat]:
    rows = torch.randn(len(t.prompt_ids) + t.response_length, VOCABULARY).log_softmax(-1)
    asked, following = Flat(), Flat()
    asked.add(None)
    for i, token in enumerate(np.concatenate([t.prompt_ids, t.response])[1:-1]):
        asked.add(rows[i], int(token), k)
    following.add(rows[-1], int(rows[-1].argmax()), k)
    return asked, following


def test_the_entry_of_the_actual_token_is_no_target_column() -> None:
    """The actual token is the likeliest one (then vLLM's row has it twice), or it is not one of the top K."""
    t = trajectory([5, 6], [7, 8], [1, 2])
    logprobs = torch.arange(VOCABULARY, dtype=torch.float32).log_softmax(-1)
    for token in (VOCABULARY - 1, 3):
        t.response_ids[0] = token
        asked, following = Flat(), Flat()
        asked.add(None)
        for actual in (6, token):
            asked.add(logprobs, actual)
        following.add(logprobs, VOCABULARY - 1)
        targets = parse_targets(t, asked, following, K, VOCABULARY)
        assert targets.token_ids.tolist() == [[31, 30, 29, 28]] * 2
        assert targets.logprobs[0, 0] > targets.logprobs[0, 3]


@pytest.mark.parametrize("damage", ["shifted", "too few", "not sorted", "nan", "another width", "no generated row"])
def test_rows_of_another_layout_are_an_error(damage) -> None:
    t = TRAJECTORIES[0]
    asked, following = _rows_of(t)
    parse_targets(t, asked, following, K, VOCABULARY)
    message = "log-probabilities of sample 0 are not 5 rows"
    if damage == "shifted":
        t = trajectory(t.prompt_ids.tolist(), [9, 8, 10, 11, EOS], [1, 2, 3, 4, 5])
    elif damage == "too few":
        asked.start_indices.pop()
        asked.end_indices.pop()
    elif damage == "not sorted":
        following.logprobs[1:] = following.logprobs[:0:-1]
    elif damage == "nan":
        asked.logprobs[-1] = float("nan")
    elif damage == "another width":
        asked, following = _rows_of(t, K + 2)
        message = r"rows of \[7\] log-probabilities where 5 were expected"
    else:
        following = Flat()
    with pytest.raises(OpdlmError, match=message):
        parse_targets(t, asked, following, K, VOCABULARY)
