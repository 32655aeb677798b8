"""Sets of prompts that are read from data sets of the Hugging Face hub, as `hub.yaml` names them.

Rows are streamed, so that a few thousand prompts of a data set of 40 GB do not need 40 GB. The seed shuffles the files
of a data set, and its rows within a window of many rows; the data set's revision is fixed when the work begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opdlm.common.errors import OpdlmError, first_line
from opdlm.common.files import read_yaml
from opdlm.common.text import text_fault

_FILE = Path(__file__).parent / "hub.yaml"
_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class HubSource:
    """Where some prompts of a set come from: the rows of one data set, or of a part of it."""

    id: str
    domain: str
    column: str
    """Column with the prompt: text, or chat messages, whose first user message is taken."""
    license: str
    """What the data set's card named when the set was written."""
    subset: str | None = None
    split: str = "train"
    prompts: int | None = None
    """Number of prompts to take; None: all."""
    where: Mapping[str, list[Any]] = field(default_factory=dict)
    """Column -> the values of rows that count."""
    window: int = 100_000
    """Rows that are in memory while they are shuffled."""
    gated: bool = False
    """Whether its conditions must be accepted on its page before it can be read."""

    @property
    def name(self) -> str:
        """Data set, subset and split, in words."""
        return " ".join(part for part in (self.id, self.subset, self.split) if part)


@dataclass(frozen=True, slots=True)
class HubSet:
    """A set of prompts from the hub."""

    name: str
    about: str
    field: str
    """Column of the written file that holds the prompt."""
    sources: tuple[HubSource, ...]

    @property
    def prompts(self) -> int | None:
        """Number of prompts; None where it takes all rows of a source."""
        wanted = [source.prompts for source in self.sources]
        return None if None in wanted else sum(count or 0 for count in wanted)

    def limited(self, limit: int) -> HubSet:
        """The same set with at most `limit` prompts, each source with its share of them."""
        shares = [source.prompts or 1 for source in self.sources]
        counts = _divided(min(limit, self.prompts or limit), shares)
        sources = (replace(s, prompts=count) for s, count in zip(self.sources, counts, strict=True) if count)
        return replace(self, sources=tuple(sources))


@dataclass(frozen=True, slots=True)
class Card:
    """What the hub says of a data set now."""

    revision: str
    license: str


@dataclass(slots=True)
class Taken:
    """What was taken from a source, and why its other rows were not."""

    prompts: int = 0
    rows_read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


def hub_sets() -> dict[str, HubSet]:
    """The sets by name, in the order of the file."""
    return {name: _hub_set(name, held) for name, held in read_yaml(_FILE).items()}


def read_card(source: HubSource) -> Card:
    """Asks the hub for the revision and the licence of a data set.

    Raises:
        OpdlmError: the hub cannot be reached, or it has no such data set, or none that may be read.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(source.id, timeout=_TIMEOUT_SECONDS)
    except Exception as error:  # the hub's client raises errors of many classes; the user gets one line
        raise OpdlmError(_failure(source, error)) from error
    card = info.card_data.get("license") if info.card_data is not None else None
    named = ", ".join(card) if isinstance(card, list) else card
    return Card(str(info.sha), str(named or "none named"))


def read_prompts(source: HubSource, card: Card, seed: int, known: set[str], taken: Taken) -> Iterator[str]:
    """Yields the prompts of a source in the order of the seed, each once, until there are enough.

    Args:
        card: fixes the revision that is read.
        known: prompts of the set so far, which are left out; those that are yielded are added.
        taken: counts what is taken and left out.

    Raises:
        OpdlmError: the data set cannot be read, or it has no such column.
    """
    try:
        for row in _rows(source, card.revision, seed):
            taken.rows_read += 1
            text = _text(row[source.column])
            if reason := _fault(source, row, text, known):
                taken.skipped[reason] = taken.skipped.get(reason, 0) + 1
                continue
            known.add(text)
            taken.prompts += 1
            yield text
            if taken.prompts == source.prompts:
                return
    except OpdlmError:
        raise
    except Exception as error:  # `datasets` and the hub's client raise errors of many classes; the user gets one line
        raise OpdlmError(_failure(source, error)) from error


def _rows(source: HubSource, revision: str, seed: int) -> Iterator[Mapping[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.load_dataset(source.id, source.subset, split=source.split, revision=revision, streaming=True)
    needed = [source.column, *source.where]
    held = table.column_names
    if held is not None and (missing := [name for name in needed if name not in held]):
        raise OpdlmError(
            f"prompts: {source.name} has no column {missing[0]!r}; it has {', '.join(held)}; the data set has changed, "
            "so bring its prompts as a file of your own (data.path)"
        )
    yield from table.select_columns(needed).shuffle(seed=seed, buffer_size=source.window)


def _fault(source: HubSource, row: Mapping[str, Any], text: str, known: set[str]) -> str | None:
    """Why a row is left out; None: it is taken."""
    if any(row[column] not in values for column, values in source.where.items()):
        return "another kind of row"
    if not text or text_fault(text):
        return "no text"
    return "there already" if text in known else None


def _text(value: Any) -> str:
    """The prompt's text. Of a conversation, its first user message."""
    if isinstance(value, list):
        value = next((turn.get("content") for turn in value if turn.get("role") == "user"), None)
    return value.strip() if isinstance(value, str) else ""


def _failure(source: HubSource, error: Exception) -> str:
    from huggingface_hub import errors

    # `datasets` raises an error of its own, whose text has the word.
    if isinstance(error, errors.GatedRepoError) or (source.gated and "gated" in str(error)):
        return (
            f"prompts: {source.id} may be read only by those who accepted its conditions: accept them on its page of "
            "the hub, and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"prompts: the hub has no data set {source.id} that this account may read"
    reason = first_line(error)
    return (
        f"prompts: {source.id} could not be read from the hub: {reason}; this set needs network, `everyday` needs none"
    )


def _hub_set(name: str, held: Mapping[str, Any]) -> HubSet:
    sources: list[HubSource] = []
    for given in held["sources"]:
        given = dict(given)
        subsets = given.pop("subsets", [given.pop("subset", None)])
        wanted = given.pop("prompts", None)
        counts = [None] * len(subsets) if wanted is None else _divided(wanted, [1] * len(subsets))
        sources += [HubSource(subset=s, prompts=n, **given) for s, n in zip(subsets, counts, strict=True)]
    return HubSet(name, held["about"], held["field"], tuple(sources))


def _divided(total: int, shares: list[int]) -> list[int]:
    """Whole numbers in the ratio of the shares, whose sum is `total`."""
    whole = sum(shares)
    counts = [total * share // whole for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda place: -(total * shares[place] % whole))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts
