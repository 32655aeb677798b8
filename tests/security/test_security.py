"""No file that others wrote runs code. `pytest tests/security/test_security.py`

Every attack writes a marker file when it works. `test_the_bombs_work` shows that each kind of it does where somebody is
careless, so that the other tests can fail.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from opdlm.common.checkpoint import latest_checkpoint, save_checkpoint
from opdlm.common.config import load_config
from opdlm.common.config.schema import DataConfig
from opdlm.common.data.answers import math
from opdlm.common.data.chat import chat_prompt
from opdlm.common.data.prompts import load_prompts
from opdlm.common.errors import ConfigError, OpdlmError
from opdlm.common.export import export
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import convert
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.deploy.run import given_responses as offline
from opdlm.deploy.run.directory import held_config
from opdlm.learner.rollout_files import read_header, round_file
from tests import REPOSITORY
from tests.tiny import save_teacher

PACKAGES = REPOSITORY
EVIL_CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open'](MARKER, 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' ~ MARKER) }}",
    "{{ ('{0.__class__.__mro__}').format(messages) }}",
)


class Bomb:
    """Unpickled, it touches the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path) -> Iterator[Path]:
    """What an attack would make; asserted absent after the test."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code in a file was run"


@pytest.fixture
def bomb(marker) -> bytes:
    """A malicious pickle."""
    return pickle.dumps(Bomb(marker))


@pytest.fixture
def model(tmp_path) -> Path:
    """A sound model folder, to be made malicious."""
    return save_teacher(tmp_path / "model")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def test_the_bombs_work(tmp_path) -> None:
    paths = [tmp_path / name for name in ("pickle", "torch", "yaml", "python")]
    pickle.loads(pickle.dumps(Bomb(paths[0])))
    stream = io.BytesIO()
    torch.save(Bomb(paths[1]), stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    yaml.unsafe_load(yaml_bomb(paths[2]))
    exec(EVIL_CODE.format(marker=str(paths[3])))
    assert [path.name for path in paths if not path.exists()] == []


def yaml_bomb(marker: Path) -> str:
    return f"model: !!python/object/apply:os.mkdir [{str(marker)!r}]\n"


# --- model folders ------------------------------------------------------------------------------------------------


def use(model: Path, destination: Path) -> None:
    """Everything that is done with a model folder."""
    read_facts(model)
    load_tokenizer(model)
    load_model(model)
    convert(model, destination, 4, "absolute")


def test_only_a_pickle_of_weights_is_named(model, bomb, tmp_path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(OpdlmError, match=r"only pickles \(pytorch_model.bin\), which are not opened here"):
        load_model(model)
    with pytest.raises(OpdlmError, match="only pickles"):
        convert(model, tmp_path / "new", 4, "absolute")


@pytest.mark.parametrize("extra", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"])
def test_a_pickle_beside_good_weights_is_not_opened_nor_copied(model, bomb, extra, marker, tmp_path) -> None:
    (model / extra).write_bytes(bomb)
    use(model, tmp_path / "new")
    assert not (tmp_path / "new" / extra).exists()


BROKEN = {
    "model.safetensors": r"model.safetensors cannot be read",
    "config.json": r"config.json is not JSON",
    "generation_config.json": r"generation_config.json is not JSON",
    "tokenizer.json": r"the tokenizer in .* cannot be read",
    "tokenizer_config.json": r"the tokenizer in .* cannot be read",
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_pickle_under_a_good_name_is_one_line(model, bomb, file, marker, tmp_path) -> None:
    (model / file).write_bytes(bomb)
    with pytest.raises(OpdlmError, match=BROKEN[file]) as caught:
        use(model, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_an_index_that_names_a_pickle_is_refused(model, bomb) -> None:
    """A real safetensors file under another suffix passes a check of headers; transformers would unpickle the name."""
    (model / "model.safetensors").rename(model / "weights.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "weights.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OpdlmError, match=r"names 'weights.bin'; expected .safetensors files only"):
        load_model(model)
    (model / "weights.bin").write_bytes(bomb)
    with pytest.raises(OpdlmError, match=r"names 'weights.bin'; expected .safetensors files only"):
        load_model(model)


def test_code_beside_the_weights_is_not_imported(model, marker, tmp_path, monkeypatch) -> None:
    code = EVIL_CODE.format(marker=str(marker)) + "class X: ...\n"
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "x.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(code)
    maps = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X"}
    edit(model / "config.json", auto_map=maps | {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]})
    edit(model / "generation_config.json", custom_generate=str(model), auto_map=maps)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")  # whoever asks is told yes
    use(model, tmp_path / "new")
    assert asked == []
    assert list((tmp_path / "new").rglob("*.py")) == []
    assert "auto_map" not in json.loads((tmp_path / "new" / "config.json").read_text())


def test_an_unknown_tokenizer_class_with_code_is_one_line_or_nothing(model, marker, monkeypatch) -> None:
    (model / "tokenization_x.py").write_text(EVIL_CODE.format(marker=str(marker)) + "class EvilTokenizer: ...\n")
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_x.EvilTokenizer", "tokenization_x.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    monkeypatch.setattr("builtins.input", lambda text="": "y")
    assert len(load_tokenizer(model)) > 0
    (model / "config.json").unlink()  # then transformers alone chooses, and would need the code
    with pytest.raises(OpdlmError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(model)


def test_config_does_not_choose_kernels_or_weight_files(model, bomb, tmp_path, marker) -> None:
    """`attn_implementation` may name a kernel on the hub; `transformers_weights` files that nobody checked."""
    (model / "adapter_model.bin").write_bytes(bomb)
    kernel = "someone/kernel"
    edit(model / "config.json", attn_implementation=kernel, transformers_weights="adapter_model.bin")
    config = read_config(model)
    assert config._attn_implementation != kernel
    assert getattr(config, "transformers_weights", None) is None
    use(model, tmp_path / "new")
    assert kernel not in (tmp_path / "new" / "config.json").read_text()


def test_an_adapter_folder_does_not_lead_to_another_model(model, bomb, tmp_path) -> None:
    """transformers would load the base model that an adapter_config.json names, from wherever that is."""
    other = shutil.copytree(model, tmp_path / "other")
    edit(model / "adapter_config.json", base_model_name_or_path=str(other), peft_type="LORA")
    (model / "adapter_model.bin").write_bytes(bomb)
    with pytest.raises(OpdlmError, match=r"holds an adapter \(adapter_config.json\); expected a merged model"):
        load_model(model)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(model, template, marker, tmp_path) -> None:
    (model / "chat_template.jinja").write_text(f"{{% set MARKER = {str(marker)!r} %}}{template}")
    tokenizer = load_tokenizer(model)
    with pytest.raises(OpdlmError, match="chat template: it tries to leave its sandbox") as caught:
        chat_prompt(tokenizer, "1+2=")
    assert "\n" not in str(caught.value)
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+2="}\n')
    data = DataConfig(path=str(tmp_path / "d.jsonl"), chat_template=True)
    with pytest.raises(OpdlmError, match="chat template: it tries to leave its sandbox"):
        load_prompts(data, tokenizer, 99, 0)


# --- checkpoints, rollouts, responses, run directories ------------------------------------------------------------


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_a_checkpoint_with_a_fitting_checksum(tmp_path, bomb, marker, file, caplog) -> None:
    def write(folder: Path) -> None:
        save_file({"w": np.ones(3, np.float32)}, folder / "weights.safetensors")
        save_file({"exp_avg.w": np.ones(3, np.float32)}, folder / "optimizer.safetensors", {"step": "1"})

    root = tmp_path / "checkpoints"
    folders = [save_checkpoint(root, {"rounds": rounds}, write, keep=5) for rounds in (1, 2)]

    def poison(folder: Path) -> None:
        (folder / file).write_bytes(bomb)
        if file != "manifest.json":
            edit(folder / "manifest.json", **{file: {"bytes": len(bomb), "crc32": zlib.crc32(bomb)}})

    poison(folders[1])
    with caplog.at_level(logging.WARNING):
        found = latest_checkpoint(root)
    assert found is not None
    assert found.rounds == 1
    assert "round-000002 is damaged" in caplog.text
    poison(folders[0])
    with pytest.raises(OpdlmError, match="no whole checkpoint among 2") as caught:
        latest_checkpoint(root)
    assert "\n" not in str(caught.value)


def test_rollouts_that_are_a_pickle(tmp_path, bomb, marker) -> None:
    file = round_file(tmp_path, 0)
    file.write_bytes(bomb)
    with pytest.raises(OpdlmError, match=r"saved rollouts: .* cannot be read"):
        read_header(file)
    for metadata in (bomb.decode("latin-1"), "[]", json.dumps({"facts": {}, "samples": []})):
        save_file({"a": np.ones(1)}, file, {"rollouts": metadata})
        with pytest.raises(OpdlmError, match=r"saved rollouts: .* cannot be read: its metadata"):
            read_header(file)


def pickled_extension(bomb: bytes) -> pa.Table:
    """A column of the extension type that pyarrow once unpickled on reading (CVE-2023-47248), with pandas metadata."""
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb}
    schema = pa.schema(
        [pa.field("prompt", pa.string(), metadata=kind), pa.field("response_ids", pa.list_(pa.int32()))],
        metadata={"pandas": bomb, "opdlm": bomb},
    )
    return pa.table([["1+2="], [[1, 2]]], schema=schema)


def test_a_responses_cache_with_pickles_in_its_metadata(tmp_path, bomb, marker) -> None:
    expected = offline.Recipe("t", "p", 4, 1.0, 0)
    file = tmp_path / "responses.parquet"
    file.write_bytes(bomb)
    with pytest.raises(ConfigError, match=r"offline.cache: .* is not a file of teacher responses of ours"):
        offline.read_responses(file, expected)
    pq.write_table(pickled_extension(bomb), file)
    with pytest.raises(ConfigError, match=r"offline.cache: .* is not a file of teacher responses of ours") as caught:
        offline.read_responses(file, expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["yaml", "pickle"])
def test_run_files_and_run_directories(tmp_path, bomb, marker, kind) -> None:
    run = tmp_path / "run"
    run.mkdir()
    file = run / "config.yaml"
    file.write_bytes(yaml_bomb(marker).encode() if kind == "yaml" else bomb)
    with pytest.raises(ConfigError, match=r"run file: .*config.yaml is not YAML") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(OpdlmError, match=r"config.yaml is not YAML"):
        held_config(run)
    good = tmp_path / "good.yaml"
    good.write_text("model: {teacher: t}\ndata: {path: p}\n")
    override = f"run.dir=!!python/object/apply:os.mkdir [{str(marker)!r}]"
    with pytest.raises(ConfigError, match="the value is not YAML"):
        load_config(good, [override])


@pytest.mark.parametrize("file", ["config.yaml", "report.json"])
def test_export_reads_a_run_as_data(model, tmp_path, bomb, marker, file) -> None:
    run = tmp_path / "run"
    convert(model, run / "student", 4, "absolute")
    (run / "config.yaml").write_text("model: {teacher: t}\n")
    (run / file).write_bytes(yaml_bomb(marker).encode() if file == "config.yaml" else bomb)
    with pytest.raises(OpdlmError, match=rf"{file} is not"):
        export(run / "student", tmp_path / "out", "qwen3")
    assert not (tmp_path / "out").exists()


# --- data ---------------------------------------------------------------------------------------------------------


def prompts(path: object, tokenizer, **settings: object) -> list[str]:
    return [
        tokenizer.decode(p.ids) for p in load_prompts(DataConfig(path=str(path), **settings), tokenizer, 99, 0).prompts
    ]


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_a_pickle_as_a_data_file(tmp_path, model, bomb, marker, name) -> None:
    (tmp_path / name).write_bytes(bomb)
    with pytest.raises(ConfigError, match=r"^data.path: ") as caught:
        prompts(tmp_path / name, load_tokenizer(model))
    assert "\n" not in str(caught.value)


def test_parquet_with_a_pickled_extension_type_is_plain_text(tmp_path, model, bomb, marker) -> None:
    pq.write_table(pickled_extension(bomb), tmp_path / "d.parquet")
    assert prompts(tmp_path / "d.parquet", load_tokenizer(model)) == ["1+2="]


@pytest.mark.parametrize("where", ["dataset_info.json", "state.json", "data"])
def test_a_saved_folder_with_a_pickle(tmp_path, model, bomb, marker, where) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "1+2="}]).save_to_disk(str(saved))
    file = next(saved.glob("*.arrow")) if where == "data" else saved / where
    file.write_bytes(bomb)
    with pytest.raises(ConfigError, match=r"data.path: .* could not be read as a data set") as caught:
        prompts(saved, load_tokenizer(model))
    assert "\n" not in str(caught.value)


def test_a_saved_folder_cannot_name_what_is_built(tmp_path, model, marker) -> None:
    """`_type` of a feature names a class that `datasets` calls: only its own feature types may come of it."""
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "1+2="}]).save_to_disk(str(saved))
    edit(saved / "dataset_info.json", features={"prompt": {"_type": "os.mkdir", "path": str(marker)}})
    with pytest.raises(ConfigError, match=r"Feature type 'os.mkdir' not found"):
        prompts(saved, load_tokenizer(model))


def test_loading_scripts_are_not_run(tmp_path, model, marker, monkeypatch) -> None:
    """Beside the data, in the folder of its name, and as `data.path` itself."""
    tokenizer, code = load_tokenizer(model), EVIL_CODE.format(marker=str(marker))
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
def test_answers_are_marked_without_being_evaluated(tmp_path, marker, form) -> None:
    """sympy's parser evaluates Python; math-verify gives it digits and operators only."""
    pytest.importorskip("math_verify")
    check = math("72")
    for attack in (f"__import__('os').mkdir('{marker}')", f"1+__import__('os').mkdir('{marker}')*(2)"):
        assert check(form.format(attack)) is not True


