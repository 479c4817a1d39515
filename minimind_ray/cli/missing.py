"""Say at once everything that a command lacks, with one complete command that would work with the files here."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from minimind_ray.config.errors import UserError

if TYPE_CHECKING:
    from minimind_ray.config.schema import Config
    from minimind_ray.stages.recipe import Recipe


def require_inputs(config: Config, varied: Collection[str] = ()) -> None:
    """Check that the user gave the base, the data and the tokenizer that a stage needs. Does not check the files.

    `varied` are config keys that a sweep's axes set.

    Raises:
        UserError: inputs are not given. The message names all of them, and a complete command.
    """
    from minimind_ray.config.stages import STAGES
    from minimind_ray.stages.here import base_here, data_here, tokenizer_here

    record, lacking = config.record, dict[str, str]()
    options, examples = list[str](), list[str]()

    def lacks(what: str, option: str, found: str | None, example: str) -> None:
        lacking[option] = what
        options.extend([option, found or example])
        if not found:
            examples.append(example)

    if record.needs_base and not config.init_from and "init_from" not in varied:
        earlier = [each.name for each in STAGES.values() if each.adapters != "always" and each.name != record.name]
        before = [name for name in earlier if list(STAGES).index(name) < list(STAGES).index(record.name)]
        lacks("a model to start from", "--init-from", base_here(record), f"runs/{(before or earlier)[-1]}")
    if config.data.train is None and "data.train" not in varied:
        lacks("training data", "--train", data_here(record), f"dataset/{record.name}.jsonl")
    if not (config.data.tokenizer or config.init_from or record.needs_base or "data.tokenizer" in varied):
        lacks("a tokenizer", "--tokenizer", tokenizer_here(), "tokenizer")
    if lacking:
        wants = [f"{what} ({option})" for option, what in lacking.items()]
        text = f"{config.stage} needs {_and(wants)}: {_command(options)}"
        kind = "an example" if len(examples) == 1 else "examples"
        raise UserError(text + (f" ({_and(examples)}: only {kind}, nothing in this folder fits)" if examples else ""))


def recipe_command(recipe: Recipe, data_dir: str | Path | None, overrides: Mapping[str, Any]) -> str | None:
    """Return the user's command with options for inputs of the recipe that lie elsewhere in the working directory.

    None if no input is missing, or if one is not here.
    """
    from minimind_ray.config.stages import STAGES
    from minimind_ray.data.hub import hub_ref
    from minimind_ray.stages.here import base_here, folder_here, has_all, tokenizer_here

    found: dict[str, str | None] = {}
    data_dir, first = str(data_dir or recipe.data_dir), recipe.stages[0]
    given = {key.rpartition(".")[2] for key in overrides}
    if "train" not in given and "://" not in data_dir and not has_all(Path(data_dir), recipe.files):
        found["--data-dir"] = folder_here(recipe.files)
    directory = recipe.tokenizer if isinstance(recipe.tokenizer, str) and "tokenizer" not in given else None
    if directory and not hub_ref(directory) and not Path(directory, "tokenizer.json").exists():
        found["data.tokenizer"] = tokenizer_here()
    record, bases = STAGES[first.stage or first.name], {first.init_from, recipe.settings.get("init_from")}
    if record.needs_base and "init_from" not in given and bases == {None}:
        found["init_from"] = base_here(record)
    if not found or None in found.values():
        return None
    pairs = ((key, value) if key[0] == "-" else ("--set", f"{key}={value}") for key, value in found.items())
    return _command([word for pair in pairs for word in pair if word])


def _command(options: Sequence[str]) -> str:
    """Return the user's command with more options."""
    return " ".join(["minimind-ray", *map(quote, sys.argv[1:]), *map(quote, options)])


def _and(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
