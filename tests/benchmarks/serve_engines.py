"""The decoders of a student's and of an autoregressive model's engine, without server and Ray: CPU time of each.

    python -m tests.benchmarks.serve_engines runs/demo/student models/chain-teacher --slots 32 128

Both get the requests of `tests.benchmarks.serve`, of mixed lengths, all at once; the student's slots are filled as they
become free, the autoregressive model's batches end with their longest response. CPU seconds of this process on one
thread, which depend less on what else runs than tokens per second do.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from opdlm.actors.rollout.settings import DecodeSettings
from opdlm.actors.serving.autoregressive import BatchDecoder
from opdlm.actors.serving.decoder import ServedDecoder
from opdlm.common.model.facts import read_facts, require_mask
from opdlm.common.model.load import load_model
from opdlm.common.model.tokenizer import load_tokenizer
from opdlm.common.types import RolloutRequest, Trajectory
from tests.benchmarks.measure import Ratio, parser, write_json
from tests.benchmarks.serve import mixed


def decode(folder: Path, slots: int, count: int) -> tuple[float, int]:
    """CPU seconds, and response tokens, of so many requests."""
    facts, model, tokenizer = read_facts(folder), load_model(folder, "float32"), load_tokenizer(folder)
    left = []
    for n, asked in enumerate(mixed(count, 1, 0)):
        ids = tokenizer(asked.problems[0].prompt, add_special_tokens=False)["input_ids"]
        left.append(RolloutRequest(n, str(n), np.array(ids, dtype=np.int32), asked.limit, n))
    done: list[Trajectory] = []
    decoder: Any
    if facts.is_student:
        grid = facts.grid()
        how = DecodeSettings(grid.block_size, grid.kind, keep_logprobs=True)
        mask_id = require_mask(facts)
        decoder = ServedDecoder(model, how, mask_id, facts.eos_ids, slots, tokens=facts.tokens, form=facts.form)
    else:
        decoder = BatchDecoder(model, DecodeSettings(), facts.eos_ids, slots, facts.tokens, done.extend)
    started = time.process_time()
    while left or decoder.occupied or decoder.waiting:
        room = max(decoder.room, 0)
        decoder.add(left[:room])
        left = left[room:]
        done += decoder.step()
    seconds = time.process_time() - started
    if len(done) != count:
        raise SystemExit(f"{folder}: found {len(done)} responses; expected {count}")
    return seconds, sum(trajectory.response_length for trajectory in done)


def main() -> None:
    """Prints the table and writes `serve_engines.json`."""
    made = parser(__doc__)
    made.set_defaults(repetitions=3, threads=1)
    made.add_argument("student", type=Path)
    made.add_argument("autoregressive", type=Path)
    made.add_argument("--slots", type=int, nargs="+", default=[32, 128])
    made.add_argument("--requests", type=int, default=500)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    table, rows = Table("slots", "student, CPU ms a response", "autoregressive", "tokens a CPU second, times"), []
    for slots in args.slots:
        found = [
            [decode(folder, slots, args.requests) for folder in (args.student, args.autoregressive)]
            for _ in range(args.repetitions)
        ]
        ours, theirs = (Ratio([1e3 * pair[arm][0] / args.requests for pair in found]) for arm in (0, 1))
        times = Ratio([(a[1] / a[0]) / (b[1] / b[0]) for a, b in found])
        table.add_row(str(slots), str(ours), str(theirs), str(times))
        rows.append({"slots": slots, "ours": ours.values, "theirs": theirs.values, "times": times.values})
    Console().print(table)
    write_json("serve_engines", rows)


if __name__ == "__main__":
    main()
