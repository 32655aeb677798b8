"""When the learner uses flex_attention, and its block masks. `pytest tests/learner/test_flex.py`

`tests/gpu/test_flex.py` has the attention itself, whose backward pass needs a GPU.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from opdlm.common.config import config_from_dict, load_config
from opdlm.common.config.schema import ObjectiveConfig
from opdlm.common.errors import ConfigError
from opdlm.common.form import StudentForm
from opdlm.common.grid import BlockGrid
from opdlm.common.masks import training_mask
from opdlm.deploy.run.preflight import preflight
from opdlm.learner import flex
from opdlm.learner.packing import MicroBatch, collate, pack
from opdlm.learner.rows import build_rows
from tests.golden_files import unscored
from tests.system.runs import run_config
from tests.tiny import MASK, save_teacher, trajectory

OBJECTIVE = ObjectiveConfig(selection="all_states", exclude_eos=False)


def batches(causal: bool) -> list[MicroBatch]:
    """Micro-batches of several shapes: lines of rows, and one line of packed samples."""
    rng, form = np.random.default_rng(0), StudentForm(causal, "causal" if causal else "block_causal")
    made = []
    for count, kept in ((2, 12), (3, 40), (1, 8)):
        rows = []
        for _ in range(count):
            one = trajectory(list(rng.integers(3, 30, 5)), list(rng.integers(3, 30, kept)), list(range(1, kept + 1)))
            rows += build_rows(unscored(one), BlockGrid(4, "response"), OBJECTIVE, MASK, rng, form)
        made += [collate(rows), pack(rows)]
    return made


@pytest.mark.parametrize("causal", [False, True])
def test_block_masks_of_all_shapes_need_few_compilations_and_hold_every_visible_pair(monkeypatch, causal) -> None:
    torch._dynamo.reset()  # what other tests have compiled, or compiled too often
    counter = CompileCounter()
    compiled = torch.compile(create_block_mask, dynamic=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    for batch in batches(causal):
        mask = flex.block_mask(batch, causal)
        visible = training_mask(batch.samples, batch.copies, batch.blocks, causal)
        lines, length = batch.blocks.shape
        assert mask.shape == (lines, 1, length, length)
        b, q, k = (torch.arange(size) for size in (lines, length, length))
        said = mask.mask_mod(b[:, None, None], torch.tensor(0), q[None, :, None], k[None, None, :])
        assert said.equal(visible[:, 0])
        tiles = torch.nn.functional.pad(visible[:, 0], (0, -length % 128, 0, -length % 128))
        tiles = tiles.unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).any(dim=4).any(dim=2)
        assert mask.to_dense()[:, 0].bool().equal(tiles)
    assert 1 <= counter.frame_count <= 4, "one line or more, at most 128 tokens or more"


@pytest.mark.parametrize(
    ("asked", "gpus", "head", "meant"),
    [
        ("auto", 0, 128, "sdpa"),
        ("auto", 1, 128, "flex_attention"),
        ("auto", 0.4, 16, "flex_attention"),
        ("auto", 1, 8, "sdpa"),
        ("sdpa", 1, 128, "sdpa"),
        ("flex_attention", 1, 64, "flex_attention"),
    ],
)
def test_what_auto_means(tmp_path, asked, gpus, head, meant) -> None:
    config = config_from_dict(
        {
            "run": {"dir": str(tmp_path)},
            "model": {"teacher": "t", "attention": asked},
            "data": {"task": "chain", "prompts": 8},
            "learner": {"gpus_per_worker": gpus},
        }
    )
    assert flex.attention_for(config, head) == meant


def test_heads_that_flex_attention_cannot_compute_are_refused_before_anything_starts(tmp_path) -> None:
    teacher = save_teacher(tmp_path / "narrow", head_dim=8)
    file = tmp_path / "run.yaml"

    def checked(folder, attention: str):
        asked = {"teacher": str(folder), "dtype": "float32", "attention": attention}
        gpus = {"workers": 1, "batch_size": 4, "gpus_per_worker": 1}
        config = run_config(folder, tmp_path / "run", model=asked, learner=gpus)
        file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
        return preflight(load_config(file))

    with pytest.raises(ConfigError, match=r"model.attention: found `flex_attention`, but the heads of .* are 8 wide"):
        checked(teacher, "flex_attention")
    checked(teacher, "auto")
    checked(save_teacher(tmp_path / "wide", head_dim=16), "flex_attention")
