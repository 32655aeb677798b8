"""Lossless students, loaded without our packages, write what their base model writes.

`pytest tests/common/export/test_lossless_export.py`
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opdlm.common.config.schema import LoraConfig
from opdlm.common.errors import OpdlmError
from opdlm.common.export import export
from opdlm.common.grid import BlockGrid
from opdlm.common.model.adapters import NOISY_FILE, NoisyAdapters, is_adapter
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.folder import save_student
from opdlm.common.model.hub import model_folder
from opdlm.common.model.load import hidden_states, load_model
from opdlm.common.types import RolloutRequest
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.tools.push import collect
from tests.isolated import run_isolated
from tests.tiny import OTHER_FAMILIES, save_teacher

SIZE, MASK, MOST = 3, 17, 14
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"tied": True},
    "llama": OTHER_FAMILIES["llama"],
    "phi3": OTHER_FAMILIES["phi3"],
}
PROMPTS = [[5, 6, 7], [3, 4, 9, 10, 11, 2, 8, 7, 13], [12], [4, 4, 14, 15, 3, 9, 9, 10]]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """For each family its teacher, its student as a run leaves it (`NAME-run`) and the export (`NAME-export`)."""
    folder = tmp_path_factory.mktemp("lossless")
    for name, model in FAMILIES.items():
        save_teacher(folder / f"{name}-teacher", seed=7, **model)
        start, run = folder / f"{name}-start", folder / f"{name}-run"
        convert_checkpoint(folder / f"{name}-teacher", start, SIZE, "response", logit_shift=True, context="causal")
        student = load_model(start)
        layers = ["qkv_proj", "down_proj"] if name == "phi3" else ["q_proj", "v_proj", "o_proj", "down_proj"]
        NoisyAdapters(student, LoraConfig(rank=2, alpha=3, target_modules=layers, tokens="noisy"), MASK, 0)
        with torch.no_grad():
            for key, parameter in student.named_parameters():
                if is_adapter(key):
                    parameter.normal_(std=0.3)
        save_student(student, start, run, BlockGrid(SIZE, "response"))
        export(run, folder / f"{name}-export", f"a2d-{name}")
    return folder


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Two rows that end with a block in which two tokens are masked."""
    made = torch.randint(2, 17, (2, 11), generator=torch.Generator().manual_seed(1))
    made[:, [-3, -1]] = MASK
    return made


@pytest.fixture(scope="module")
def outside(root, ids, tmp_path_factory) -> dict[str, torch.Tensor]:
    return read_outside(root, ids, tmp_path_factory.mktemp("outside"), None)


def read_outside(root: Path, ids: torch.Tensor, work: Path, transformers: str | None) -> dict[str, torch.Tensor]:
    """What a process without our packages reads, with the transformers of a folder or with the environment's."""
    save_file({"ids": ids}, work / "ids.safetensors")
    folders = [str(root / f"{name}-{kind}") for name in FAMILIES for kind in ("run", "export")]
    for folder in folders:  # a run's folder has no card
        if not (Path(folder) / "README.md").is_file():
            shutil.copy(folder.replace("-run", "-export") + "/README.md", folder)
    job = {"folders": folders, "prompts": PROMPTS, "most": MOST, "transformers": transformers}
    job |= {"forward": str(work / "ids.safetensors"), "out": str(work / "out.safetensors")}
    run_isolated(Path(__file__).with_name("lossless_reader.py"), job, work)
    return load_file(work / "out.safetensors")


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generate_writes_what_the_teacher_writes(root, outside, name, kind) -> None:
    """transformers' own `generate` of the autoregressive model, in the same padded batch."""
    teacher = AutoModelForCausalLM.from_pretrained(root / f"{name}-teacher", dtype=torch.float32)
    found, width = outside[f"{name}-{kind}/greedy"].tolist(), max(map(len, PROMPTS))
    for prompt, row in zip(PROMPTS, found, strict=True):
        expected = teacher.generate(torch.tensor([prompt]), max_new_tokens=MOST, do_sample=False)[0].tolist()
        padding = width - len(prompt)
        assert row[:padding] == [0] * padding
        assert row[padding : padding + len(expected)] == expected
        assert set(row[padding + len(expected) :]) <= {0}


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_follows_the_teachers_distribution(root, outside, name) -> None:
    """A chi-square test on both tokens of 4,000 responses, at a temperature and with top-k."""
    teacher = AutoModelForCausalLM.from_pretrained(root / f"{name}-teacher", dtype=torch.float32)
    (end,) = read_facts(root / f"{name}-run").eos_ids
    expected: dict[tuple[int, int], float] = {}
    first = _distribution(teacher, PROMPTS[0])
    for a in first.nonzero()[:, 0].tolist():
        second = torch.eye(len(first))[0] if a == end else _distribution(teacher, [*PROMPTS[0], a])
        expected |= {(a, b): float(first[a] * second[b]) * 4000 for b in second.nonzero()[:, 0].tolist()}
    pairs = [tuple(pair) for pair in outside[f"{name}-export/sampled"][:, len(PROMPTS[0]) :].tolist()]
    assert set(pairs) <= expected.keys()
    common = {pair: count for pair, count in expected.items() if count >= 5}
    statistic = sum((pairs.count(pair) - count) ** 2 / count for pair, count in common.items())
    assert len(common) > 8
    assert statistic < len(common) + 4 * (2 * len(common)) ** 0.5


