"""The memory that `opdlm plan` computes is what the code allocates. `pytest tests/deploy/cluster/test_memory.py`"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.kv_cache import SPARE, SlotCache
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.config import OpdlmConfig, config_from_dict
from opdlm.common.config.schema import LoraConfig
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import add_adapters
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import hidden_states, load_model
from opdlm.deploy.cluster.learner_memory import (
    BUCKET_ELEMENTS,
    activation_values,
    adapter_parameters,
    learner_memory,
    zero_terms,
)
from opdlm.deploy.cluster.memory import Lengths, model_size, rollout_memory, teacher_memory
from opdlm.learner.packing import pack
from opdlm.learner.row_attention import RowParts
from opdlm.learner.rows import build_row
from opdlm.learner.states import ChosenStates
from tests.tiny import EOS, MASK, request, save_teacher, tiny_model, trajectory

LENGTHS = Lengths(prompt=40, end=100, row=160)


def config_with(**sections) -> OpdlmConfig:
    return config_from_dict({"model": {"teacher": "t"}, "data": {"task": "chain", "prompts": 9}} | sections)


def by_name(terms) -> dict[str, int]:
    return {term.what: term.nbytes for term in terms}


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_the_loaded_models(tmp_path, tied, dtype) -> None:
    folder = save_teacher(tmp_path / "model", tied=tied)
    config = config_with(model={"teacher": "t", "dtype": dtype}, teacher={"dtype": dtype})
    wanted = parameter_bytes(load_model(folder, dtype))
    size = model_size(folder)
    for memory in (rollout_memory(config, size, LENGTHS), teacher_memory(config, size, LENGTHS)):
        assert by_name(memory.terms)["weights"] == wanted


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_token_that_conversion_adds_is_counted(tmp_path, tied) -> None:
    folder = save_teacher(tmp_path / "ar", tied=tied)
    convert_checkpoint(folder, tmp_path / "student", 4, "absolute")
    assert read_facts(tmp_path / "student").vocab_size == read_facts(folder).vocab_size + 1
    assert model_size(folder).with_rows(1, tied) == model_size(tmp_path / "student")


@pytest.mark.parametrize(("prompts_per_round", "staleness", "slots"), [(8, 0, 4), (3, 0, 3), (3, 1, 4)])
def test_the_cache_is_at_least_what_a_decoder_allocates(tmp_path, prompts_per_round, staleness, slots) -> None:
    """The slots are the batch, or fewer if all requests in the making do not fill it: one actor may have them all."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    settings = {"actors": 3, "prompts_per_round": prompts_per_round, "batch_size": 4, "max_new_tokens": 12}
    config = config_with(
        model={"teacher": "t", "dtype": "float32"},
        rollout=settings,
        queue={"max_staleness": staleness},
        learner={"batch_size": 1, "workers": 1},
    )
    requests = [request(length, index=length, limit=12) for length in (3, 9, 14)] + [request(6, index=99, limit=12)]
    requests = requests[:slots]
    decoder = BlockDecoder(model, DecodeSettings.from_config(config.rollout), MASK, (EOS,), batch_size=4)
    decoder.decode(requests)
    a_position = SlotCache(model, 1).nbytes - SlotCache(model, 0).nbytes
    allocated = decoder.cache.nbytes - SPARE * a_position

    grid = BlockGrid(config.rollout.block_size, config.rollout.block_grid)
    end = max(grid.end_position(r.prompt_ids.size, r.max_new_tokens) for r in requests)
    terms = rollout_memory(config, model_size(tmp_path), Lengths(14, end, 2 * end)).terms
    assert by_name(terms)["key/value cache"] == slots * end * a_position >= allocated
    assert by_name(terms)["logits of a step"] == torch.zeros(slots, 4, 32, dtype=torch.float32).nbytes


