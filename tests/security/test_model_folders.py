"""A model folder executes no code, whatever its files hold or name. `pytest tests/security/test_model_folders.py`"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from opdlm.common.errors import OpdlmError
from opdlm.common.export import LAYOUTS
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from tests.security.attacks import PYTHON_CODE, edit_json


def read_all(model: Path, converted: Path) -> None:
    """Calls everything that reads a model folder; converts it into `converted`."""
    read_facts(model)
    load_tokenizer(model)
    load_model(model)
    convert_checkpoint(model, converted, 4, "absolute")


def test_weights_that_are_only_a_pickle_are_refused_by_name(model, malicious_pickle, tmp_path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(malicious_pickle)
    with pytest.raises(OpdlmError, match=r"only pickles \(pytorch_model.bin\), which are not opened here"):
        load_model(model)
    with pytest.raises(OpdlmError, match="only pickles"):
        convert_checkpoint(model, tmp_path / "new", 4, "absolute")


@pytest.mark.parametrize("extra", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"])
def test_a_pickle_beside_good_weights_is_neither_opened_nor_copied(
    model, malicious_pickle, extra, marker, tmp_path
) -> None:
    (model / extra).write_bytes(malicious_pickle)
    read_all(model, tmp_path / "new")
    assert not (tmp_path / "new" / extra).exists()


ERRORS = {
    "model.safetensors": r"model.safetensors cannot be read",
    "config.json": r"config.json is not text",
    "generation_config.json": r"generation_config.json is not text",
    "tokenizer.json": r"the tokenizer in .* cannot be read",
    "tokenizer_config.json": r"the tokenizer in .* cannot be read",
}


@pytest.mark.parametrize("file", ERRORS)
def test_a_pickle_under_the_name_of_another_file_is_an_error_in_one_line(
    model, malicious_pickle, file, marker, tmp_path
) -> None:
    (model / file).write_bytes(malicious_pickle)
    with pytest.raises(OpdlmError, match=ERRORS[file]) as caught:
        read_all(model, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_an_index_that_names_a_pickle_is_refused(model, malicious_pickle) -> None:
    """A safetensors file with another suffix has a sound header, but transformers unpickles files of that suffix."""
    (model / "model.safetensors").rename(model / "weights.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "weights.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OpdlmError, match=r"names 'weights.bin'; expected .safetensors files only"):
        load_model(model)
    (model / "weights.bin").write_bytes(malicious_pickle)
    with pytest.raises(OpdlmError, match=r"names 'weights.bin'; expected .safetensors files only"):
        load_model(model)


def test_code_beside_the_weights_is_not_imported(model, marker, tmp_path, monkeypatch) -> None:
    code = PYTHON_CODE.format(marker=str(marker)) + "class X: ...\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "x.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)
    maps = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X"}
    edit_json(model / "config.json", auto_map=maps | {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]})
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]})
    edit_json(model / "generation_config.json", custom_generate=str(model), auto_map=maps)
    questions: list[str] = []
    # transformers may ask on the terminal whether to trust the code: the answer would be yes.
    monkeypatch.setattr("builtins.input", lambda text="": questions.append(text) or "y")
    read_all(model, tmp_path / "new")
    assert questions == []
    written = {file.name: file for file in (tmp_path / "new").rglob("*.py")}
    assert written.keys() == set(LAYOUTS["a2d-qwen3"].files), "our own code, and none of the source's"
    assert all(str(marker) not in file.read_text() for file in written.values())
    held = (tmp_path / "new" / "config.json").read_text() + (tmp_path / "new" / "tokenizer_config.json").read_text()
    assert "_x." not in held + (tmp_path / "new" / "generation_config.json").read_text()


def test_the_code_of_an_unknown_tokenizer_class_is_not_imported(model, marker, monkeypatch) -> None:
    (model / "tokenization_x.py").write_text(PYTHON_CODE.format(marker=str(marker)) + "class EvilTokenizer: ...\n")
    edit_json(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_x.EvilTokenizer", "tokenization_x.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    monkeypatch.setattr("builtins.input", lambda text="": "y")
    assert len(load_tokenizer(model)) > 0
    (model / "config.json").unlink()  # without it, transformers knows no other class and would need the code
    with pytest.raises(OpdlmError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(model)


def test_config_does_not_choose_kernels_or_weight_files(model, malicious_pickle, tmp_path, marker) -> None:
    """`attn_implementation` may name a kernel on the hub, `transformers_weights` a file that nobody has checked."""
    (model / "adapter_model.bin").write_bytes(malicious_pickle)
    kernel = "someone/kernel"
    edit_json(model / "config.json", attn_implementation=kernel, transformers_weights="adapter_model.bin")
    config = read_config(model)
    assert config._attn_implementation != kernel
    assert getattr(config, "transformers_weights", None) is None
    read_all(model, tmp_path / "new")
    assert kernel not in (tmp_path / "new" / "config.json").read_text()


def test_an_adapter_folder_does_not_lead_to_another_model(model, malicious_pickle, tmp_path) -> None:
    """transformers would load the base model that an adapter_config.json names, from wherever that is."""
    other = shutil.copytree(model, tmp_path / "other")
    edit_json(model / "adapter_config.json", base_model_name_or_path=str(other), peft_type="LORA")
    (model / "adapter_model.bin").write_bytes(malicious_pickle)
    with pytest.raises(OpdlmError, match=r"holds an adapter \(adapter_config.json\); expected a merged model"):
        load_model(model)
