"""The ledger of a run: how often each sample was trained, counted from the records of its optimizer steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ledger:
    """What became of the samples of the trained rounds. Sample i is the run's i-th prompt, epoch by epoch."""

    trained: int
    """Samples in optimizer steps, counted once for each pass over them (`learner.passes`)."""
    skipped: int
    """Samples of the steps that were skipped: their gradient was not finite, or there was nothing to learn from."""
    twice: list[int]
    """Samples that some pass has in more than one step."""
    lost: list[int]
    """Samples of a trained round that some pass has in no step."""

    def figures(self) -> dict[str, int]:
        """Counts, for the report."""
        return {
            "samples_trained": self.trained,
            "samples_skipped": self.skipped,
            "samples_trained_twice": len(self.twice),
            "samples_lost": len(self.lost),
        }


def read_ledger(records: Iterable[dict[str, Any]], prompts_per_round: int, total: int) -> Ledger:
    """Counts the samples in the records of `metrics.jsonl`, which has each step once, also one that was trained again.

    Args:
        total: samples in the whole run. Those of the rounds that have a `round` record must have been trained.
    """
    times: Counter[tuple[int, int]] = Counter()  # by (pass, sample)
    skipped = rounds = 0
    passes = {0}
    for record in records:
        if record["kind"] in ("step", "skipped_step"):
            samples = record.get("samples", ())  # older runs recorded neither samples nor passes
            passes.add(pass_ := record.get("pass_number", 0))
            times.update((pass_, index) for index in samples)
            skipped += len(samples) if record["kind"] == "skipped_step" else 0
        elif record["kind"] == "round":
            rounds = max(rounds, record["round"])
    due = range(min(rounds * prompts_per_round, total))
    return Ledger(
        trained=sum(times.values()) - skipped,
        skipped=skipped,
        twice=sorted({index for (_, index), count in times.items() if count > 1}),
        lost=[index for index in due if not all(times[pass_, index] for pass_ in passes)],
    )
