"""Exports, loaded without our packages, decode as our decoder. `pytest tests/common/export/test_export.py`"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opdlm.actors.rollout.decoder import BlockDecoder
from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.common.config.base import Strategy
from opdlm.common.export import export
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import block_causal
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.facts import read_facts
from opdlm.common.model.load import load_model
from opdlm.common.model.shards import read_shards
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.types import RolloutRequest
from tests.isolated import run_isolated
from tests.tiny import OTHER_FAMILIES, save_teacher

SIZE, MASK, CAUSAL = 4, 17, {"grid": "response", "context": "causal"}
EXPORTS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    # name: layout, Auto class that loads its code, settings of the student
    "a2d-qwen3": ("a2d-qwen3", "AutoModelForMaskedLM", {"grid": "absolute"}),
    "a2d-qwen3-response": ("a2d-qwen3", "AutoModelForMaskedLM", {"grid": "response", "tied": True}),
    "a2d-qwen2": ("a2d-qwen2", "AutoModelForMaskedLM", {"grid": "absolute", **OTHER_FAMILIES["qwen2"]}),
    "a2d-llama": ("a2d-llama", "AutoModelForMaskedLM", {"grid": "response", **OTHER_FAMILIES["llama"]}),
    "a2d-qwen3-shift": ("a2d-qwen3", "AutoModelForMaskedLM", {"grid": "absolute", "logit_shift": True}),
    "a2d-llama-causal": ("a2d-llama", "AutoModelForMaskedLM", {**CAUSAL, **OTHER_FAMILIES["llama"]}),
    "a2d-qwen3-both": ("a2d-qwen3", "AutoModelForMaskedLM", {**CAUSAL, "logit_shift": True, "order": "sequential"}),
    "sdar": ("sdar", "AutoModelForCausalLM", {"grid": "absolute", "max_shard_size": "4KB"}),
    "sdar-spare": ("sdar", "AutoModelForCausalLM", {"grid": "absolute", "spare_rows": 9}),
    "sdar-yarn": ("sdar", "AutoModelForCausalLM", {"grid": "response", **OTHER_FAMILIES["qwen3-yarn"]}),
    "plain-qwen3": ("qwen3", None, {"grid": "absolute", "spare_rows": 9}),
    "plain-llama": ("llama", None, {"grid": "response", "order": "sequential", **OTHER_FAMILIES["llama"]}),
}
for family in ("mistral", "phi3", "smollm3", "olmo2"):
    EXPORTS[f"a2d-{family}"] = (f"a2d-{family}", "AutoModelForMaskedLM", {"grid": "absolute", **OTHER_FAMILIES[family]})
WITH_CODE = [name for name, (_, auto, _) in EXPORTS.items() if auto]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A folder that holds `NAME-student` and its export `NAME` for each name of EXPORTS."""
    root = tmp_path_factory.mktemp("exports")
    for name, (layout, _, model) in EXPORTS.items():
        model = dict(model)
        grid, form = model.pop("grid"), {key: model.pop(key, None) for key in ("logit_shift", "context", "order")}
        save_teacher(root / f"{name}-teacher", seed=7, **model)
        convert_checkpoint(root / f"{name}-teacher", root / f"{name}-student", SIZE, grid, **form)
        export(root / f"{name}-student", root / name, layout)
    return root


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Token ids, padding masks, an attention mask that no layout gives by default, and prompts."""
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 18, (2, 14), generator=rng)  # the mask token (17) among them
    padding = torch.ones(2, 14, dtype=torch.int64)
    padding[0, :3] = 0
    given = torch.rand((2, 1, 14, 14), generator=rng) < 0.5
    lengths = (5, 6, 7, 8, 1, 19)
    prompts = {f"prompt.{i}": torch.randint(2, 18, (1, n), generator=rng) for i, n in enumerate(lengths)}
    return {
        **{f"{name}.ids": ids.clone() for name in ("whole", "left", "right")},
        "left.padding": padding,
        "right.padding": padding.flip(1).contiguous(),
        "given.mask": given | torch.eye(14, dtype=torch.bool),
        "given.positions": torch.randint(0, 40, (2, 14), generator=rng),
        **prompts,
    }


@pytest.fixture(scope="module")
def outside(exports, inputs, tmp_path_factory) -> tuple[dict[str, torch.Tensor], str]:
    """The results of a process without our packages, and what the code of the model cards printed."""
    work = tmp_path_factory.mktemp("outside")
    save_file(inputs, work / "inputs.safetensors")
    job = {
        "inputs": str(work / "inputs.safetensors"),
        "out": str(work / "out.safetensors"),
        "folders": [{"path": str(exports / name), "auto": auto} for name, (_, auto, _) in EXPORTS.items()],
    }
    printed = run_isolated(Path(__file__).with_name("bare_reader.py"), job, work)
    return load_file(job["out"]), printed


def expected(model, ids, real, size: int, kind: str, causal: bool) -> torch.Tensor:
    """Logits `[B, T, V]`, computed row by row without the padding; zeros at padding.

    `causal`: only the tokens of the last block, if that holds a mask token, see tokens behind them.
    """
    logits = torch.zeros(*ids.shape, model.config.vocab_size)
    for row in range(len(ids)):
        tokens = ids[row][real[row]]
        grid = BlockGrid(size, kind)
        blocks = ((torch.arange(len(tokens)) + grid.offset(len(tokens))) // size)[None]
        with torch.no_grad():
            mask = block_causal(blocks, blocks)
            last = blocks[0] == blocks[0, -1]
            if causal:
                mask &= (last & (tokens[last] == MASK).any())[:, None] | torch.ones(mask.shape[2:]).tril().bool()
            output = model(input_ids=tokens[None], attention_mask=mask, use_cache=False)
        logits[row][real[row]] = output.logits[0]
    return logits


@pytest.mark.parametrize("name", WITH_CODE)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_without_our_packages(exports, inputs, outside, name, implementation) -> None:
    student = load_model(exports / f"{name}-student")
    facts = read_facts(exports / name)
    kind, form = facts.block_grid, facts.form
    found = {key.rpartition(".")[2]: v for key, v in outside[0].items() if key.startswith(f"{name}/{implementation}.")}
    same = {"rtol": 1e-5, "atol": 1e-5}

    for case in ("whole", "left", "right"):
        ids = inputs[f"{case}.ids"]
        real = inputs.get(f"{case}.padding", torch.ones_like(ids)).bool()
        want = expected(student, ids, real, SIZE, kind, form.causal)
        torch.testing.assert_close(found[case][real], want[real], **same)
    with torch.no_grad():
        want = student(
            input_ids=inputs["whole.ids"],
            attention_mask=inputs["given.mask"],
            position_ids=inputs["given.positions"],
            use_cache=False,
        ).logits
    torch.testing.assert_close(found["given"], want, **same)

    whole = found["whole"]
    if kind == "absolute":  # on the other grid, blocks depend on the end of the input
        torch.testing.assert_close(found["cached"], whole[:, 8:], **same)
    labels = inputs["whole.ids"][:, 1::2]
    predicting = whole[:, :-1:2] if form.logit_shift else whole[:, 1::2]
    loss = torch.nn.functional.cross_entropy(predicting.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found["loss"], loss, **same)


@pytest.mark.parametrize("name", WITH_CODE)
def test_generate_of_a_padded_batch_decodes_as_our_decoder(exports, inputs, outside, name) -> None:
    prompts = [value[0].tolist() for key, value in inputs.items() if key.startswith("prompt.")]
    width, pad = max(map(len, prompts)), 0
    for kind, how in (
        ("decode.9", (9, 0.3)),
        ("decode.5", (5, 1.0)),
        ("in_order", (9, 0.3, "sequential_dynamic")),
    ):
        found = outside[0][f"{name}/{kind}"].tolist()
        ours = [ids.tolist() for ids in decode(exports / f"{name}-student", inputs, *how)]
        longest = max(map(len, ours))
        for prompt, response, row in zip(prompts, ours, found, strict=True):
            padding = width - len(prompt)
            assert row == [1] * padding + prompt + response + [pad] * (longest - len(response))
    first = outside[0][f"{name}/alone"][0].tolist()
    assert first == prompts[0] + decode(exports / f"{name}-student", inputs, 9, 0.3)[0].tolist()


@pytest.mark.parametrize("name", WITH_CODE)
def test_sampling_of_an_export_follows_torchs_seed(outside, name) -> None:
    found = {case: outside[0][f"{name}/{case}"].tolist() for case in ("drawn", "again", "other")}
    assert found["drawn"] == found["again"]
    assert found["drawn"] != found["other"]
    assert {17, *range(18, 27)}.isdisjoint(token for row in found["drawn"] for token in row[19:])
    greedy = outside[0][f"{name}/decode.9"].tolist()
    for case in ("top_k", "top_p"):  # both leave the likeliest token alone
        assert outside[0][f"{name}/{case}"].tolist() == greedy


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_loads_as_a_student_here(exports, inputs, name) -> None:
    """It decodes as the student that was exported, and none of its code runs."""
    before, after = exports / f"{name}-student", exports / name
    facts, original = read_facts(after), read_facts(before)
    for field in ("vocab_size", "context", "eos_ids", "mask_id", "block_size", "block_grid", "form", "order"):
        assert getattr(facts, field) == getattr(original, field), field
    assert facts.is_student
    assert read_config(after).rope_parameters == read_config(before).rope_parameters
    for ours, theirs in zip(decode(before, inputs, 9, 0.3), decode(after, inputs, 9, 0.3), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert not any(module.startswith("transformers_modules") for module in sys.modules), "code of the folder ran"
    for file in read_shards(before).headers:
        assert (before / file).read_bytes() == (after / file).read_bytes(), file
    assert load_tokenizer(after).mask_token_id == facts.mask_id


def test_an_export_converts_to_another_block_size(exports, tmp_path) -> None:
    """An exported folder can be converted again, and keeps its mask token."""
    assert convert_checkpoint(exports / "a2d-qwen3", tmp_path / "eight", 8, "response") == 17
    facts = read_facts(tmp_path / "eight")
    assert (facts.block_size, facts.block_grid, facts.vocab_size) == (8, "response", 18)
    assert (tmp_path / "eight" / "model.safetensors").read_bytes() == (
        exports / "a2d-qwen3" / "model.safetensors"
    ).read_bytes()
    raw = json.loads((tmp_path / "eight" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("a2d-qwen3", ["A2DQwen3LMHeadModel"])


def test_the_code_of_every_card_prints_the_answer_of_our_decoder(exports, inputs, outside) -> None:
    """The code ran in the process without our packages."""
    printed = dict(re.findall(r"card of (\S+):\n(.*)\n", outside[1]))
    assert printed.keys() == EXPORTS.keys()
    assert all(text.startswith("47+8-3=") for text in printed.values())
    tokenizer = load_tokenizer(exports / "a2d-qwen3")
    prompt = torch.tensor([tokenizer("47+8-3=", add_special_tokens=False)["input_ids"]])
    for name, text in printed.items():
        threshold = 0.9 if EXPORTS[name][1] else 1.0
        (response,) = decode(exports / f"{name}-student", {"prompt.0": prompt}, 32, threshold)
        assert text.startswith("47+8-3=" + tokenizer.decode(response)), name


def test_config_json_has_the_fields_that_engines_read(exports, outside) -> None:
    raw = json.loads((exports / "sdar" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("sdar", ["SDARForCausalLM"])
    assert (raw["block_size"], raw["mask_token_id"], raw["rope_theta"]) == (SIZE, 17, 10000.0)
    assert raw["auto_map"]["AutoModelForCausalLM"] == "modeling_sdar.SDARForCausalLM"
    assert outside[0]["sdar-yarn/config"].tolist() == [1e6, 4.0], "attributes of the config object"
    raw = json.loads((exports / "a2d-qwen3" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("a2d-qwen3", ["A2DQwen3LMHeadModel"])
    assert "rope_parameters" not in raw, "rope_theta is in one place, which transformers 4 and 5 both read"


def decode(
    folder: Path,
    inputs: dict[str, torch.Tensor],
    limit: int,
    threshold: float,
    strategy: Strategy | None = None,
) -> list[np.ndarray]:
    """Greedy responses of our decoder to the prompts of `inputs`. `strategy`: None is the student's own."""
    facts = read_facts(folder)
    strategy = strategy or facts.usual_strategies[-1]
    settings = DecodeSettings(facts.block_size, facts.block_grid, strategy, threshold)
    prompts = [value[0].numpy().astype(np.int32) for key, value in inputs.items() if key.startswith("prompt.")]
    requests = [RolloutRequest(i, str(i), ids, limit, seed=i) for i, ids in enumerate(prompts)]
    decoder = BlockDecoder(
        load_model(folder), settings, facts.mask_id, facts.eos_ids, 4, tokens=facts.tokens, form=facts.form
    )
    return [t.response for t in decoder.decode(requests)[0]]
