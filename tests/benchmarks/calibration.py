"""Is a student right as often as it is sure, and how far ahead? Shares of right tokens by confidence and by place.

    python -m tests.benchmarks.calibration runs/demo/student runs/block-8/student [--task chain] [--problems 1000]
    python -m tests.benchmarks.calibration runs/smollm2-135m/student --data knowledge --teacher models/smollm2-135m

Decoding by a threshold relies on it: what is revealed at 0.9 should be right nine times in ten. Greedy dynamic decoding
with each student's own blocks; every masked position of a step counts, revealed or not, while all tokens that are known
are right: those of a task's solution, or the teacher's own greedy answer. Place 1 is the first mask of a step.
Ends are counted once more by themselves: a student that does not see them where the answer ends goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from opdlm.deploy.evaluate.options import QuestionOptions
from opdlm.deploy.evaluate.questions import TASK_PROBLEMS, open_questions
from tests.benchmarks.measure import write_json

EDGES = [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0]


class Calibration:
    """An observer of decoding that counts candidates, and the right ones, by confidence.

    Args:
        prompts, solutions: token ids of each request's prompt and right response, end token included.
        block_size: S.
        eos_ids: the end-of-sequence tokens.
    """

    def __init__(
        self, prompts: Sequence[np.ndarray], solutions: Sequence[np.ndarray], block_size: int, eos_ids: Sequence[int]
    ) -> None:
        self._first = torch.tensor([ids.size for ids in prompts])
        self._solutions = pad_sequence([torch.from_numpy(ids) for ids in solutions], batch_first=True, padding_value=-1)
        self._went_wrong = torch.zeros(len(solutions), dtype=torch.bool)
        self.counts = torch.zeros(len(EDGES) - 1, block_size, 2, dtype=torch.int64)
        """`[bins, S, 2]`: all candidates of a bin that are the first, second, ... mask of a step; the right ones."""
        self.ends = torch.zeros(block_size, 2, dtype=torch.int64)
        """`[S, 2]`: the end tokens that are the first, second, ... mask of a step; those that the student sees."""
        self._eos_ids = torch.tensor(eos_ids)

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
        place = step.masked.cumsum(dim=1)[counted] - 1
        each = torch.stack([torch.ones_like(bins), right[counted].long()], 1)
        self.counts.index_put_((bins, place), each, accumulate=True)
        is_end = torch.isin(wanted[counted], self._eos_ids)
        self.ends.index_put_((place[is_end],), each[is_end], accumulate=True)
        self._went_wrong[index] |= (step.revealed & known & ~right).any(dim=1)


def measure(folder: Path, asked: QuestionOptions, teacher: Path | None, max_new_tokens: int) -> Calibration:
    """The counts of a student.

    Args:
        teacher: the model whose greedy answers are right; None: the solutions of a task are.
        max_new_tokens: longest answer of a teacher.
    """
    decoder = CheckpointDecoder(folder)
    if teacher is None:
        problems = asked.problems or TASK_PROBLEMS
        held_out = HeldOutProblems([get_task(str(asked.task))], decoder.tokenizer, problems, decoder.facts.eos_ids)
        solutions = [np.append(ids, decoder.facts.eos_ids[0]) for ids in held_out.solution_ids()]
        requests = held_out.requests(max(ids.size for ids in solutions))
    else:
        requests = list(open_questions(asked, decoder).requests(max_new_tokens))
        autoregressive = CheckpointDecoder(teacher)
        solutions = [ids.astype(np.int64) for ids in autoregressive.continue_prompts(requests, 0.0, 64)]
    calibration = Calibration(
        [r.prompt_ids for r in requests], solutions, decoder.base.block_size, decoder.facts.eos_ids
    )
    decoder.decode(requests, decoder.base.greedy("low_confidence_dynamic"), 128, calibration)
    return calibration


def show(title: str, heads: Sequence[str], found: dict[str, torch.Tensor]) -> None:
    """Prints shares of right tokens, a row for each student of counts `[columns, 2]`."""
    table = Table("student", *heads, title=title)
    for student, counts in found.items():
        table.add_row(
            student, *[f"{right / total:.1%} of {total:,}" if total else "-" for total, right in counts.tolist()]
        )
    Console().print(table)


def main() -> None:
    """Measures each student, prints tables, writes JSON."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("students", type=Path, nargs="+")
    made.add_argument("--task", help="default: chain, without --data")
    made.add_argument("--data", type=Path, help="questions of a file, or knowledge; needs --teacher")
    made.add_argument("--teacher", type=Path, help="the model whose greedy answers count as right")
    made.add_argument("--problems", type=int, help="default: 1,000 of a task, all of --data")
    made.add_argument("--max-new-tokens", type=int, default=32, help="of the teacher's answers")
    asked = made.parse_args()
    if asked.data is not None and asked.teacher is None:
        made.error("--data: questions may have many right answers; give --teacher, whose answers count")
    task = asked.task or (None if asked.data else "chain")
    questions = QuestionOptions(task=task, data=asked.data, problems=asked.problems)
    measured = {str(s): measure(s, questions, asked.teacher, asked.max_new_tokens) for s in asked.students}
    found = {student: calibration.counts for student, calibration in measured.items()}
    ends = {student: calibration.ends for student, calibration in measured.items()}
    size = max(counts.shape[1] for counts in found.values())
    places = [str(place) for place in range(1, size + 1)]
    sure = EDGES.index(0.9)
    show("right tokens by confidence", [f"{low:g} to {high:g}" for low, high in pairwise(EDGES)], summed(found, 1))
    show("right tokens by place", places, summed(found, 0))
    show("right tokens by place, confidence above 0.9", places, summed({s: c[sure:] for s, c in found.items()}, 0))
    show("ends seen by place", places, ends)
    counted = {"counts": {s: c.tolist() for s, c in found.items()}, "ends": {s: e.tolist() for s, e in ends.items()}}
    write_json("calibration", {"edges": EDGES} | counted)


def summed(found: dict[str, torch.Tensor], over: int) -> dict[str, torch.Tensor]:
    """Counts of each student, summed over confidences (0) or places (1)."""
    return {student: counts.sum(dim=over) for student, counts in found.items()}


if __name__ == "__main__":
    main()
