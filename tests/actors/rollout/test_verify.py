"""Lossless decoding equals the base model's own greedy answers. `pytest tests/actors/rollout/test_verify.py`"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdlm.actors.engine_guard import one_token_forward
from opdlm.actors.rollout import attention
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.kv_cache import SlotCache
from opdlm.actors.rollout.sampling import distribution
from opdlm.actors.rollout.sequences import as_sample, steps_by_tokens
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.scoring import score
from opdlm.common.config.schema import LoraConfig, ObjectiveConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.model.adapters import NoisyAdapters, is_adapter, mark_noisy
from opdlm.common.model.load import hidden_states
from opdlm.common.types import HiddenTargets, RolloutRequest, ScoredTrajectory
from opdlm.deploy.observe.round_figures import _draft_figures
from opdlm.learner.distill import DistillModule
from opdlm.learner.packing import pack
from opdlm.learner.rows import build_draft_row
from tests.oracles import draft_logits
from tests.tiny import EOS, MASK, OTHER_FAMILIES, request, tiny_model, trajectory

SEEDS = st.integers(0, 10**6)
FORM = StudentForm(logit_shift=True, context="causal")


def drafting_model(seed: int, mask: int = MASK, std: float = 0.3, **settings: Any) -> Any:
    """A tiny student whose adapters are random, so that its drafts are not what the base model would say."""
    model = tiny_model(seed, **settings)
    NoisyAdapters(model, LoraConfig(rank=2, target_modules=_linear(settings)), mask, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=std)
    return model


def _linear(settings: dict[str, Any]) -> list[str]:
    fused = settings.get("family") == "phi3"
    return ["qkv_proj", "o_proj"] if fused else ["q_proj", "v_proj", "o_proj", "down_proj"]


MODELS = [
    *(drafting_model(seed) for seed in range(2)),
    drafting_model(0, tied=True),
    *(drafting_model(3, **other) for other in OTHER_FAMILIES.values()),
]


def _logits(model: Any, clean: list[int], masks: int) -> torch.Tensor:
    """Of tokens that may be drawn, `[T, V]`."""
    logits = draft_logits(model, clean, masks, MASK)
    logits[:, MASK] = float("-inf")
    return logits


def oracle(model: Any, size: int, asked: RolloutRequest) -> tuple[list[int], list[int]]:
    """The base model's greedy response, to its first end token or limit, and the step that revealed each token."""
    prompt, response = asked.prompt_ids.tolist(), list[int]()
    while len(response) < asked.max_new_tokens and (not response or response[-1] != EOS):
        response.append(int(_logits(model, prompt + response, 0)[-1].argmax()))
    tokens, reveal, drafts, step = prompt + response, list[int](), list[int](), 0
    while len(reveal) < len(response):
        step += 1
        right = 0
        while right < len(drafts) and tokens[len(prompt) + len(reveal) + right :][:1] == drafts[right : right + 1]:
            right += 1
        clean = tokens[: len(prompt) + len(reveal) + right]
        reveal += [step] * (right + 1)
        behind = _logits(model, clean, size)[len(clean) :]
        drafts = behind[: size - 1].argmax(dim=-1).tolist()
    return response, reveal[: len(response)]


@given(
    model=st.sampled_from(MODELS),
    size=st.integers(1, 5),
    lengths=st.lists(st.tuples(st.integers(1, 11), st.integers(1, 13)), min_size=1, max_size=7),
    batch_size=st.integers(1, 4),
    narrowest=st.sampled_from([256, 4]),
    bounded=st.booleans(),
    seed=SEEDS,
)
@settings(max_examples=60)
def test_equals_the_base_models_own_words(model, size, lengths, batch_size, narrowest, bounded, seed) -> None:
    """Slots, refills, the cache and parts change no token and no step."""
    requests = [request(p, i, limit, seed) for i, (p, limit) in enumerate(lengths)]
    how = DecodeSettings(block_size=size, strategy="verified")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "NARROWEST_PART", narrowest)
        cache = SlotCache(model, 90) if bounded else None
        decoder = BlockDecoder(model, how, MASK, [EOS], batch_size, form=FORM, cache=cache)
        trajectories, stats = decoder.decode(requests)
    assert stats.sequences == len(requests)
    for asked, found in zip(requests, trajectories, strict=True):
        response, reveal = oracle(model, size, asked)
        assert found.response.tolist() == response
        assert found.reveal_step[: len(response)].tolist() == reveal
        assert found.finish_reason == ("eos" if response[-1] == EOS else "length")


