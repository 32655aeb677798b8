"""Which model families are supported, and why others are not. `pytest tests/common/model/test_families.py`

What a supported family needs is tested for each of them elsewhere, with the models of `tests.tiny.OTHER_FAMILIES`:
train-decode parity (tests/test_parity.py), decoding (tests/actors/rollout/test_decoder.py), conversion and exports.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from opdlm.common.errors import OpdlmError
from opdlm.common.export.names import LAYOUTS
from opdlm.common.model.config import read_config
from opdlm.common.model.convert import convert_checkpoint
from opdlm.common.model.families import SUPPORTED_TYPES
from opdlm.common.model.load import hidden_states
from tests.tiny import OTHER_FAMILIES, save_teacher, tiny_model

IDS = torch.arange(3, 15)[None]


def test_every_supported_family_is_tested_and_has_its_layouts() -> None:
    tested = {"qwen3", *(settings.get("family", "qwen3") for settings in OTHER_FAMILIES.values())}
    assert tested == set(SUPPORTED_TYPES)
    assert {*SUPPORTED_TYPES, *(f"a2d-{family}" for family in SUPPORTED_TYPES), "sdar"} == set(LAYOUTS)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma", "its embedding layer scales"),
        ("gemma2", "its logits are scaled or capped"),
        ("gemma3_text", "through a sliding window"),
        ("mixtral", "a mixture of experts"),
        ("qwen3_moe", "a mixture of experts"),
        ("lfm2", "some of its layers are no attention"),
        ("a2d-gpt2", "supported: qwen3, a2d-qwen3"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, family, reason) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    raw = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(raw | {"model_type": family}))
    with pytest.raises(OpdlmError, match=f"model_type is '{family}'.*{reason}") as refused:
        convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert "\n" not in str(refused.value)
    assert "mistral, a2d-mistral, phi3" in str(refused.value)


@torch.no_grad()
def test_gemma_scales_what_its_embedding_looks_up() -> None:
    """The learner looks rows up itself where embedding and output matrix are one (`learner/tied_embedding.py`)."""
    model = tiny_model(family="gemma", tied=True)
    rows = model.get_input_embeddings().weight[IDS]
    assert not torch.allclose(model.get_input_embeddings()(IDS), rows)
    for family in SUPPORTED_TYPES:
        model = tiny_model(tied=True, **OTHER_FAMILIES.get(family, {}))
        assert torch.equal(model.get_input_embeddings()(IDS), model.get_input_embeddings().weight[IDS]), family


@torch.no_grad()
def test_gemma2_changes_logits_behind_the_output_matrix() -> None:
    for family in ("gemma2", *SUPPORTED_TYPES):
        model = tiny_model(**OTHER_FAMILIES.get(family, {"family": family}))
        agree = torch.allclose(model(IDS).logits, model.lm_head(hidden_states(model, IDS)), atol=1e-5)
        assert agree == (family != "gemma2"), family


@torch.no_grad()
def test_a_given_mask_takes_the_place_of_a_sliding_window() -> None:
    """So teacher (no mask given) and student (block-causal mask) would differ in more than the block."""
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    windows = {
        "gemma3_text": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
        "mistral": {"sliding_window": 3},
        "phi3": {"sliding_window": 3},
    }
    for family, window in windows.items():
        model = tiny_model(family=family, **window)
        assert not torch.allclose(hidden_states(model, IDS), hidden_states(model, IDS, mask=causal), atol=1e-3), family
    for family in SUPPORTED_TYPES:
        model = tiny_model(**OTHER_FAMILIES.get(family, {}))
        plain, masked = hidden_states(model, IDS), hidden_states(model, IDS, mask=causal)
        torch.testing.assert_close(plain, masked, rtol=1e-5, atol=1e-5, msg=family)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_files_of_mixtures_of_experts_do_not_hold_their_parameters(tmp_path, family) -> None:
    experts = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    model = tiny_model(family=family, **experts)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        held = set(tensors.keys())
    assert held != {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_counts_where_it_is_shorter_than_the_context(tmp_path, family) -> None:
    teacher = save_teacher(tmp_path / "teacher", **OTHER_FAMILIES[family])
    raw = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(raw | {"sliding_window": 127}))
    with pytest.raises(OpdlmError, match="sliding_window is 127, shorter than the context of 128 tokens"):
        read_config(teacher)
    (teacher / "config.json").write_text(json.dumps(raw | {"sliding_window": 128}))
    convert_checkpoint(teacher, tmp_path / "student", 4, "absolute")
    assert json.loads((tmp_path / "student" / "config.json").read_text())["sliding_window"] is None
    assert read_config(tmp_path / "student").sliding_window is None
