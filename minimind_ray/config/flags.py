"""Find the marked config keys in the schema (see flag.py), and turn the values of flags into config values.

The command line and the Python interface use a flag's name as a Python name, such as `max_seq_len`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minimind_ray.config.flag import Flag, Movable
from minimind_ray.config.load import parse_value, section_of
from minimind_ray.config.schema import Config


@dataclass(frozen=True)
class KeyFlag:
    """The flag of a config key. `repeated` says that the flag may be given several times, which makes a list."""

    key: str
    flag: Flag
    repeated: bool

    def value(self, given: Any) -> Any:
        """Return the config value for a flag's value: parsed as YAML, or unchanged for a verbatim flag."""
        if self.repeated:
            return _sources([given] if isinstance(given, str) else list(given))
        return given if self.flag.verbatim or not isinstance(given, str) else parse_value(given)


def _sources(texts: list[str]) -> str | list[str]:
    """Return the paths of data files: a single path, or a list."""
    values = [parse_value(text) if text.startswith("[") else text for text in texts]
    # A text that begins with [ may also be a glob, such as [ab]*.jsonl.
    paths = [path for v, text in zip(values, texts) for path in (v if isinstance(v, list) else [text])]
    return paths if len(paths) > 1 else paths[0]


@functools.cache
def config_flags() -> dict[str, KeyFlag]:
    """Return every flag of the schema, by its name in Python."""
    return {found.flag.parameter: found for found in _flags_of(Config)}


@functools.cache
def movable_keys() -> tuple[str, ...]:
    """Return the config keys that pbt may change in the middle of a run."""
    return tuple(key for key, field in _fields_of(Config) if any(isinstance(each, Movable) for each in field.metadata))


def _flags_of(model: type[BaseModel]) -> Iterator[KeyFlag]:
    for key, field in _fields_of(model):
        for flag in field.metadata:
            if isinstance(flag, Flag):
                yield KeyFlag(key, flag, list[str] in get_args(field.annotation))


def _fields_of(model: type[BaseModel], at: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if section := section_of(field.annotation):
            yield from _fields_of(section, f"{at}{name}.")
        yield f"{at}{name}", field


def overrides_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all given flags among these parameters, by dotted config key.

    False counts as given: from Python, `wandb=False` is a value, which the config can refuse.
    """
    known = config_flags()
    given = {name: value for name, value in flags.items() if name in known and value not in (None, [], ())}
    return {known[name].key: known[name].value(value) for name, value in given.items()}


def without_unset(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that the user gave. 0 counts as given, so that the config can refuse it."""
    return {name: value for name, value in parameters.items() if value not in (None, [], ()) and value is not False}