def test_right_drafts_save_steps() -> None:
    """Where all logits are equal, masks and clean tokens all say the first token, so every draft is right."""
    model = tiny_model(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    how = DecodeSettings(block_size=4, strategy="verified", ignore_eos=True)
    (found,), _ = BlockDecoder(model, how, MASK, [EOS], 1, form=FORM).decode([request(6, limit=24)])
    assert found.reveal_step.tolist()[:9] == [1, 2, 2, 2, 2, 3, 3, 3, 3]


@given(
    model=st.sampled_from(MODELS),
    size=st.integers(2, 5),
    prompt=st.integers(1, 11),
    limit=st.integers(1, 13),
    seed=SEEDS,
)
@settings(max_examples=30)
def test_a_training_row_has_the_states_that_decoding_had(model, size, prompt, limit, seed) -> None:
    how = DecodeSettings(block_size=size, strategy="verified")
    decoded, _ = BlockDecoder(model, how, MASK, [EOS], 1, form=FORM).decode([request(prompt, 0, limit, seed)])
    scored = ScoredTrajectory(decoded[0], HiddenTargets(np.zeros((decoded[0].response_length, 16), np.float32)))
    row = build_draft_row(scored, size, MASK, exclude_eos=False)
    batch = pack([row])
    module = DistillModule(model, ObjectiveConfig(selection="drafts"), 64, form=FORM)
    mask, layout = module._mask(batch)
    with torch.no_grad():
        hidden = hidden_states(model, batch.input_ids, batch.position_ids, mask, noisy=batch.copies > 0, **layout)
        ours = model.lm_head(hidden[batch.loss_line, batch.loss_column])
    ours[:, MASK] = float("-inf")
    tokens = [*decoded[0].prompt_ids.tolist(), *decoded[0].response.tolist()]
    steps, expected, places = decoded[0].reveal_step, [], []
    for last in (i for i in range(decoded[0].response_length) if i + 1 == len(steps) or steps[i + 1] > steps[i]):
        behind = _logits(model, tokens[: prompt + last], size)[prompt + last :]
        of_draft = range(last + 1, min(last + size, decoded[0].response_length))
        places += of_draft
        expected.append(behind[: len(of_draft)])
    assert row.loss_positions.tolist() == places
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS[:3])
def test_the_clean_path_is_the_base_models_bit_by_bit(model) -> None:
    ids = torch.randint(0, MASK, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[0, 3] = MASK  # in a prompt it is an ordinary token, with its own embedding
    noisy = torch.zeros(2, 9, dtype=torch.bool)
    noisy[:, 6:] = True

    def clean_logits() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, :6]

    with torch.no_grad():
        mark_noisy(model, noisy)
        before = clean_logits()
        kept = {name: p.clone() for name, p in model.named_parameters() if is_adapter(name)}
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=3.0)
        after = clean_logits()
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(kept[name])
    assert torch.equal(before, after)


def test_gradients_reach_adapters_and_the_masks_embedding_only() -> None:
    model = drafting_model(5)
    mark_noisy(model, torch.tensor([[False, False, True, True]]))
    model(input_ids=torch.tensor([[4, 5, 6, MASK]]), use_cache=False).logits[:, -1].sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert "model.embed_tokens.mask_embedding" in moved


def test_a_student_without_a_clean_path_is_refused() -> None:
    for form in (PAPER_FORM, StudentForm(logit_shift=True), StudentForm(context="causal")):
        with pytest.raises(OpdlmError, match="only one with logit shift and causal context"):
            BlockDecoder(tiny_model(), DecodeSettings(strategy="verified"), MASK, [EOS], 1, form=form)


