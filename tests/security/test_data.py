"""Data files and answers execute no code. `pytest tests/security/test_data.py`"""

from __future__ import annotations

import datasets
import pyarrow.parquet as pq
import pytest

from opdlm.common.config.schema import DataConfig
from opdlm.common.data.answers import math_check
from opdlm.common.data.prompts import load_prompts
from opdlm.common.errors import ConfigError
from opdlm.common.model.tokenizer import load_tokenizer
from tests.security.attacks import PYTHON_CODE, edit_json, table_with_pickles


def prompts(path: object, tokenizer, **settings: object) -> list[str]:
    """The texts of the prompts in a data file."""
    found = load_prompts(DataConfig(path=str(path), **settings), tokenizer, 99, 0)
    return [tokenizer.decode(prompt.ids) for prompt in found.prompts]


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_a_pickle_as_a_data_file_is_an_error_in_one_line(tmp_path, model, malicious_pickle, marker, name) -> None:
    (tmp_path / name).write_bytes(malicious_pickle)
    with pytest.raises(ConfigError, match=r"^data.path: ") as caught:
        prompts(tmp_path / name, load_tokenizer(model))
    assert "\n" not in str(caught.value)


def test_a_pickled_extension_type_in_a_parquet_file_is_ignored(tmp_path, model, malicious_pickle, marker) -> None:
    pq.write_table(table_with_pickles(malicious_pickle), tmp_path / "d.parquet")
    assert prompts(tmp_path / "d.parquet", load_tokenizer(model)) == ["1+2="]


@pytest.mark.parametrize("where", ["dataset_info.json", "state.json", "data"])
def test_a_pickle_in_a_saved_data_set_is_an_error_in_one_line(tmp_path, model, malicious_pickle, marker, where) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "1+2="}]).save_to_disk(str(saved))
    file = next(saved.glob("*.arrow")) if where == "data" else saved / where
    file.write_bytes(malicious_pickle)
    with pytest.raises(ConfigError, match=r"data.path: .* could not be read as a data set") as caught:
        prompts(saved, load_tokenizer(model))
    assert "\n" not in str(caught.value)


def test_a_saved_data_set_cannot_name_a_class_to_build(tmp_path, model, marker) -> None:
    """`datasets` calls the class that a feature's `_type` names: it may be one of its own feature types only."""
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "1+2="}]).save_to_disk(str(saved))
    edit_json(saved / "dataset_info.json", features={"prompt": {"_type": "os.mkdir", "path": str(marker)}})
    with pytest.raises(ConfigError, match=r"Feature type 'os.mkdir' not found"):
        prompts(saved, load_tokenizer(model))


def test_loading_scripts_are_not_executed(tmp_path, model, marker, monkeypatch) -> None:
    """A script beside the data, in the folder that has its name, and as `data.path` itself."""
    tokenizer, code = load_tokenizer(model), PYTHON_CODE.format(marker=str(marker))
    saved = tmp_path / "evil"
    datasets.Dataset.from_list([{"prompt": "1+2="}]).save_to_disk(str(saved))
    for file in (saved / "evil.py", saved / "__init__.py", tmp_path / "evil.py"):
        file.write_text(code)
    assert prompts(saved, tokenizer) == ["1+2="]
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "evil.py", "evil.py"):
        with pytest.raises(ConfigError, match=r"^data.path: ") as caught:
            prompts(path, tokenizer)
        assert "\n" not in str(caught.value)
    script_only = tmp_path / "only"
    script_only.mkdir()
    (script_only / "only.py").write_text(code)
    with pytest.raises(ConfigError, match="could not be read as a data set"):
        prompts(script_only, tokenizer)


@pytest.mark.parametrize("form", ["\\boxed{{{0}}}", "${0}$", "final answer is {0}. I hope", "= {0}"])
def test_answers_are_marked_without_evaluating_them(tmp_path, marker, form) -> None:
    """sympy's parser evaluates Python; math-verify passes only digits and operators to it."""
    pytest.importorskip("math_verify")
    check = math_check("72")
    for attack in (f"__import__('os').mkdir('{marker}')", f"1+__import__('os').mkdir('{marker}')*(2)"):
        assert check(form.format(attack)) is not True
