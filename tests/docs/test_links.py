"""The documents name what exists: links, paths, commands, options; the README stays short. `pytest tests/docs`"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from opdlm.deploy.cli import app
from tests import REPOSITORY
from tests.docs.pages import PAGES, README, blocks, inline_code, prose, without_code

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_PATH = re.compile(r"^(?:actors|common|learner|deploy|tests)/")
_COMMAND = re.compile(r"(?:^|[\s/(])opdlm ([a-z][a-z-]*)", re.MULTILINE)
_OPTION = re.compile(r"(?<=\s)--[a-z][a-z-]*")

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(target: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = _HEADING.findall(prose(target))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def code_of(page: Path) -> list[str]:
    """All code of a page that is not Python, with continued lines joined."""
    fenced = [block.code for block in blocks(page) if not block.info.startswith("python")]
    return [code.replace("\\\n", " ") for code in [*fenced, *inline_code(page)]]


@page
def test_links_lead_somewhere(page) -> None:
    for link in _LINK.findall(without_code(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads to no file"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link} leads to no heading"


@page
def test_paths_exist(page) -> None:
    for code in code_of(page):
        for word in re.split(r"[\s,;'\"()]+", code):
            if _PATH.match(word):
                name = word.rstrip(":.").partition("::")[0]
                assert list(REPOSITORY.glob(name)), f"{page.name}: {word} does not exist"


@page
def test_commands_and_their_options_exist(page) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for code in code_of(page):
        for name in _COMMAND.findall(code):
            assert name in commands, f"{page.name}: there is no opdlm {name}"
        for line in code.splitlines():
            found = re.match(r"\$? *(?:\S*/)?opdlm ([a-z][a-z-]*)(.*)", line)
            if not found or found[1] == "lm-eval":  # the options of lm-eval's own command line
                continue
            known = {option for parameter in commands[found[1]].params for option in parameter.opts}
            known |= {option for parameter in commands[found[1]].params for option in parameter.secondary_opts}
            for option in _OPTION.findall(found[2].partition(" #")[0]):
                assert option in known | {"--help"}, f"{page.name}: opdlm {found[1]} has no {option}"


def test_every_command_is_documented() -> None:
    named = {name for page in PAGES for code in code_of(page) for name in _COMMAND.findall(code)}
    assert named >= set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 160
    assert max(len(line) for line in lines) <= 140