@pytest.mark.parametrize(
    ("size", "top_k", "top_p", "temperature"), [(3, 0, 1.0, 1.0), (4, 0, 0.8, 0.7), (2, 3, 1.0, 1.3)]
)
def test_sampled_responses_follow_the_base_models_distribution(size, top_k, top_p, temperature) -> None:
    """Over 10,000 seeds every response of three tokens comes as often as the base model alone would write it."""
    mask, count, limit = 7, 10_000, 3
    model = drafting_model(4, vocab_size=8, mask=mask, std=0.1)
    model.lm_head.weight.data *= 0.4  # so flat that drafts and base model overlap
    prompt = np.array([3, 1, 4], dtype=np.int32)
    how = DecodeSettings(
        block_size=size, strategy="verified", temperature=temperature, top_k=top_k, top_p=top_p, ignore_eos=True
    )
    requests = [RolloutRequest(i, "", prompt, limit, seed=i) for i in range(count)]
    found, stats = BlockDecoder(model, how, mask, [EOS], 1024, form=FORM).decode(requests)
    drawn = np.array([one.response for one in found]) @ [64, 8, 1]
    expected = np.zeros(512)
    for first in range(8):
        for second in range(8):
            chance = 1.0
            for clean, token in (([3, 1, 4], first), ([3, 1, 4, first], second)):
                chance *= float(_alone(model, clean, mask, temperature, top_k, top_p)[token])
            if chance:
                at = first * 64 + second * 8
                expected[at : at + 8] = chance * _alone(
                    model, [3, 1, 4, first, second], mask, temperature, top_k, top_p
                )
    seen = np.bincount(drawn, minlength=512)
    assert seen[expected == 0].sum() == 0, "what the base model never says"
    likely = expected * count >= 5
    statistic = ((seen - expected * count)[likely] ** 2 / (expected * count)[likely]).sum()
    freedom = likely.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), f"{statistic:.1f} with {freedom} degrees of freedom"
    assert stats.denoising_steps < count * limit, "some drafts are right"


@torch.no_grad()
def _alone(model: Any, clean: list[int], mask: int, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    mark_noisy(model, None)
    logits = model(input_ids=torch.tensor([clean]), use_cache=False).logits[0, -1]
    logits[mask] = float("-inf")
    return distribution(logits, temperature, top_k, top_p).double().numpy()


def test_rollouts_bring_the_targets_that_a_teacher_would_give() -> None:
    model, base = drafting_model(1), tiny_model(1)
    requests = [request(4 + i, i, 9, seed=3) for i in range(5)]
    how = DecodeSettings(block_size=3, strategy="verified", keep_targets=True)
    found, _ = BlockDecoder(model, how, MASK, [EOS], 2, form=FORM).decode(requests)
    targets = score(base, found, "hidden", 0, 4096)
    for one, theirs in zip(found, targets, strict=True):
        sample = as_sample(one)
        assert isinstance(sample, ScoredTrajectory)
        assert isinstance(sample.targets, HiddenTargets)
        assert isinstance(theirs, HiddenTargets)
        np.testing.assert_allclose(sample.targets.hidden, theirs.hidden, rtol=1e-4, atol=1e-4)
        assert sample.trajectory.clean_hidden is None


def test_accepted_drafts_are_counted_by_their_place() -> None:
    steps = [trajectory([1], [5] * 6, [1, 2, 2, 2, 3, 3], length=5), trajectory([1], [5] * 3, [1, 2, 3])]
    counts = steps_by_tokens(steps, 4)
    assert counts == (5, 0, 1, 0), "the response ends with the first token of its last step"
    figures = _draft_figures([counts, counts])
    shares = [figures[f"draft_{place}_accepted_share"] for place in (1, 2, 3)]
    assert shares == pytest.approx([1 / 6, 1 / 6, 0.0])
    assert figures["drafts_lost_share"] == pytest.approx(1 - 1 / 9)


def test_a_forward_that_says_nothing_of_noise_has_none() -> None:
    """As the one that asks an engine for one token after an error, whatever was decoded before."""
    model = drafting_model(1)
    BlockDecoder(model, DecodeSettings(strategy="verified"), MASK, [EOS], 1, form=FORM).decode([request(5)])
    one_token_forward(model)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(hidden_states(model, ids), hidden_states(tiny_model(1), ids))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_named(temperature) -> None:
    model = drafting_model(1)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    how = DecodeSettings(strategy="verified", temperature=temperature)
    with pytest.raises(OpdlmError, match="prompt test/0: the student's logits hold NaN or infinity"):
        BlockDecoder(model, how, MASK, [EOS], 1, form=FORM).decode([request(5)])
