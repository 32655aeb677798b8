"""The plan's memory of lossless mode is what the code allocates. `pytest tests/deploy/cluster/test_draft_memory.py`"""

from __future__ import annotations

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.rollout.verify import Verifier
from opdlm.common.form import StudentForm
from opdlm.common.grid import DraftGrid
from opdlm.common.types import ScoredTrajectory, TopKTargets
from opdlm.deploy.cluster.memory import Lengths, model_size, rollout_memory
from opdlm.learner.rows import build_draft_row
from tests.deploy.cluster.test_memory import by_name, config_with
from tests.tiny import EOS, MASK, tiny_model, trajectory


def test_drafts_have_rows_and_buffers_of_their_own(tmp_path) -> None:
    size, room = 3, DraftGrid(3)
    sample = trajectory([5] * 6, [6] * 10, range(1, 11))  # every draft was wrong
    row = build_draft_row(
        ScoredTrajectory(sample, TopKTargets(sample.response[:, None], sample.response[:, None] * 0.0, 32)),
        size,
        MASK,
        exclude_eos=False,
    )
    lengths = Lengths(6, room.end_position(6, 10), 6 + 10 * (1 + size), drafts=size)
    assert size * 9 < lengths.row - row.clean_length <= size * 10, "no draft follows the last token"
    assert lengths.response == 10
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = config_with(
        model={
            "teacher": "t",
            "dtype": "float32",
            "logit_shift": True,
            "context": "causal",
            "lora": {"tokens": "noisy"},
        },
        rollout={"strategy": "verified", "block_size": size, "block_grid": "response", "temperature": 1.0},
        objective={"selection": "drafts"},
    )
    settings = DecodeSettings.from_config(config.rollout, "opd", keep_targets=True)
    kept, noted = Verifier(model, settings, MASK, (EOS,), (MASK,), StudentForm(True, "causal")).keeps()
    terms = by_name(rollout_memory(config, model_size(tmp_path), lengths).terms)
    slots = config.rollout.batch_size
    assert terms["distributions of drafts"] == slots * kept.shape[1:].numel() * 4
    assert terms["clean hidden states"] == slots * lengths.end * noted.shape[2] * 4
    assert terms["logits of a step"] == slots * (2 * size - 1) * 32 * 4
