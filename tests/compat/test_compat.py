"""What we write reads alike in transformers 4 and 5. `make test-compat`, or `pytest tests/compat` for version 5 alone.

OPDLM_TRANSFORMERS_4 names a folder with transformers 4 (`pip install --target`); without it the tests of version 4
skip. The folders are read in a process without our packages, and compared with what we read from their sources.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opdlm.common.export import LAYOUTS, export
from opdlm.common.masks import block_causal
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.folder import save_model
from opdlm.common.model.load import load_model
from opdlm.common.model.mask_token import MASK_TOKEN
from opdlm.common.model.tokenizer import load_tokenizer
from tests.compat.reader import CAUSAL, MASKED, read_tokenizer
from tests.compat.sources import write_sources
from tests.isolated import run_isolated
from tests.package.source_files import code_files

SIZE, GRID = 4, "absolute"
JOB: dict[str, Any] = {
    "texts": [
        "hello world , is it ? don't",
        "  two  spaces\n\nand 1234 ①é",
        "<|im_start|>user<|im_end|> a <|image|> b",
        "",
    ],
    "chat": [{"role": "system", "content": "the answer"}, {"role": "user", "content": " is 42 ?\n"}],
    "prompt": "5-3=",
    "ids": [5, 9, 3, 4, 12, 10, 6, 7, 11, 8, 14],
}
VERSIONS = ["5", "4"]
SOURCES = ["qwen3", "qwen3-yarn", "qwen2", "llama3", "llama-tied", "llama-spm", "chain"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Name -> path, Auto class, source and whether it is plain, of everything that we write from each source."""
    root, made = tmp_path_factory.mktemp("compat"), {}
    for source in write_sources(root / "sources"):
        student, name = root / f"{source.name}.student", source.name
        convert_checkpoint(source, student, SIZE, GRID)
        layouts = [layout for layout, target in LAYOUTS.items() if target.family == read_config(source).model_type]
        for layout in layouts:
            export(student, root / f"{name}.{layout}", layout)
        saved = load_model(student, "auto")  # as the learner writes RUN/student
        save_model(saved, load_tokenizer(student), root / f"{name}.saved", read_facts(student).eos_ids)
        teacher = load_model(source, "auto")  # as `opdlm pretrain` writes a teacher
        save_model(teacher, load_tokenizer(source), root / f"{name}.teacher", read_facts(source).eos_ids)
        for kind in ("student", "saved", "teacher", *layouts):
            plain = kind == "teacher" or not LAYOUTS.get(kind, LAYOUTS["sdar"]).files
            auto = CAUSAL if plain or kind == "sdar" else MASKED
            path = str(root / f"{name}.{kind}")
            made[f"{name}.{kind}"] = {"path": path, "auto": auto, "plain": plain, "source": str(source)}
    return made


@pytest.fixture(scope="module", params=VERSIONS)
def found(request, folders, tmp_path_factory) -> dict[str, Any]:
    """What a process with one version of transformers and without our packages read; `logits` among it."""
    work, at = tmp_path_factory.mktemp(f"transformers-{request.param}"), os.environ.get("OPDLM_TRANSFORMERS_4")
    if request.param == "4" and at is None:
        pytest.skip("transformers 4 is not here; make test-compat installs it")
    blocks = (torch.arange(len(JOB["ids"])) // SIZE)[None]
    job = JOB | {
        "transformers": at if request.param == "4" else None,
        "mask": block_causal(blocks, blocks)[0, 0].tolist(),
        "folders": list(folders.values()),
        "out": str(work),
    }
    run_isolated(Path(__file__).with_name("reader.py"), job, work)
    read = json.loads((work / "read.json").read_text())
    assert read["version"].split(".")[0] == request.param
    return read | {"logits": load_file(work / "logits.safetensors")}


@pytest.fixture(scope="module")
def references(folders) -> dict[str, Any]:
    """Source -> what its tokenizer gives here: of the source itself, and with the mask token that conversion adds."""
    made: dict[str, Any] = {}
    for name in SOURCES:
        source = folders[f"{name}.teacher"]["source"]
        made[name] = read_with_ours(source, add_mask=False), read_with_ours(source, add_mask=True)
    return made


def read_with_ours(source: str, add_mask: bool) -> dict[str, Any]:
    """`read_tokenizer` of the tokenizer that `load_tokenizer` gives for a source."""
    tokenizer = load_tokenizer(source)
    if add_mask and tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tokenizer)
        return json.loads(json.dumps(read_tokenizer(source, JOB)))


