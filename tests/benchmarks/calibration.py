"""Is a student right as often as it is sure? Shares of right tokens by confidence, for tasks with one right answer.

    python -m tests.benchmarks.calibration runs/demo/student runs/block-8/student [--task chain] [--problems 1000]

Decoding by a threshold relies on it: what is revealed at 0.9 should be right nine times in ten. Greedy dynamic decoding
with each student's own blocks; every masked position of a step counts, revealed or not, while all tokens that are known
are right.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

from opdlm.actors.rollout.observation import StepObservation
from opdlm.common.data.tasks import get_task
from opdlm.deploy.evaluate.decoders import CheckpointDecoder
from opdlm.deploy.evaluate.held_out import HeldOutProblems
from tests.benchmarks.measure import write_json

EDGES = [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]


class Calibration:
    """An observer of decoding that counts candidates, and the right ones, by confidence.

    Args:
        prompts, solutions: token ids of each request's prompt and right response, end token included.
    """

    def __init__(self, prompts: list[np.ndarray], solutions: list[np.ndarray]) -> None:
        self._first = torch.tensor([ids.size for ids in prompts])
        self._solutions = pad_sequence([torch.from_numpy(ids) for ids in solutions], batch_first=True, padding_value=-1)
        self._went_wrong = torch.zeros(len(solutions), dtype=torch.bool)
        self.counts = torch.zeros(len(EDGES) - 1, 2, dtype=torch.int64)
        """`[bins, 2]`: all candidates of a bin, and the right ones."""

    def __call__(self, step: StepObservation) -> None:
        """Counts one step of all occupied slots, `[n, S]` positions."""
        index = torch.tensor(step.index)
        places = step.positions - self._first[index][:, None]
        within = (places >= 0) & (places < self._solutions.shape[1])
        wanted = self._solutions[index].gather(1, places.clamp(0, self._solutions.shape[1] - 1))
        known = within & (wanted >= 0)  # nothing is right or wrong behind the end
        right = step.candidates == wanted
        counted = known & step.masked & ~self._went_wrong[index][:, None]
        bins = torch.bucketize(step.confidence[counted], torch.tensor(EDGES[1:-1]))
        self.counts[:, 0] += bins.bincount(minlength=len(self.counts))
        self.counts[:, 1] += bins[right[counted]].bincount(minlength=len(self.counts))
        self._went_wrong[index] |= (step.revealed & known & ~right).any(dim=1)


def measure(folder: Path, task: str, problems: int) -> torch.Tensor:
    """Counts `[bins, 2]` of a student: candidates of each bin of confidence, and the right ones."""
    decoder = CheckpointDecoder(folder)
    held_out = HeldOutProblems([get_task(task)], decoder.tokenizer, problems, decoder.facts.eos_ids)
    solutions = [np.append(ids, decoder.facts.eos_ids[0]) for ids in held_out.solution_ids()]
    requests = held_out.requests(max(ids.size for ids in solutions))
    calibration = Calibration(held_out.prompt_ids, solutions)
    decoder.decode(requests, decoder.base.greedy("low_confidence_dynamic"), 128, calibration)
    return calibration.counts


def main() -> None:
    """Measures each student, prints a table, writes JSON."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("students", type=Path, nargs="+")
    made.add_argument("--task", default="chain")
    made.add_argument("--problems", type=int, default=1000)
    asked = made.parse_args()
    table = Table("student", *[f"{low:g} to {high:g}" for low, high in pairwise(EDGES)])
    found = {}
    for student in asked.students:
        counts = found[str(student)] = measure(student, asked.task, asked.problems).tolist()
        table.add_row(str(student), *[f"{right / total:.1%} of {total:,}" if total else "-" for total, right in counts])
    table.title = f"right tokens by confidence, {asked.problems} held-out problems of {asked.task}"
    Console().print(table)
    write_json("calibration", {"edges": EDGES, "counts": found})


if __name__ == "__main__":
    main()
