"""`opdlm plan`, `recipes`, `prompts`: what a run file will do, and the run files and prompts to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from opdlm.common.errors import OpdlmError
from opdlm.deploy.cli.app import LARGEST_SEED, Overrides, RunFile, app, clear_errors, out
from opdlm.deploy.run.recipes import read_recipe, recipes


@app.command()
def plan(
    run: RunFile,
    override: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the same figures as JSON.")
    ] = None,
) -> None:
    """Print what a run will do, who gets which CPUs and GPUs, and the memory of each role with its arithmetic.

    Starts nothing and loads no weights: parameters are counted in the headers of the weight files.

    Examples:

        opdlm plan deploy/demo.yaml

        opdlm plan deploy/qwen3-8b.yaml --set rollout.actors=4 --json plan.json
    """
    with clear_errors():
        from opdlm.common.config import load_config
        from opdlm.deploy.run.plan import show_plan

        show_plan(load_config(run, override or []), out, json_file)


@app.command(name="recipes")
def show_recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one as it is.")] = None,
) -> None:
    """List the run files that come with the package, or print one, to be changed.

    Every command that takes a run file takes these names too: `opdlm plan demo`.

    Examples:

        opdlm recipes

        opdlm recipes one-gpu > mine.yaml
    """
    with clear_errors():
        if name is not None:
            print(read_recipe(name), end="")
            return
        table = Table.grid(padding=(0, 2))
        for recipe, purpose in recipes().items():
            table.add_row(recipe, Text(purpose))
        out.print(table)


@app.command()
def prompts(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Set to write. Without it: list the sets.")] = None,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="New file, .jsonl or .parquet, for data.path; with ml100k a folder."
        ),
    ] = None,
    files: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With ml100k: where ml-100k.inter and ml-100k.item are.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Which prompts are chosen, and their order.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Most prompts. Default: all of the set.")] = None,
) -> None:
    """List the sets of prompts, or write one to a file for `data.path`.

    `everyday` is made here, without network. The others are downloaded from the Hugging Face hub, and the licences of
    their data sets are shown. What was chosen is noted in FILE.provenance.json. `ml100k` makes re-ranking cases of
    files that you have.

    Examples:

        opdlm prompts

        opdlm prompts everyday --out data/everyday.jsonl

        opdlm prompts open-mix --out data/opdlm-prompts.parquet --seed 1 --limit 20000

        opdlm prompts ml100k --files recbole/dataset_example/ml-100k --out data/ml100k
    """
    with clear_errors():
        from opdlm.deploy.tools.prompts import list_sets, write_prompts
        from opdlm.deploy.tools.rerank_cases import ML100K, write_cases

        if name is None:
            if out_file is not None:
                raise OpdlmError("--out: found without NAME; name a set (`opdlm prompts` lists them)")
            list_sets(out)
        elif out_file is None:
            raise OpdlmError(
                "--out: missing; give a new file that ends with .jsonl or .parquet, or a folder for ml100k"
            )
        elif name == ML100K:
            write_cases(files, out_file, out)
        else:
            write_prompts(name, out_file, seed, limit, out)
