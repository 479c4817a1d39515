"""Find what a stage could start from in the working directory, to name it in a message: a model, data, a tokenizer.

Looks at a limited number of files, so that it takes milliseconds in every directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import read_yaml
from minimind_ray.config.stages import STAGES, RowKind, StageRecord
from minimind_ray.data.formats import FORMATS, recognise

MOST = 200  # files for each search
MOST_BYTES = 64 << 10  # of a file's first row
RUNS = ("runs/*/run.json", "runs/*/*/run.json", "demo/runs/*/run.json")
DATA = ("dataset/*.jsonl", "data/*.jsonl", "data/*/*.jsonl", "*.jsonl", "*/*.jsonl", "demo/data/*/*.jsonl")
TOKENIZERS = ("tokenizer/tokenizer.json", "*/tokenizer.json", "runs/*/tokenizer/tokenizer.json")
NO_TRAINING = ("val", "valid", "test", "eval")


def base_here(record: StageRecord) -> str | None:
    """Return the run here that fits best as the stage's base: of the latest earlier stage, the newest; or None."""
    order = list(STAGES)
    found: list[tuple[int, float, str]] = []
    for file in _files(RUNS):
        with suppress(UserError, OSError):
            stage = read_yaml(file.with_name("config.yaml")).get("stage")
            if stage not in order or not _has_model(file.parent):
                continue
            earlier = order.index(stage) < order.index(record.name)
            found.append((order.index(stage) if earlier else -1, file.stat().st_mtime, str(file.parent)))
    return max(found)[2] if found else None


def _has_model(run: Path) -> bool:
    """Whether a run has a checkpoint of a whole model, not of an adapter."""
    return next(run.glob("checkpoints/*/config.json"), None) is not None


def data_here(record: StageRecord) -> str | None:
    """Return a file here whose first row fits the stage, preferably one with the stage's name in its path."""
    fitting = [file for file in _files(DATA) if _first_row_is(file, record.rows)]

    def order(file: Path) -> tuple[bool, bool]:
        others = any(name in str(file) for name in STAGES if name != record.name)
        return record.name not in str(file), others

    return str(min(fitting, key=order)) if fitting else None


def _first_row_is(file: Path, kind: RowKind) -> bool:
    if any(word in NO_TRAINING for word in file.stem.replace("-", "_").split("_")):
        return False
    try:
        with file.open("rb") as content:
            row = json.loads(content.readline(MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    name = recognise(row, kind) if isinstance(row, dict) else None
    return name is not None and FORMATS[name].kind == kind


def tokenizer_here() -> str | None:
    """Return a directory here with a tokenizer; None without one."""
    return next((str(file.parent) for file in _files(TOKENIZERS)), None)


def folder_here(names: Sequence[Sequence[str]]) -> str | None:
    """Return a folder here that has all these files, as in `has_all`; None without one."""
    folders = [Path(), *islice(Path().glob("[!.]*/"), MOST), *islice(Path().glob("[!.]*/[!.]*/"), MOST)]
    return next((str(folder) for folder in folders if has_all(folder, names)), None)


def has_all(folder: Path, names: Iterable[Sequence[str]]) -> bool:
    """Whether a folder has one file of each group of relative paths or globs."""
    return all(any(next(folder.glob(name), None) for name in group) for group in names)


def _files(patterns: Sequence[str]) -> Iterator[Path]:
    """Yield the first files that match, pattern by pattern, each once."""
    seen: dict[Path, None] = {}
    for pattern in patterns:
        with suppress(OSError):
            seen.update(dict.fromkeys(sorted(islice(Path().glob(pattern), MOST))))
    yield from islice(seen, MOST)
