"""`opdlm prompts`: writes a set of prompts as a file for `data.path`, and a note beside it of where they come from."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

import opdlm
from opdlm.common.data.prompt_sets.everyday import everyday_prompts
from opdlm.common.data.prompt_sets.hub import HubSet, HubSource, Taken, hub_sets, read_card, read_prompts
from opdlm.common.errors import OpdlmError
from opdlm.common.files import atomic_file, check_file, write_json
from opdlm.deploy.observe.meter import Meter
from opdlm.deploy.tools.rerank_cases import ABOUT, ML100K

EVERYDAY = "everyday"
_SUFFIXES = (".jsonl", ".parquet")
Rows = Sequence[Mapping[str, str]]


def list_sets(console: Console) -> None:
    """Prints the sets: how many prompts they have, whether they need network, and their licences."""
    rows = everyday_prompts(seed=0)
    kinds = len({row["domain"] for row in rows})
    about = f"short questions and tasks of {kinds} kinds in plain English, for small chat models"
    lines = [f"{EVERYDAY}: {about}", f"    {len(rows):,} prompts, no network, part of this package"]
    for name, each in hub_sets().items():
        size = "all of their rows" if each.prompts is None else f"{each.prompts:,} prompts"
        lines += [f"{name}: {each.about}", f"    {size}, from the Hugging Face hub:"]
        licences = {source.id: source.license for source in each.sources}
        gated = {source.id for source in each.sources if source.gated}
        lines += [
            f"    {id_}: {licence}{'; its conditions are to be accepted there first' if id_ in gated else ''}"
            for id_, licence in licences.items()
        ]
    for line in (*lines, *ABOUT, "Licences as the data sets' cards named them; a download shows what they name then."):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def write_prompts(name: str, out: Path, seed: int, limit: int | None, console: Console) -> None:
    """Writes the prompts of a set to `out`, and `out`.provenance.json.

    Args:
        seed: decides which prompts are chosen, and their order.
        limit: most prompts; None: all of the set.

    Raises:
        OpdlmError: there is no such set, `out` exists or cannot be written, or the hub cannot be read.
    """
    sets = hub_sets()
    if name not in (EVERYDAY, *sets):
        raise OpdlmError(f"prompts: found {name!r}; known: {', '.join((EVERYDAY, *sets, ML100K))}")
    provenance = out.with_name(f"{out.name}.provenance.json")
    if out.suffix.lower() not in _SUFFIXES:
        raise OpdlmError(f"--out: found {out}; give a file that ends with {' or '.join(_SUFFIXES)}")
    for file in (out, provenance):
        if os.path.lexists(file):
            raise OpdlmError(f"--out: {file} exists; give a new file, or remove it")
        check_file(file, "--out")
    sources: list[dict[str, Any]] = []
    if name == EVERYDAY:
        rows: Rows = everyday_prompts(seed)[:limit]
    else:
        chosen = sets[name] if limit is None else sets[name].limited(limit)
        rows, sources = _from_hub(chosen, seed, console)
    if not rows:
        raise OpdlmError(f"prompts: {name} gave no prompt; nothing was written")
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out, rows)
    domains = Counter(row["domain"] for row in rows)
    made = {
        "set": name,
        "seed": seed,
        "limit": limit,
        "opdlm": opdlm.__version__,
        "prompts": len(rows),
        "domains": dict(domains.most_common()),
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "sources": sources,
    }
    write_json(provenance, made)
    kinds = ", ".join(f"{domain} {count:,}" for domain, count in domains.most_common(8))
    more = f", {len(domains) - 8} more" if len(domains) > 8 else ""
    for line in (
        f"{len(rows):,} prompts ({kinds}{more})",
        f"written: {out}, {provenance.name}",
        f"use them: data: {{path: {out}{_column(rows)}, chat_template: true}}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _column(rows: Rows) -> str:
    field = next(iter(rows[0]))
    return "" if field == "prompt" else f", prompt_field: {field}"


def _from_hub(chosen: HubSet, seed: int, console: Console) -> tuple[Rows, list[dict[str, Any]]]:
    """The prompts of a set, shuffled over its sources, and where each part comes from."""
    cards = {source.id: read_card(source) for source in {s.id: s for s in chosen.sources}.values()}
    for id_, card in cards.items():
        expected = next(source.license for source in chosen.sources if source.id == id_)
        note = "" if expected.startswith(card.license) else f" (when this set was put together: {expected})"
        line = f"{id_}: licence {card.license}{note}, revision {card.revision[:12]}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    rows: list[dict[str, str]] = []
    notes: list[dict[str, Any]] = []
    known: set[str] = set()
    with Meter(console, done_word="prompts taken") as meter:
        for source in chosen.sources:
            meter.begin(source.name, source.prompts)
            taken = Taken()
            for text in read_prompts(source, cards[source.id], seed, known, taken):
                rows.append({chosen.field: text, "domain": source.domain})
                meter(taken.prompts)
            _tell(source, taken, console)
            notes.append(asdict(source) | asdict(cards[source.id]) | {"wanted": source.prompts} | asdict(taken))
    order = sorted(range(len(rows)), key=lambda place: hashlib.sha256(f"{seed}/{place}".encode()).digest())
    return [rows[place] for place in order], notes


def _tell(source: HubSource, taken: Taken, console: Console) -> None:
    """Says what a source gave, and what of it was left out."""
    left = "; left out: " + ", ".join(f"{n:,} {why}" for why, n in taken.skipped.items()) if taken.skipped else ""
    short = f" of {source.prompts:,} wanted" if source.prompts and taken.prompts < source.prompts else ""
    line = f"{source.name}: {taken.prompts:,}{short} prompts of {taken.rows_read:,} rows{left}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _write(out: Path, rows: Rows) -> None:
    with atomic_file(out) as staging:
        if out.suffix.lower() == ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), staging)
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            staging.write_text("".join(itertools.chain(lines)), encoding="utf-8")
