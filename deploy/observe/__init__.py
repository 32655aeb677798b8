"""What a run reports, and how it is shown.

`records.py` collects what the roles report and writes it as records to `metrics.jsonl`; `round_figures.py` computes the
figures of a round from it. `writers.py` (TensorBoard, Prometheus, wandb), `terminal.py` (the live view) and
`timeline.py` (Perfetto) show a run while it goes on. `report.py`, `ledger.py` and `comparison.py` read the records of
finished runs, and `figures.py` saves plots. `session.py` opens all of that for `opdlm train`.
"""