# --- what the packages call ---------------------------------------------------------------------------------------

FORBIDDEN = {
    "torch.load", "pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads",
    "joblib.load", "marshal.loads", "shelve.open", "pd.read_pickle", "pandas.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "os.system", "__import__",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def forbidden(source: str) -> list[str]:
    """`line: what` of each call that runs code out of files (comments and strings do not count)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_IMPORTS]
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS or names & FORBIDDEN:
                found.append(f"{node.lineno}: {node.module}")
        if isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in FORBIDDEN:
                found.append(f"{node.lineno}: {name}")
            found += [
                f"{node.lineno}: {k.arg}"
                for k in node.keywords
                if k.arg in FORBIDDEN_KEYWORDS and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            ]
    return found


def test_the_scan_sees_what_it_looks_for() -> None:
    bad = (
        "torch.load(f)", "import pickle", "from pickle import loads", "from torch import load", "yaml.load(f, L)",
        "x(f, trust_remote_code=True)", "x(f, trust_remote_code=flag)", "np.load(f, allow_pickle=True)", "eval(t)",
    )  # fmt: skip
    assert [line for line in bad if not forbidden(line)] == []
    assert forbidden("model.eval()\nyaml.safe_load(t)\nx(f, trust_remote_code=False)\n'torch.load(f)'") == []


def test_no_package_runs_what_is_in_a_file() -> None:
    files = [f for room in ("common", "actors", "learner", "deploy") for f in sorted((PACKAGES / room).rglob("*.py"))]
    assert len(files) > 80
    assert {str(f): found for f in files if (found := forbidden(f.read_text()))} == {}