def test_a_bounded_cache_is_allocated_at_once(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = config_with(model={"teacher": "t", "dtype": "float32"}, rollout={"cache_tokens": 333})
    terms = rollout_memory(config, model_size(tmp_path), LENGTHS).terms
    assert by_name(terms)["key/value cache"] == SlotCache(model, 333).nbytes


def test_evaluations_may_need_the_larger_cache(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    lengths, size = Lengths(prompt=40, end=100, row=160, question=90), model_size(tmp_path)

    def positions(slots: int) -> float:
        config = config_with(rollout={"batch_size": 4}, evaluation={"batch_size": slots})
        term = next(t for t in rollout_memory(config, size, lengths).terms if t.what == "key/value cache")
        assert term.estimate
        return term.nbytes / (2 * 2 * 8 * 2)  # layers, keys and values, one head of 8, bfloat16

    assert positions(64) == 64 * 90
    assert positions(2) == 4 * 100


def test_rows_have_the_assumed_length() -> None:
    grid = BlockGrid(4, "absolute")
    sample = trajectory([5] * 6, [6] * 10, [1] * 10)
    row = build_row(
        _scored(sample), ChosenStates(sample.reveal_step > 0, sample.reveal_step > 0), grid, MASK, exclude_eos=False
    )
    end = grid.end_position(6, 10)
    assert len(row.input_ids) == 2 * end - grid.first_block_start(6)


def _scored(sample):
    from opdlm.common.types import ScoredTrajectory, TopKTargets

    return ScoredTrajectory(sample, TopKTargets(sample.response[:, None], sample.response[:, None] * 0.0, 32))


def test_adapters_are_those_that_peft_makes(tmp_path) -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    model.save_pretrained(tmp_path)
    lora = LoraConfig(rank=3, target_modules=["q_proj", "down_proj"])
    add_adapters(model, lora, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(tmp_path, lora) == trained > 0


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        # 1,001 parameters on 4 ranks in bfloat16: parts of 251.
        (1, {"weights": 2002, "gradients": 2002, "the step's gradients, fp32": 1004}),
        (2, {"weights": 2002, "gradients, fp32": 1004}),
        (3, {"weights": 502, "gradients, fp32": 1004, "gathered weights": 2002}),
    ],
)
def test_zero_shares_by_hand(stage, wanted) -> None:
    config = config_with(learner={"workers": 4, "zero": {"stage": stage}})
    optimizer = {"masters, fp32": 1004, "AdamW moments, fp32": 2008}
    assert by_name(zero_terms(config, 1001, 1001)) == wanted | optimizer


def test_offloading_and_adapters_by_hand() -> None:
    zero = {"stage": 3, "offload_optimizer": True, "offload_weights": True}
    learner = {"workers": 2, "gpus_per_worker": 1, "zero": zero}
    terms = zero_terms(config_with(learner=learner), held=1010, trained=10)
    host = by_name(term for term in terms if term.on_host)
    assert host == {"weights": 1010, "gradients, fp32": 20, "masters, fp32": 20, "AdamW moments, fp32": 40}
    device = by_name(term for term in terms if not term.on_host)
    assert device == {"gradient buckets": BUCKET_ELEMENTS * 2, "gathered weights": 2020}
    on_cpu = config_with(learner=learner | {"gpus_per_worker": 0})
    assert not any(term.on_host for term in zero_terms(on_cpu, 1010, 10))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_autograd_keeps(tmp_path, checkpointing) -> None:
    """Within a factor of two of the bytes that a real forward saves for its backward pass."""
    model = tiny_model(hidden_size=64, head_dim=32, context=512)
    model.save_pretrained(tmp_path)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    rows, length = 2, 256
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []  # so that no later tensor gets the address of a freed one
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), keep(t))[1], lambda t: t):
        hidden_states(model, torch.zeros(rows, length, dtype=torch.int64))
    learner = {"gradient_checkpointing": checkpointing, "micro_batch_tokens": rows * length}
    config = config_with(model={"teacher": "t", "dtype": "float32"}, learner=learner)
    size = model_size(tmp_path)
    terms = by_name(learner_memory(config, size, size, None, Lengths(1, length, length)).terms)
    kept = sum(storages.values())
    if checkpointing:  # the recomputed layer is not saved by this forward
        kept += rows * length * activation_values(size) * 4
    assert kept / 2 < terms["activations"] < kept * 2