@torch.no_grad()
def _distribution(teacher: Any, prompt: list[int]) -> torch.Tensor:
    logits = teacher(torch.tensor([prompt])).logits[0, -1] / 1.5
    return logits.masked_fill(logits < logits.topk(6).values[-1], float("-inf")).softmax(-1)


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_forward_applies_the_adapters_to_noisy_tokens_alone(root, outside, ids, name, kind) -> None:
    """By default those of the last block, if it holds a mask token; with a given mask, those that are named."""
    student, length = load_model(root / f"{name}-run"), ids.shape[1]
    last = (torch.arange(length) >= length - SIZE).expand(len(ids), -1)
    seen = torch.ones(length, length).tril().bool() | last[0][:, None]
    masked = student.lm_head(
        hidden_states(student, ids, mask=seen[None, None].expand(len(ids), -1, -1, -1), noisy=last)
    )
    found = {case: outside[f"{name}-{kind}/{case}"] for case in ("masked", "clean", "given")}
    torch.testing.assert_close(found["masked"], masked, rtol=1e-4, atol=1e-4)
    for case, given in (("clean", ids[:, :-3]), ("given", ids)):
        torch.testing.assert_close(found[case], student.lm_head(hidden_states(student, given)), rtol=1e-4, atol=1e-4)
    assert (found["masked"] - found["given"])[:, -1].abs().max() > 0.1


def test_an_export_is_a_lossless_student_here_and_names_itself_as_one(root, tmp_path) -> None:
    before, after = read_facts(root / "llama-run"), read_facts(root / "llama-export")
    assert after.has_noisy_adapters
    assert (after.block_size, after.form, after.mask_id) == (before.block_size, before.form, before.mask_id)
    for file in (NOISY_FILE, "model.safetensors"):
        assert (root / "llama-run" / file).read_bytes() == (root / "llama-export" / file).read_bytes()
    load_model(root / "llama-export")
    card = (root / "llama-export" / "README.md").read_text()
    assert "This is a lossless student" in card
    assert "threshold=" not in card
    with pytest.raises(OpdlmError, match="layout: found llama, whose readers take every student for the paper's"):
        export(root / "llama-run", tmp_path / "plain", "llama")
    shutil.copytree(root / "llama-run", tmp_path / "damaged")
    (tmp_path / "damaged" / NOISY_FILE).unlink()
    with pytest.raises(OpdlmError, match=r"adapter_model.safetensors is missing, which config.json names"):
        export(tmp_path / "damaged", tmp_path / "new", "a2d-llama")
    assert not (tmp_path / "new").exists()


def test_another_block_size_keeps_adapters_and_output(root, tmp_path) -> None:
    """Drafts get longer, what is written stays the teacher's."""
    source = root / "llama-run"
    convert_checkpoint(source, tmp_path / "longer", SIZE + 2, "response")
    facts = read_facts(tmp_path / "longer")
    assert (facts.has_noisy_adapters, facts.block_size) == (True, SIZE + 2)
    assert (tmp_path / "longer" / NOISY_FILE).read_bytes() == (source / NOISY_FILE).read_bytes()
    with pytest.raises(OpdlmError, match="is a lossless student, whose adapters draft for"):
        convert_checkpoint(source, tmp_path / "plain", SIZE, "response", logit_shift=False, context="block_causal")
    prompts = [np.array(prompt, dtype=np.int32) for prompt in PROMPTS]
    requests = [RolloutRequest(i, str(i), ids, MOST, seed=i) for i, ids in enumerate(prompts)]
    longer, teacher = CheckpointDecoder(tmp_path / "longer"), CheckpointDecoder(root / "llama-teacher")
    drafted = longer.answer(requests, longer.base.greedy("verified"), 2)
    expected = teacher.answer(requests, teacher.base, 2)
    assert [ids.tolist() for ids in drafted.responses] == [ids.tolist() for ids in expected.responses]


def test_what_is_sent_to_the_hub_is_all_that_is_read_from_it(root, tmp_path, monkeypatch) -> None:
    upload = collect(root / "llama-run", None, tmp_path)
    assert NOISY_FILE in upload.files
    assert not [name for name in upload.left_out if name.endswith((".json", ".safetensors"))]
    assert "This is a lossless student" in upload.files["README.md"].read_text()
    repository, cache = [*upload.files, "onnx/model.safetensors"], tmp_path / "cache"

    def snapshot_download(name, *, allow_patterns, ignore_patterns, **_):
        wanted = filter_repo_objects(repository, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for file in wanted:
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(upload.files[file], cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_model(model_folder("me/lossless@v1"))
