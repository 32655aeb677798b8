"""`opdlm prompts ml100k`: the re-ranking cases of MovieLens-100k as three files, made of files that the user has."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rich.console import Console

import opdlm
from opdlm.common.data.prompt_sets.ml100k import FILES, ml100k_cases
from opdlm.common.errors import OpdlmError
from opdlm.common.files import atomic_folder, check_new_folder, write_json

ML100K = "ml100k"
ABOUT = (
    f"{ML100K}: re-ranking cases of MovieLens-100k, for objective.kind rl with reward.kind rerank",
    f"    made of {FILES[0]} and {FILES[1]}, as the package recbole ships them, in the folder of --files; their terms "
    "forbid passing them on",
)


def write_cases(files: Path | None, out: Path, console: Console) -> None:
    """Writes `out`/train.jsonl, valid.jsonl, test.jsonl and provenance.json.

    Raises:
        OpdlmError: the files cannot be used, or `out` exists or cannot be made.
    """
    if files is None:
        raise OpdlmError(f"--files: missing; name the folder with {FILES[0]} and {FILES[1]}")
    check_new_folder("prompts: --out", out)
    console.print(f"reading {files} (about a minute)", highlight=False, markup=False, soft_wrap=True)
    cases = ml100k_cases(files)
    made = {
        "set": ML100K,
        "opdlm": opdlm.__version__,
        "cases": {split: len(rows) for split, rows in cases.items()},
        "sources": {name: hashlib.sha256((files / name).read_bytes()).hexdigest() for name in FILES},
    }
    with atomic_folder(out) as staging:
        for split, rows in cases.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (staging / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            first = sum(row["candidates"][0]["id"] == row["target"] for row in rows) / max(len(rows), 1)
            console.print(f"{split}: {len(rows):,} cases, the retriever's R@1 {first:.3f}", highlight=False)
        write_json(staging / "provenance.json", made)
    line = f"written: {out}; use them: data: {{path: {out}/train.jsonl, response_field: response}}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