@pytest.mark.parametrize("name", SOURCES)
def test_same_ids_text_and_chat(found, folders, references, name) -> None:
    kinds = [key for key in folders if key.startswith(f"{name}.")]
    assert len(kinds) >= 5
    for key in kinds:
        for what, expected in references[name][not key.endswith(".teacher")].items():
            assert found[key][what] == expected, f"{what} of {key}"


@pytest.mark.parametrize("name", SOURCES)
def test_same_logits(found, folders, name) -> None:
    """Block-causal where the folder brings code; causal, and block-causal with a given mask, where it is plain."""
    ids = torch.tensor([JOB["ids"]])
    blocks = (torch.arange(ids.shape[1]) // SIZE)[None]
    for key in (key for key in folders if key.startswith(f"{name}.")):
        model = load_model(folders[key]["source"])  # conversion changes no logit
        with torch.no_grad():
            given = model(input_ids=ids, attention_mask=block_causal(blocks, blocks)).logits
            default = model(input_ids=ids).logits if folders[key]["plain"] else given
        for case, expected in (("given", given), ("default", default)):
            logits = found["logits"][f"{key}/{case}"][..., : expected.shape[-1]]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        assert found[key]["rope_theta"] == model.config.rope_parameters["rope_theta"], key
        assert found[key]["stops"] == ([0, 2] if name != "chain" else 1), key


def test_a_student_is_never_loaded_as_a_causal_model(found, folders) -> None:
    for key, folder in folders.items():
        if folder["plain"]:
            continue
        assert all("trust_remote_code" in error for error in found[key]["untrusted"].values()), key
        if folder["auto"] == MASKED:
            refused = found[key]["causal"]
            assert refused.startswith("ValueError: this is a block diffusion language model, not a causal one"), key
            assert "\n" not in refused


def test_every_folder_of_a_student_decodes_alike(found, folders) -> None:
    """`model.generate(**tokenizer(...))` gives one answer, whatever wrote the folder."""
    for name in SOURCES:
        answers = {
            k: found[k]["decoded_answer"] for k in folders if k.startswith(f"{name}.") and not folders[k]["plain"]
        }
        assert len(answers) >= 3
        assert len({tuple(answer) for answer in answers.values()}) == 1, answers


def test_padded_batches_and_pipelines(found, folders) -> None:
    """A row is decoded as if it were alone; a pipeline around the model, and one from an `sdar` folder, write text."""
    for key, folder in folders.items():
        if folder["plain"]:
            continue
        answers = found[key]["batch_answers"]
        for alone, padded in zip(answers["alone"], answers["padded"], strict=True):
            assert padded[: len(alone)] == alone, key
        assert answers["drawn"][0] == answers["drawn"][1], key
        assert all(text.startswith(JOB["prompt"]) for text in found[key]["piped"]), key
        if folder["auto"] == CAUSAL:
            assert found[key]["piped_from_folder"] == found[key]["piped"][0], key


def test_model_folders_are_written_in_one_place() -> None:
    """Another caller of `save_pretrained` would write what transformers 4 misreads. (peft has one for adapters.)"""
    callers = {file.name for file in code_files() if ".save_pretrained(" in file.read_text()}
    assert callers == {"folder.py", "lora.py"}