def test_losses_follow_the_targets(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    size = model_size(tmp_path)
    chunk = 7 * 32 * 4

    def terms(**sections) -> dict[str, int]:
        config = config_with(**{"learner": {"logits_chunk": 7}} | sections)
        return by_name(learner_memory(config, size, size, None, LENGTHS).terms)

    hidden = terms()
    assert (hidden["logits chunk"], hidden["teacher's output matrix"]) == (2 * chunk, 32 * 16 * 2)
    assert hidden["output matrix's gradient"] == 32 * 16 * 2
    top_k = terms(teacher={"targets": "topk"}, objective={"top_k": 4})
    assert (top_k["logits chunk"], "teacher's output matrix" in top_k) == (chunk, False)


@pytest.mark.parametrize(("most", "tokens"), [(64, 160), (1000, 1000)])
def test_a_micro_batch_is_bounded_by_its_tokens(tmp_path, most, tokens) -> None:
    """A row of 160 tokens that is longer than a micro-batch is one alone."""
    tiny_model().save_pretrained(tmp_path)
    size = model_size(tmp_path)
    config = config_with(learner={"micro_batch_tokens": most})
    terms = by_name(learner_memory(config, size, size, None, LENGTHS).terms)
    assert terms["activations"] == tokens * size.layers * activation_values(size) * 2
    assert terms["attention masks"] == tokens * 160 * 4


def test_the_masks_of_a_long_row_are_at_most_as_large(tmp_path, monkeypatch) -> None:
    for module in ("opdlm.learner.row_attention", "opdlm.deploy.cluster.learner_memory"):
        monkeypatch.setattr(f"{module}.PIECE", 40)
    tiny_model().save_pretrained(tmp_path)
    size = model_size(tmp_path)
    for response in (16, 60, 400):
        sample = trajectory([5] * 6, [6] * response, [1] * response)
        row = build_row(
            _scored(sample),
            ChosenStates(*[sample.reveal_step > 0] * 2),
            BlockGrid(4, "response"),
            MASK,
            exclude_eos=False,
        )
        parts = RowParts.from_batch(pack([row]), torch.float32)
        masks = sum(piece.mask.nbytes for piece in [*parts.clean_pieces, *parts.noisy_pieces])
        config = config_with(learner={"micro_batch_tokens": 1})
        lengths = Lengths(6, row.clean_length, len(row.input_ids))
        planned = by_name(learner_memory(config, size, size, None, lengths).terms)["attention masks"]
        assert masks <= planned <= 2.5 * masks


def test_teacher_targets_by_hand(tmp_path: Path) -> None:
    size = model_size(save_teacher(tmp_path / "t"))
    plain = by_name(teacher_memory(config_with(teacher={"batch_tokens": 64}), size, LENGTHS).terms)
    assert plain["hidden states"] == 100 * 16 * 2  # a single trajectory longer than the batch is scored alone
    config = config_with(teacher={"targets": "topk"}, objective={"top_k": 4})
    assert by_name(teacher_memory(config, size, LENGTHS).terms)["logits chunk"] == 1024 * size.vocabulary * 8
    config = config_with(teacher={"targets": "logits"})
    assert by_name(teacher_memory(config, size, LENGTHS).terms)["logits of a response"] == 60 * size.vocabulary * 8
    split = config_with(teacher={"gpus_per_actor": 2, "device_map": "auto"})
    assert by_name(teacher_memory(split, size, LENGTHS).terms)["weights"] == -(-size.parameters // 2) * 2


def test_weights_that_are_read_from_the_learner_are_on_its_gpu(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    size = model_size(tmp_path)
    rollout = {"weight_transport": "nixl", "gpus_per_actor": 1}
    config = config_with(rollout=rollout, learner={"gpus_per_worker": 1})
    (packed,) = (t for t in learner_memory(config, size, size, None, LENGTHS).terms if t.what == "packed weights")
    assert (packed.nbytes, packed.on_host) == (2 * size.parameters * 2, False)  # two versions, two bytes
    assert by_name(rollout_memory(config, size, LENGTHS).terms)["weights that arrive"] == size.parameters * 2


@pytest.mark.parametrize(
    ("bound", "tokens"),
    # 4 slots of sequences of up to 100 tokens: all of them, as many as the bound allows, one alone
    [(1000, 400), (120, 120), (10, 100)],
)
def test_a_prefill_has_a_bounded_size(tmp_path, monkeypatch, bound, tokens) -> None:
    monkeypatch.setattr("opdlm.deploy.cluster.memory.PREFILL_TOKENS", bound)
    tiny_model().save_pretrained(tmp_path)
    rollout = {"batch_size": 4, "prompts_per_round": 8}
    config = config_with(rollout=rollout, learner={"batch_size": 1})
    terms = by_name(rollout_memory(config, model_size(tmp_path), LENGTHS).terms)
    assert terms["activations"] == tokens * (2 * 16 + 3 * 32) * 2
