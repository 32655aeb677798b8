"""How often each sample was trained, also after deaths. `pytest tests/deploy/observe/test_ledger.py`"""

from __future__ import annotations

from pathlib import Path

from opdlm.deploy.observe.ledger import read_ledger
from opdlm.deploy.observe.records import RunRecords, read_records

QUEUE = {"queue_depth": 0, "rollout_actors": 1, "teacher_actors": 1}


class NoView:
    def show(self, record) -> None:
        """Shows nothing."""


def train(records: RunRecords, round_: int, samples: list[int]) -> None:
    """Reports a round of one optimizer step."""
    step = {"kind": "step", "round": round_, "step": round_ + 1, "loss": 1.0, "samples": samples}
    figures = {"round_tokens": 5, "train_seconds": 1.0, "train_forward_tokens": 9, "rollout_tokens": 5 * (round_ + 1)}
    records.learned([step, {"kind": "round", "round": round_ + 1, "step": round_ + 1, **figures}], QUEUE)


def test_rounds_trained_again_replace_what_was_trained_before(tmp_path: Path) -> None:
    records = RunRecords(tmp_path, NoView())
    records.learned([{"kind": "learner_start", "round": 0, "step": 0}], QUEUE)
    for round_ in range(3):
        train(records, round_, [2 * round_, 2 * round_ + 1])
    records.actor_died("rollout-1", "killed")
    assert read_ledger(read_records(tmp_path), 2, 8).figures() == {
        "samples_trained": 6,
        "samples_skipped": 0,
        "samples_trained_twice": 0,
        "samples_lost": 0,
    }
    records.learned([{"kind": "learner_start", "round": 1, "step": 1}], QUEUE)  # back to the checkpoint of round 1
    written = read_records(tmp_path)
    assert [r["step"] for r in written if r["kind"] == "step"] == [1]
    assert [(r["kind"], r["round"]) for r in written[-2:]] == [("actor_death", 3), ("learner_restart", 1)]
    assert written[-1]["lost_steps"] == 2
    for round_ in range(1, 4):
        train(records, round_, [2 * round_, 2 * round_ + 1])
    records.close()
    ledger = read_ledger(read_records(tmp_path), 2, 8)
    assert (ledger.trained, ledger.twice, ledger.lost) == (8, [], [])


def test_each_pass_has_every_sample_once() -> None:
    def step(samples: list[int], pass_number: int) -> dict:
        return {"kind": "step", "samples": samples, "pass_number": pass_number}

    whole = [step([1, 0], 0), step([2], 0), step([0, 2], 1), step([1], 1), {"kind": "round", "round": 1}]
    ledger = read_ledger(whole, 3, 3)
    assert (ledger.trained, ledger.twice, ledger.lost) == (6, [], [])
    ledger = read_ledger([*whole[:3], step([0], 1), whole[4]], 3, 3)
    assert (ledger.trained, ledger.twice, ledger.lost) == (6, [0], [1])


def test_the_ledger_finds_what_is_wrong() -> None:
    records = [
        {"kind": "step", "samples": [0, 1]},
        {"kind": "skipped_step", "samples": [3]},
        {"kind": "step", "samples": [1]},
        {"kind": "round", "round": 2},
        {"kind": "step", "samples": [6]},  # of a round that is not over, so not lost
    ]
    ledger = read_ledger(records, 3, 7)
    assert (ledger.trained, ledger.skipped, ledger.twice, ledger.lost) == (4, 1, [1], [2, 4, 5])
