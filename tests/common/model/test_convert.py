"""Converting a checkpoint file by file equals loading and saving it. `pytest tests/common/model/test_convert.py`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from opdlm.common.errors import OpdlmError
from opdlm.common.model.config import EMBEDDING, OUTPUT, read_config
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.folder import save_model
from opdlm.common.model.load import load_model
from opdlm.common.model.shards import read_shards
from opdlm.common.model.tokenizer import load_tokenizer
from tests.tiny import OTHER_FAMILIES, save_teacher, tiny_model

TOKENS = 17  # in the vocabulary of `save_teacher`


def converted_in_memory(source: Path, destination: Path) -> Path:
    """The definition of conversion: load the model, add a row, save the model."""
    model, tokenizer = load_model(source, dtype="auto"), load_tokenizer(source)
    tokenizer.add_special_tokens({"mask_token": "<|MASK|>"})
    mask_id, rows = tokenizer.mask_token_id, model.get_input_embeddings().num_embeddings
    if mask_id == rows:
        model.resize_token_embeddings(rows + 1, mean_resizing=False)
        with torch.no_grad():
            for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                matrix[mask_id] = matrix[:rows].float().mean(0).to(matrix.dtype)
    decoding = {"block_size": 4, "block_grid": "absolute", "logit_shift": False, "context": "block_causal"}
    model.config.update({"mask_token_id": mask_id, "decoding_order": "confidence", **decoding})
    save_model(model, tokenizer, destination, read_facts(source).eos_ids)
    return destination


@pytest.mark.parametrize("shards", ["5GB", "4KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare_rows", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_loading_and_saving(tmp_path, monkeypatch, shards, tied, spare_rows, dtype) -> None:
    teacher = save_teacher(tmp_path / "teacher", tied=tied, spare_rows=spare_rows)
    load_model(teacher).to(dtype).save_pretrained(teacher, max_shard_size=shards)
    if shards == "4KB":
        (teacher / "model.safetensors").unlink()
    slow = converted_in_memory(teacher, tmp_path / "slow")
    forbid_loading(monkeypatch)
    assert convert_checkpoint(teacher, tmp_path / "fast", 4, "absolute") == TOKENS
    monkeypatch.undo()

    assert json.loads((tmp_path / "fast" / "config.json").read_text()) == json.loads((slow / "config.json").read_text())
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "fast" / name).read_bytes() == (slow / name).read_bytes(), name
    theirs, ours = tensors(slow), tensors(tmp_path / "fast")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == dtype
        assert torch.equal(ours[name], tensor), name

    files = {file.name for file in teacher.glob("*.safetensors")}
    assert files == {file.name for file in (tmp_path / "fast").glob("*.safetensors")}
    source = read_shards(teacher)
    grown = set() if spare_rows else {source.file_of[name] for name in (EMBEDDING, OUTPUT) if name in source.file_of}
    for file in files:
        same = (teacher / file).read_bytes() == (tmp_path / "fast" / file).read_bytes()
        assert same == (file not in grown), f"{file}: only files with a matrix that grows are written anew"
    if shards == "4KB":
        assert grown != files, "the test needs a file that does not change"
        index = json.loads((tmp_path / "fast" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == read_shards(tmp_path / "fast").file_of
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in ours.values())


def test_conversion_loads_one_tensor_after_the_other(tmp_path, monkeypatch) -> None:
    """It looks for NaN in each and makes a row of two of them, in the memory of one matrix."""
    teacher = save_teacher(tmp_path / "teacher", max_shard_size="4KB")
    from opdlm.common.model.shards import Shards

    loaded = []
    load = Shards.load
    monkeypatch.setattr(Shards, "load", lambda self, name: loaded.append(name) or load(self, name))
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert loaded == [*sorted(read_shards(teacher).file_of), EMBEDDING, OUTPUT]


@pytest.mark.parametrize("name", sorted(OTHER_FAMILIES))
def test_conversion_of_other_families_changes_no_logit(tmp_path, name) -> None:
    teacher = save_teacher(tmp_path / "teacher", **OTHER_FAMILIES[name])
    mask_id = convert_checkpoint(teacher, tmp_path / "student", 4, "response")
    before, after = load_model(teacher), load_model(tmp_path / "student")
    assert type(before) is type(after)
    assert after.config.rope_parameters == before.config.rope_parameters
    ids = torch.randint(0, TOKENS, (2, 9))
    with torch.no_grad():
        assert torch.equal(after(ids).logits[..., :mask_id], before(ids).logits)
    assert read_facts(tmp_path / "student").is_student


def test_second_copy_of_a_tied_matrix_grows_with_the_first(tmp_path) -> None:
    """Qwen3-0.6B stores its tied matrix twice. A second copy of another size would be taken for an untied matrix."""
    teacher = save_teacher(tmp_path / "teacher", tied=True)
    weights = load_file(teacher / "model.safetensors")
    save_file(weights | {OUTPUT: weights[EMBEDDING].clone()}, teacher / "model.safetensors", {"format": "pt"})
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert OUTPUT not in tensors(tmp_path / "student")
    model = load_model(tmp_path / "student")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[0] == TOKENS + 1


def test_numbers_of_several_widths_stay_readable(tmp_path) -> None:
    """A row of a narrow dtype must not move tensors of a wider dtype to addresses at which they cannot be read."""
    teacher = save_teacher(tmp_path / "teacher", hidden_size=6)
    weights = load_file(teacher / "model.safetensors")
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in weights.items()} | {"odd": torch.ones(3).bool()}
    save_file(mixed, teacher / "model.safetensors", {"format": "pt"})
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    ours = load_file(tmp_path / "student" / "model.safetensors")
    assert all(torch.equal(ours[name][: len(tensor)], tensor) for name, tensor in mixed.items())
    assert ours[EMBEDDING].shape == ours[OUTPUT].shape == (TOKENS + 1, 6)


def test_a_checkpoint_of_transformers_4_converts(tmp_path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    raw = json.loads((teacher / "config.json").read_text())
    del raw["rope_parameters"], raw["layer_types"]
    raw |= {"torch_dtype": raw.pop("dtype"), "rope_theta": 5e5, "rope_scaling": None, "sliding_window": 4096}
    (teacher / "config.json").write_text(json.dumps(raw))
    (teacher / "generation_config.json").unlink()
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert read_config(tmp_path / "student").rope_parameters["rope_theta"] == 5e5
    assert json.loads((tmp_path / "student" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_an_unusable_source_is_named_and_leaves_no_files(tmp_path) -> None:
    teacher = save_teacher(tmp_path / "teacher", max_shard_size="4KB")
    shards = read_shards(teacher)

    def refused(message: str) -> None:
        with pytest.raises(OpdlmError, match=message) as error:
            convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["teacher"]

    raw = (teacher / "config.json").read_text()
    config = json.loads(raw) | {"num_hidden_layers": 3, "layer_types": None}
    (teacher / "config.json").write_text(json.dumps(config))
    refused(r"no tensor model\.layers\.2\..* in its safetensors files")
    (teacher / "config.json").write_text(json.dumps(json.loads(raw) | {"intermediate_size": 33}))
    refused(r"mlp.* is \[32, 16\], but config\.json makes it \[33, 16\]")
    (teacher / "config.json").write_text(raw)

    index = teacher / "model.safetensors.index.json"
    named = index.read_text()
    index.write_text(named.replace(shards.file_of[EMBEDDING], "../elsewhere.safetensors"))
    refused("'../elsewhere.safetensors' is not the name of a file in its folder")
    index.write_text('{"weights": {}}')
    refused("expected JSON with a weight_map; found KeyError")
    index.write_text(named.replace('"weight_map": {', '"weight_map": {"more": "' + shards.file_of[EMBEDDING] + '",'))
    refused(r"names more in model-.*, which lacks it")
    index.write_text(named)

    file = teacher / shards.file_of["model.norm.weight"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(f"{file.name} cannot be read")
    file.unlink()
    refused(f"{file.name} cannot be read: No such file")
    for shard in teacher.glob("*.safetensors*"):
        shard.unlink()
    refused(r"no weights; expected model\.safetensors or")
    torch.save({}, teacher / "pytorch_model.bin")
    refused(r"only pickles \(pytorch_model\.bin\), which are not opened here; expected model\.safetensors")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    tiny_model(0, vocab_size=TOKENS - 1).save_pretrained(teacher)
    with pytest.raises(OpdlmError, match="mask token id 17, but the embedding has 16 rows"):
        convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert not (tmp_path / "student").exists()


def test_a_failure_while_writing_leaves_no_files(tmp_path, monkeypatch) -> None:
    teacher = save_teacher(tmp_path / "teacher")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("opdlm.common.model.convert.write_all_but_weights", full)
    with pytest.raises(OSError, match="no space"):
        convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]


def forbid_loading(monkeypatch) -> None:
    """Makes the test fail if a whole model, or a whole weight file, is loaded."""

    def loads(*_: Any, **__: Any) -> None:
        pytest.fail("conversion loads a model")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loads)
    monkeypatch.setattr("safetensors.torch.load_file", loads)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Loads all tensors of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
