"""Decoding on the GPU: as on the CPU, by CUDA graphs, lossless, without waits. `pytest tests/gpu/test_decoding.py`"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from opdlm.actors.rollout.cuda_graphs import CudaGraphs
from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.teacher.generation import generate
from opdlm.common.form import PAPER_FORM, StudentForm
from opdlm.common.weights import WeightPacker, load_weights
from tests.actors.rollout.test_verify import drafting_model
from tests.gpu import DEVICE, NEEDS_GPU, ONLY_GPU
from tests.tiny import EOS, FORMS_AND_GRIDS, MASK, OTHER_FAMILIES, request, tiny_model

pytestmark = NEEDS_GPU

REQUESTS = [request(1 + 5 * i % 11, i, 1 + 7 * i % 29, seed=3) for i in range(40)]
SAMPLED = DecodeSettings(threshold=0.4, temperature=1.0)
WAITS = "called a synchronizing CUDA operation"
"""Torch's warning, in its debug mode."""


def tokens_and_steps(decoder: BlockDecoder, asked=REQUESTS) -> list[tuple[list[int], list[int]]]:
    return [(t.response_ids.tolist(), t.reveal_step.tolist()) for t in decoder.decode(asked)[0]]


@pytest.mark.parametrize(("form", "grid"), FORMS_AND_GRIDS, ids=str)
@pytest.mark.parametrize("family", ["", *OTHER_FAMILIES])
def test_decodes_what_the_cpu_decodes(family, form, grid) -> None:
    model, how = tiny_model(13, **OTHER_FAMILIES.get(family, {})), DecodeSettings(4, grid, threshold=0.4)
    expected = tokens_and_steps(BlockDecoder(copy.deepcopy(model), how, MASK, [EOS], 9, form=form))
    assert tokens_and_steps(BlockDecoder(model.to(DEVICE), how, MASK, [EOS], 9, form=form)) == expected


@ONLY_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", [PAPER_FORM, StudentForm(True, "causal")], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cuda_graphs_decode_the_same(temperature, form, dtype) -> None:
    """To the token in float32. In bfloat16 a shape that is rounded up rounds otherwise, so most tokens agree."""
    model = tiny_model(13, hidden_size=32, head_dim=16).to(DEVICE, dtype)
    how = DecodeSettings(4, "response", threshold=0.4, temperature=temperature)
    plain = tokens_and_steps(BlockDecoder(model, how, MASK, [EOS], 9, form=form))
    decoder = BlockDecoder(model, how, MASK, [EOS], 9, CudaGraphs, form=form)
    for count in (20, 40):  # the second call needs a longer cache and so new graphs
        ours = tokens_and_steps(decoder, REQUESTS[:count])
        if dtype == torch.float32:
            assert ours == plain[:count]
        else:
            assert sum(a[0][:4] == b[0][:4] for a, b in zip(ours, plain, strict=False)) > 0.8 * count


@ONLY_GPU
def test_cuda_graphs_see_new_weights() -> None:
    """The graphs know the memory of the weights, which a push fills anew."""
    old, new = (tiny_model(seed).to(DEVICE) for seed in (11, 12))
    decoder = BlockDecoder(old, SAMPLED, MASK, [EOS], 9, CudaGraphs)
    before = tokens_and_steps(decoder)
    load_weights(old, WeightPacker().pack(1, new.named_parameters()))
    expected = tokens_and_steps(BlockDecoder(new, SAMPLED, MASK, [EOS], 9))
    assert tokens_and_steps(decoder) == expected != before


@pytest.mark.parametrize("size", [1, 3, 5])
def test_lossless_decoding_equals_the_base_model(size) -> None:
    form = StudentForm(logit_shift=True, context="causal")
    model = drafting_model(0).to(DEVICE)
    decoder = BlockDecoder(model, DecodeSettings(size, "response", "verified"), MASK, [EOS], 7, form=form)
    trajectories, _ = decoder.decode(REQUESTS)
    plain = tiny_model(0).to(DEVICE)
    rows = torch.arange(plain.config.vocab_size, device=DEVICE) != MASK
    for asked, found in zip(REQUESTS, trajectories, strict=True):
        ids, response = asked.prompt_ids.tolist(), list[int]()
        while len(response) < asked.max_new_tokens and (not response or response[-1] != EOS):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([ids + response], device=DEVICE)).logits[0, -1]
            response.append(int(logits.where(rows, -torch.inf).argmax()))
        assert found.response.tolist() == response


@ONLY_GPU
@pytest.mark.parametrize("make_recorder", [None, CudaGraphs], ids=["plain", "graphs"])
@pytest.mark.parametrize(
    ("how", "form"),
    [
        (DecodeSettings(ignore_eos=True), PAPER_FORM),
        (DecodeSettings(ignore_eos=True, temperature=1.0), PAPER_FORM),
        (DecodeSettings(4, "response", "verified", ignore_eos=True), StudentForm(True, "causal")),
    ],
    ids=["greedy", "sampled", "verified"],
)
def test_a_step_waits_for_the_gpu_once(how, form, make_recorder) -> None:
    """Counted while no sequence begins, ends or outgrows its place in the cache."""
    if how.strategy == "verified" and make_recorder is not None:
        pytest.skip("rollout.cuda_graphs is refused with `verified`")
    model = (drafting_model(0) if how.strategy == "verified" else tiny_model(0)).to(DEVICE)
    decoder = BlockDecoder(model, how, MASK, [EOS], 4, make_recorder, form=form)
    decoder.add([request(8, i, 100, seed=i) for i in range(4)])
    for _ in range(8):
        decoder.step()
    counts = []
    for _ in range(6):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert decoder.step() == []
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum(WAITS in str(warning.message) for warning in caught))
    assert min(counts) == 1, counts


@pytest.mark.parametrize("family", sorted({"llama", "qwen2"}))
def test_generate_gives_what_the_cpu_gives(family) -> None:
    model = tiny_model(13, **OTHER_FAMILIES[family])
    prompts = [asked.prompt_ids for asked in REQUESTS[:8]]
    expected = generate(copy.deepcopy(model), prompts, 12, [EOS], 3)
    found = generate(model.to(DEVICE), prompts, 12, [EOS], 3)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
