"""The demo's small world: simple true facts in English and Chinese and their phrasings, read from demo_world.yaml.

A relation links two columns of a table, such as "country" and "capital". It lists, for each language, sentences that
state the fact and questions that ask for it. `demo.py` turns the relations into training files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minimind_ray.config.load import read_yaml

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

Row = dict[Language, dict[str, str]]
"""One thing: for each language, its columns by name. A column that does not apply to the thing is left out."""


@dataclass(frozen=True, slots=True)
class Phrasing:
    """The statements and questions of a relation in one language. Answers use the first statement."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    follow_up: str | None = None
    """The question with a pronoun, to ask after the subject was named."""


@dataclass(frozen=True, slots=True)
class Relation:
    """Facts of the kind "`subject` has this `object`", where both are columns of the table `rows`."""

    name: str
    rows: tuple[Row, ...]
    subject: str
    object: str
    en: Phrasing
    zh: Phrasing


def _cells(kind: str, text: str) -> Iterable[Sequence[str]]:
    """Return the lines of a table. Each line has cells `English/Chinese`. demo_world.yaml explains the kinds."""
    if kind == "table":
        return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    words = text.split()
    if kind == "cycle":
        return zip(words, words[1:] + words[:1])
    if kind == "both ways":
        pairs = [word.split("-") for word in words]
        return [*pairs, *(pair[::-1] for pair in pairs)]
    assert kind == "translations", kind
    return [(word, "/".join(reversed(word.split("/")))) for word in words]


def _rows(columns: str, lines: Iterable[Sequence[str]]) -> tuple[Row, ...]:
    """Return one row for each line. A cell `-` means that the column does not apply to the thing."""
    names = columns.split()
    rows: list[Row] = []
    for cells in lines:
        assert len(cells) == len(names), cells
        both = {name: cell.split("/") for name, cell in zip(names, cells) if cell != "-"}
        rows.append({"en": {n: cell[0] for n, cell in both.items()}, "zh": {n: cell[1] for n, cell in both.items()}})
    return tuple(rows)


def _phrasing(content: dict[str, Any]) -> Phrasing:
    return Phrasing(tuple(content["statements"]), tuple(content["questions"]), content.get("follow_up"))


def _relations() -> tuple[Relation, ...]:
    world = read_yaml(Path(__file__).with_suffix(".yaml"))
    tables = {name: _rows(t["columns"], _cells(t["kind"], t["facts"])) for name, t in world["tables"].items()}
    numbers = range(1, 10)
    tables["sums"] = _rows("a b total", [[f"{n}/{n}" for n in (a, b, a + b)] for a in numbers for b in numbers])
    return tuple(
        Relation(r["name"], tables[r["table"]], r["subject"], r["object"], _phrasing(r["en"]), _phrasing(r["zh"]))
        for r in world["relations"]
    )


RELATIONS = _relations()
