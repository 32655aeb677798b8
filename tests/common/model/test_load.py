"""Conversion, loading, facts about checkpoints, packing weights. `pytest tests/common/model/test_load.py`"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdlm.common.errors import OpdlmError
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import check_vocabularies, count_parameters, read_facts, require_mask
from opdlm.common.model.load import load_model, load_output_matrix
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.tensors import array_to_tensor, tensor_to_array
from opdlm.common.weights import WeightPack, WeightPacker, load_weights
from tests import golden_files
from tests.tiny import save_teacher, tiny_model


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(tmp_path / "teacher")


def test_conversion_adds_a_mask_and_changes_no_logit(teacher, tmp_path) -> None:
    mask_id = convert_checkpoint(teacher, tmp_path / "student", block_size=4, block_grid="absolute")
    before, after = load_model(teacher), load_model(tmp_path / "student")
    ids = torch.randint(0, before.config.vocab_size, (2, 9))
    with torch.no_grad():
        old, new = before(ids).logits, after(ids).logits
    assert mask_id == before.config.vocab_size == new.shape[-1] - 1
    assert torch.equal(new[..., :mask_id], old)
    facts = read_facts(tmp_path / "student")
    assert (facts.mask_id, facts.block_size, facts.block_grid, facts.is_student) == (mask_id, 4, "absolute", True)
    assert load_tokenizer(tmp_path / "student").mask_token_id == mask_id
    check_vocabularies(read_facts(teacher), facts)


def test_a_converted_student_is_no_causal_model_to_plain_transformers(teacher, tmp_path) -> None:
    """The code that decodes it lies beside the weights. tests/compat runs it, in transformers 4 and 5."""
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=False)
    code = json.loads((tmp_path / "student" / "config.json").read_text())["auto_map"].values()
    assert {name.partition(".")[0] + ".py" for name in code} < {p.name for p in (tmp_path / "student").glob("*.py")}
    assert AutoTokenizer.from_pretrained(tmp_path / "student").mask_token == "<|MASK|>"
    plain = AutoModelForCausalLM.from_pretrained(teacher)
    ours = load_model(tmp_path / "student")
    for (name, a), (_, b) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b[: len(a)]), name


def test_spare_embedding_rows_are_used_before_new_ones(teacher, tmp_path) -> None:
    """Qwen3 has more rows than tokens: the mask token takes one of them, and the matrix keeps its size."""
    tokens = len(load_tokenizer(teacher))
    model = tiny_model(0, vocab_size=tokens + 5, tied=True)
    model.save_pretrained(teacher)
    assert convert_checkpoint(teacher, tmp_path / "student", 4, "response") == tokens
    assert read_facts(tmp_path / "student").vocab_size == tokens + 5


def test_public_checkpoints_are_read_as_students_of_their_family(teacher) -> None:
    public = golden_files.ROOT / "models" / "student"  # written by transformers 4: rope_theta is not in rope_parameters
    assert read_facts(public).is_student
    assert load_model(public).config.model_type == "qwen3"
    assert load_model(public).config.rope_parameters["rope_theta"] == 1e6
    raw = json.loads((teacher / "config.json").read_text())
    for family, named in [("qwen2", "a2d-qwen2"), ("llama", "a2d-llama"), ("qwen3", "sdar")]:
        (teacher / "config.json").write_text(json.dumps(raw | {"model_type": named}))
        assert read_config(teacher).model_type == family
        assert read_facts(teacher).is_student


def test_destination_that_exists_is_left_alone(teacher, tmp_path) -> None:
    (tmp_path / "student").mkdir()
    with pytest.raises(OpdlmError, match="exists; give a new folder"):
        convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert list((tmp_path / "student").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student", "teacher"]


def test_unusable_folders_are_named(teacher, tmp_path) -> None:
    with pytest.raises(OpdlmError, match="does not exist; expected a checkpoint"):
        read_facts(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpdlmError, match=r"has no config\.json"):
        read_facts(tmp_path / "empty")
    raw = json.loads((teacher / "config.json").read_text())
    for change, message in [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: qwen3, a2d-qwen3, qwen2, a2d-qwen2, llama"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
            "use_sliding_window is on",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic', whose rotation changes",
        ),
    ]:
        (teacher / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(OpdlmError, match=message):
            read_facts(teacher)
    (teacher / "config.json").write_text(json.dumps(raw))
    full = raw | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None}
    (teacher / "config.json").write_text(json.dumps(full))
    assert read_facts(teacher).context == 128, "no layer has a sliding window, so the model is accepted"
    (teacher / "config.json").write_text(json.dumps(raw))
    with pytest.raises(OpdlmError, match="has no mask token; convert it first"):
        require_mask(read_facts(teacher))
    (teacher / "model.safetensors").unlink()
    with pytest.raises(OpdlmError, match="model folder"):
        load_model(teacher)


def test_missing_tokenizers_and_missing_eos_tokens_are_named(teacher, tmp_path) -> None:
    shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(OpdlmError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path / "bare")
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(OpdlmError, match="has no end-of-sequence token"):
        load_tokenizer(teacher)


def test_vocabulary_mismatch_is_named(teacher, tmp_path) -> None:
    tiny_model(0, vocab_size=40).save_pretrained(tmp_path / "other")
    with pytest.raises(OpdlmError, match=r"vocabulary mismatch: the teacher .* has 17 tokens, the student .* 40"):
        check_vocabularies(read_facts(teacher), read_facts(tmp_path / "other"))


def test_code_in_a_model_folder_is_not_run(teacher) -> None:
    """`auto_map` names code in the folder, which is neither needed nor imported."""
    raw = json.loads((teacher / "config.json").read_text())
    raw["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (teacher / "config.json").write_text(json.dumps(raw))
    (teacher / "evil.py").write_text(f"open({str(teacher / 'executed')!r}, 'w')")
    load_model(teacher)
    assert not (teacher / "executed").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_matrix_is_loaded_alone(tmp_path, tied) -> None:
    model = tiny_model(3, tied=tied)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(load_output_matrix(tmp_path / "m", "float32"), model.lm_head.weight)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert torch.equal(load_output_matrix(tmp_path / "sharded", "float32"), model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_device", [False, True])
def test_weight_pack_round_trip(dtype, on_device) -> None:
    source, target = tiny_model(1).to(dtype), tiny_model(2).to(dtype)
    source.model.norm.weight.data = source.model.norm.weight.data.float()  # two dtypes give two buffers
    target.model.norm.weight.data = target.model.norm.weight.data.float()
    pack = WeightPacker(on_device).pack(7, source.named_parameters())
    assert len(pack.buffers) == (1 if dtype is torch.float32 else 2)
    load_weights(target, pack)
    for (name, a), (_, b) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_packer_packs_again_into_the_same_memory() -> None:
    model, packer = tiny_model(1).to(torch.bfloat16), WeightPacker()
    first = packer.pack(0, model.named_parameters()).buffers["uint16"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    again, fresh = packer.pack(1, model.named_parameters()), WeightPacker().pack(1, model.named_parameters())
    assert np.shares_memory(again.buffers["uint16"], first)
    assert np.array_equal(first, fresh.buffers["uint16"])
    assert (again.places, again.checksum) == (fresh.places, fresh.checksum)


def test_each_pack_on_the_device_has_memory_of_its_own() -> None:
    """An actor that loads a version late still gets that version."""
    model, packer = tiny_model(1).to(torch.bfloat16), WeightPacker(on_device=True)
    first = packer.pack(0, model.named_parameters())
    before = tiny_model(2).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = packer.pack(1, model.named_parameters())
    assert isinstance(second.buffers["uint16"], torch.Tensor)
    assert (second.nbytes, second.places) == (first.nbytes, first.places)
    load_weights(before, first)
    load_weights(tiny_model(3).to(torch.bfloat16), second)
    with pytest.raises(ValueError, match="not the parameters that were packed before"):
        packer.pack(2, list(model.named_parameters())[1:])


def test_damaged_or_foreign_pack_is_refused() -> None:
    model = tiny_model(1)
    pack = WeightPacker().pack(3, model.named_parameters())
    broken = {k: v.copy() for k, v in pack.buffers.items()}
    broken["float32"][5] += 1.0
    with pytest.raises(ValueError, match="checksum"):
        load_weights(model, WeightPack(3, pack.places, broken, pack.checksum))
    with pytest.raises(ValueError, match="model and pack differ"):
        load_weights(model, WeightPack(3, pack.places[1:], pack.buffers, pack.checksum))
    with pytest.raises(ValueError, match="checksum"):
        load_weights(tiny_model(1).to(torch.bfloat16), pack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_tensors_become_arrays_and_tensors_again(dtype) -> None:
    tensor = torch.randn(3, 4).to(dtype)
    array = tensor_to_array(tensor)
    assert isinstance(array, np.ndarray)
    assert torch.equal(array_to_tensor(array), tensor)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_loading(tmp_path, tied) -> None:
    model = tiny_model(tied=tied)
    model.save_pretrained(tmp_path / "m")
    assert count_parameters(tmp_path / "m") == sum(p.numel() for p in model.parameters())
