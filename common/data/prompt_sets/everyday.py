"""The built-in set `everyday`: short questions and tasks in plain English that a small chat model can answer.

Its words and sentences are data, in the YAML files of `everyday/`: a file holds kinds of prompts, a kind has templates
with slots (`{word}`; `{a:word}` puts `a` or `an` before it) and the values of the slots. `words.yaml` holds lists that
kinds share (`$animals + $foods`), `endings.yaml` sentences that some prompts get at their end.

A kind makes a prompt of each combination of its values and of `each` of its templates, or of `take` combinations that
the seed draws. A kind whose `key` is held out for evaluation (`held_out.py`) leaves the combination out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from opdlm.common.data.prompt_sets.held_out import is_held_out
from opdlm.common.files import read_yaml

FOLDER = Path(__file__).parent / "everyday"
_SHARED = ("words", "endings")
"""Files without kinds of prompts."""
_SLOT = re.compile(r"\{(a:)?(\w+)\}")
_RANGE = re.compile(r"(\d+)-(\d+)")
_DRAWS = 200
"""Draws for each wanted combination, after which a kind counts as used up."""

Values = Mapping[str, str]
"""What stands in the slots of a template."""


def everyday_prompts(seed: int) -> list[dict[str, str]]:
    """All prompts of the set in a random order, each once: `{"prompt": text, "domain": kind}`.

    The seed decides which templates, values and endings are combined, and the order. The same seed gives the same
    prompts on every machine and Python: only `Random.random` is used, which Python promises to keep.

    Raises:
        OpdlmError: a file of the set cannot be read.
    """
    words, endings = (read_yaml(FOLDER / f"{name}.yaml") for name in _SHARED)
    kinds: dict[str, Any] = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        kinds |= {} if file.stem in _SHARED else read_yaml(file)
    domains: dict[str, str] = {}
    for name, kind in kinds.items():
        for prompt in _prompts(kind, words, endings, Random(f"{seed}/{name}")):
            domains.setdefault(prompt, name)
    rows = [{"prompt": prompt, "domain": domain} for prompt, domain in domains.items()]
    return _shuffled(rows, Random(f"{seed}"))


def _prompts(kind: Mapping[str, Any], words: Values, endings: Mapping[str, Any], random: Random) -> Iterator[str]:
    slots = {name: _values(given, words) for name, given in kind["slots"].items()}
    combinations = _drawn(kind, slots, random) if "take" in kind else map(_filled, _all(slots))
    ending = endings[kind["endings"]] if "endings" in kind else None
    for values in combinations:
        if not _is_wanted(kind, values):
            continue
        for template in _shuffled(kind["templates"], random)[: kind.get("each", 1)]:
            prompt = _fill(template, values)
            if ending and random.random() < ending["share"] and not _says(template, ending["not_after"]):
                prompt += " " + _shuffled(ending["sentences"], random)[0]
            yield prompt


def _drawn(kind: Mapping[str, Any], slots: Mapping[str, Sequence[str]], random: Random) -> Iterator[Values]:
    """`take` combinations, each once; fewer where there are not so many."""
    seen: set[tuple[str, ...]] = set()
    for _ in range(_DRAWS * kind["take"]):
        drawn = {name: held[int(random.random() * len(held))] for name, held in slots.items()}
        values = _filled(drawn.items())
        if (place := tuple(drawn.values())) in seen or not _is_wanted(kind, values):
            continue
        seen.add(place)
        yield values
        if len(seen) == kind["take"]:
            return


def _all(slots: Mapping[str, Sequence[str]]) -> Iterator[Sequence[tuple[str, str]]]:
    for combination in itertools.product(*slots.values()):
        yield list(zip(slots, combination, strict=True))


def _filled(pairs: Any) -> dict[str, str]:
    """Slot -> value. A slot `x | y` stands for two whose values belong together: `a cat | a dog`."""
    values: dict[str, str] = {}
    for name, value in pairs:
        values |= zip(_split(name, "|"), _split(value, "|"), strict=True) if "|" in name else {name: value}
    return values


def _is_wanted(kind: Mapping[str, Any], values: Values) -> bool:
    if kind.get("distinct") and len(set(values.values())) < len(values):
        return False
    if kind.get("larger_first") and int(values["a"]) <= int(values["b"]):
        return False
    keys = kind.get("key", [])
    return not any(is_held_out(_fill(key, values)) for key in ([keys] if isinstance(keys, str) else keys))


def _says(template: str, words: str) -> bool:
    """Whether a template has one of these words, given with commas between."""
    return not set(_split(words, ",")).isdisjoint(re.findall(r"\w+", template))


def _values(given: str | Sequence[str], words: Values) -> list[str]:
    """The values of a slot: a list, words with commas between, numbers (`2-20`), or lists of `words.yaml`."""
    if not isinstance(given, str):
        return [str(value) for value in given]
    if bounds := _RANGE.fullmatch(given):
        return [str(number) for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    if given.startswith("$"):
        found = [value for name in _split(given, "+") for value in _split(words[name.removeprefix("$")], ",")]
        return list(dict.fromkeys(found))
    return list(dict.fromkeys(_split(given, ",")))


def _fill(template: str, values: Values) -> str:
    def value(slot: re.Match[str]) -> str:
        text = values[slot[2]]
        if not slot[1]:
            return text
        return f"{'an' if text[0].lower() in 'aeiou' else 'a'} {text}"

    return _SLOT.sub(value, template)


def _split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator)]


def _shuffled(items: Sequence[Any], random: Random) -> list[Any]:
    order = sorted((random.random(), place) for place in range(len(items)))
    return [items[place] for _, place in order]
