"""Messages to users about resuming a run: the settings that differ, and the complete command that continues training.

`RunDirectory.check` refuses to resume a run with other settings, and shows these messages.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind_ray.config.load import read_yaml
from minimind_ray.config.paths import in_job
from minimind_ray.config.schema import Config

# Settings that may change between stop and resume: they do not change the run's result.
FREE_KEYS = (
    "scale.",
    "eval.",
    "checkpoint.",
    "track.",
    "out",
    "data.cache_dir",
    "data.direct_steps",
    "batch.pass_tokens",
)
LENGTH = {"train.max_steps", "train.epochs"}
SHOWN, LONGEST_VALUE = 3, 60

Difference = tuple[Any, Any]
"""A key's value in the run's config.yaml, and its value in the other config."""


def differences(config_file: Path, config: Config) -> dict[str, Difference]:
    """Return the settings of `config` that differ from a run's config.yaml, sorted by key, without FREE_KEYS."""
    found = dict(_differences(read_yaml(config_file), config.model_dump(mode="json")))
    return {key: found[key] for key in sorted(found) if not key.startswith(FREE_KEYS)}


def _differences(before: Any, after: Any, at: str = "") -> Iterator[tuple[str, Difference]]:
    if before is None and isinstance(after, dict):
        before = dict[str, Any]()  # A section that the version before this one did not have.
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {*before, *after}:
            yield from _differences(before.get(key), after.get(key), f"{at}.{key}" if at else key)
    elif before != after:
        yield at, (before, after)


def refusal(where: str, config_file: Path, config: Config) -> str | None:
    """Return why the run at `where` cannot be resumed with `config`, and how to continue; None if it can be resumed."""
    found = differences(config_file, config)
    if not found:
        return None
    values = {key: f" {_text(after)} (the run has {_text(before)})" for key, (before, after) in found.items()}
    what = ", ".join(f"{key}{values[key] if len(found) <= SHOWN else ''}" for key in found)
    refused = f"{where} cannot be resumed with other settings: {what}"
    if in_job():  # A job's command can name only files of the working directory, and config.yaml is not among them.
        return f"{refused}; use the values in its config.yaml, or choose another --out"
    refused += f". To continue with its own settings: {_command(where, config_file)} --resume"
    if found.keys() <= LENGTH:
        settings = [f"{key}={after}" for key, (_, after) in found.items() if after is not None]
        return f"{refused}. {longer(where, config_file, config, *settings)}"
    return f"{refused}; for other settings choose another --out"


def longer(where: str, config_file: Path, config: Config, *settings: str) -> str:
    """Return how to train longer than the run at `where`: the reason for a new run, and its command.

    `config` may differ from the run's only in its length. `settings` are assignments as for --set.
    """
    why = "The learning rate was planned for the run's own length; to train longer, start a new run"
    if in_job():
        return f"{why} with another --out"
    words = [] if config.trains_adapter else ["--init-from", where]
    for setting in settings or ["train.max_steps=N"]:
        words += ["--set", setting]
    source = "" if config.trains_adapter else " from its result"
    return f"{why}{source}: {_command(where, config_file, f'{where}-longer')} {shlex.join(words)}"


def _command(where: str, config_file: Path, out: str | None = None) -> str:
    """Return the command that trains with the settings of the run at `where`, into `out` (default: the same run)."""
    own = read_yaml(config_file)
    words = ["minimind-ray", "train", str(own.get("stage")), "--config", str(config_file)]
    if (out := out or where) != own.get("out"):
        words += ["--out", out]
    return shlex.join(words)


def _text(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
