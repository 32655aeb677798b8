"""End tokens: tokenizer, config.json and generation_config.json may each name others.

`pytest tests/common/model/test_end_tokens.py`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from opdlm.common.errors import OpdlmError
from opdlm.common.export import export
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.folder import save_model
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from tests.tiny import save_teacher

TOKENIZERS = 1  # the end token of `save_teacher`'s tokenizer, of 17 tokens
FILES = ("config.json", "generation_config.json")


@pytest.fixture
def teacher(tmp_path) -> Path:
    return save_teacher(tmp_path / "teacher", spare_rows=3)


def set_keys(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def written(folder: Path, key: str = "eos_token_id") -> list[Any]:
    return [json.loads((folder / name).read_text()).get(key) for name in FILES]


@pytest.mark.parametrize(
    ("config", "generation", "expected", "disagree"),
    [
        (1, 1, (1,), False),
        ([1, 3], [3, 1], (1, 3), False),
        (None, [3, 1], (1, 3), False),
        (None, None, (1,), False),
        ([], [], (1,), False),
        (3, 3, (1, 3), True),
        (1, [1, 3], (1, 3), True),
        ([3], 5, (1, 3, 5), True),
        (None, 19, (1, 19), True),
    ],
)
def test_a_response_ends_at_any_token_that_a_file_names(teacher, config, generation, expected, disagree) -> None:
    set_keys(teacher / FILES[0], eos_token_id=config)
    set_keys(teacher / FILES[1], eos_token_id=generation)
    facts = read_facts(teacher)
    assert facts.eos_ids == expected
    assert (facts.end_tokens_note is not None) == disagree


def test_a_disagreement_names_files_ids_and_tokens(teacher) -> None:
    set_keys(teacher / FILES[0], eos_token_id=3)
    set_keys(teacher / FILES[1], eos_token_id=[19, 1])
    tokenizer = load_tokenizer(teacher)
    end, plus = tokenizer.convert_ids_to_tokens([TOKENIZERS, 3])
    assert read_facts(teacher).end_tokens_note == (
        f"end tokens: the files of {teacher} name different ones (the tokenizer {end!r} (1); config.json {plus!r} (3); "
        f"generation_config.json {end!r} (1), 19); a response ends at any of them"
    )


def test_a_missing_file_names_none(teacher) -> None:
    (teacher / FILES[1]).unlink()
    set_keys(teacher / FILES[0], eos_token_id=3)
    assert read_facts(teacher).eos_ids == (1, 3)
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    assert read_facts(teacher).eos_ids == (3,)
    set_keys(teacher / FILES[0], eos_token_id=None)
    with pytest.raises(OpdlmError, match="names no end-of-sequence token"):
        read_facts(teacher)


def test_the_default_of_a_family_is_not_an_end_token(tmp_path) -> None:
    """transformers gives every Llama without `eos_token_id` the id 2, which may be any token of its vocabulary."""
    folder = save_teacher(tmp_path / "llama", family="llama")
    raw = json.loads((folder / FILES[0]).read_text())
    del raw["eos_token_id"]
    (folder / FILES[0]).write_text(json.dumps(raw))
    (folder / FILES[1]).unlink()
    assert read_facts(folder).eos_ids == (1,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("found", ["1", -1, 20, True, 1.0, [1, "2"], [[1]], [1, 20], [None], {"id": 1}, [False]])
def test_an_impossible_id_is_refused_in_one_line(teacher, tmp_path, name, found) -> None:
    set_keys(teacher / name, eos_token_id=found)
    for use in (read_facts, load_model, lambda folder: convert_checkpoint(folder, tmp_path / "new", 4, "absolute")):
        with pytest.raises(OpdlmError) as caught:
            use(teacher)
        assert str(caught.value) == (
            f"{teacher / name}: eos_token_id: found {found!r}; expected a token id from 0 to 19, or a list of them"
        )
    assert not (tmp_path / "new").exists()


def test_an_end_token_of_the_tokenizer_that_the_model_lacks_is_refused(tmp_path) -> None:
    folder = save_teacher(tmp_path / "teacher")
    set_keys(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    with pytest.raises(OpdlmError, match=r"its eos_token '<\|im_end\|>' has id 17; the model has the ids 0 to 16"):
        read_facts(folder)


ODD: list[dict[str, Any]] = [
    {"num_return_sequences": 4},
    {"max_new_tokens": -1},
    {"temperature": 0.6, "do_sample": False},  # transformers loads it, and refuses to write it
    {"cache_implementation": "no such cache"},
    {"watermarking_config": 5},
    {"max_length": 3, "num_beams": 4, "repetition_penalty": 9.0},
]


@pytest.mark.parametrize("keys", ODD, ids=str)
@pytest.mark.parametrize("name", FILES)
def test_other_settings_of_generation_are_ignored(teacher, tmp_path, name, keys) -> None:
    """The model loads and converts; what is written loads in transformers, and a finished run can save it."""
    set_keys(teacher / FILES[1], eos_token_id=[1, 3])
    set_keys(teacher / name, **keys)
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    export(tmp_path / "student", tmp_path / "export", "qwen3")
    student = tmp_path / "student"
    save_model(load_model(student), load_tokenizer(student), tmp_path / "trained", read_facts(student).eos_ids)
    for folder in ("student", "export", "trained"):
        assert read_facts(tmp_path / folder).eos_ids == (1, 3)
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id == [1, 3]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id == [1, 3]
    (teacher / FILES[1]).unlink()
    load_model(teacher)


@pytest.mark.parametrize("config", [1, 3, None])
def test_what_we_write_names_all_end_tokens_in_both_files(teacher, tmp_path, config) -> None:
    set_keys(teacher / FILES[0], eos_token_id=config)
    set_keys(teacher / FILES[1], eos_token_id=[1, 3])
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    export(tmp_path / "student", tmp_path / "a2d", "a2d-qwen3")
    save_model(load_model(teacher), load_tokenizer(teacher), tmp_path / "saved", read_facts(teacher).eos_ids)
    for folder in ("student", "a2d", "saved"):
        assert written(tmp_path / folder) == [[1, 3], [1, 3]], folder
        assert read_facts(tmp_path / folder).end_tokens_note is None, "it is told of the source only"
    names = [repr(token) for token in load_tokenizer(teacher).convert_ids_to_tokens([1, 3])]
    card = (tmp_path / "a2d" / "README.md").read_text().replace("\\|", "|")
    assert f"| end tokens | {names[0]} (1), {names[1]} (3) |" in card


def test_an_export_of_files_that_disagree_says_so(teacher, tmp_path) -> None:
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert export(tmp_path / "student", tmp_path / "first", "a2d-qwen3") == []
    set_keys(tmp_path / "student" / FILES[1], eos_token_id=3)
    (line,) = export(tmp_path / "student", tmp_path / "second", "a2d-qwen3")
    assert line.startswith("end tokens: the files of")
