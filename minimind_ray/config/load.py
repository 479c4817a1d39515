"""Load a Config from YAML files and dotted overrides. Errors name the key, the value and the nearest valid key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import LARGEST_YAML, dump_yaml, parse_yaml, read_text
from minimind_ray.config.schema import Config
from minimind_ray.config.stages import STAGES


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: the file does not exist, is not valid YAML (with the line), or does not hold a mapping.
    """
    text = read_text(Path(path), LARGEST_YAML)
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: expected a mapping of settings (key: value) at the top")
    return content


def parse_override(text: str) -> tuple[str, Any]:
    """Split `optim.lr=1e-4` into the dotted key and the value, parsed as YAML. Raises UserError."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {text}: expected key=value, such as --set optim.lr=1e-4")
    return key.strip(), parse_value(value)


def parse_value(text: str) -> Any:
    """Parse a text as YAML. Returns the text itself if it is not YAML."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def load_config(
    stage: str,
    files: Sequence[str | Path] = (),
    overrides: Mapping[str, Any] | None = None,
    trees: Mapping[str, Mapping[str, Any]] | None = None,
    overrides_from: str = "the command line",
) -> Config:
    """Return the config of a stage. `overrides_from` says in messages where the overrides come from.

    Later sources override earlier ones: the schema's defaults, the stage's defaults, each tree, each file, the dotted
    overrides.

    Raises:
        UserError: a key is unknown, or a value has a wrong type or is impossible. The message names the key and the
            allowed keys or values.
    """
    tree: dict[str, Any] = {"stage": stage}
    origins: dict[str, str] = {}
    if stage in STAGES:
        _merge(tree, STAGES[stage].defaults, origins, f"the defaults of {stage}")
    for name, content in {**(trees or {}), **{str(path): read_yaml(path) for path in files}}.items():
        for key, command in {"stages": "run", "axes": "tune --sweep"}.items():
            if key in content:
                raise UserError(
                    f"{name} has {key}, so it is not a config of one stage: give it to minimind-ray {command}"
                )
        if content.get("stage", stage) != stage:
            raise UserError(f"{name}: stage is {content['stage']}, but the command trains {stage}")
        _merge(tree, content, origins, name)
    for key, value in (overrides or {}).items():
        if key == "stage" and value != stage:
            raise UserError(f"stage={value} is set, but the command trains {stage}")
        node = tree
        *parents, last = key.split(".")
        for part in parents:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise UserError(f"{key}: {part} is a single value and has no key {last}; {nearest_key(key)}")
            node = child
        node[last] = value
        origins[key] = overrides_from
    return validate(tree, origins)


def validate(tree: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Config:
    """Check a nested mapping against the schema.

    Raises:
        UserError: see `load_config`.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # A union reports an error for each member, all about the same key: use the first.
        by_key = {_key(e): e for e in reversed(error.errors())}
        raise UserError("; ".join(_explain(e, origins or {}) for e in by_key.values())) from None


def _merge(tree: dict[str, Any], update: Mapping[str, Any], origins: dict[str, str], origin: str, at: str = "") -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(tree.setdefault(key, {}), dict):
            _merge(tree[key], value, origins, origin, f"{at}{key}.")
        else:
            tree[key] = value
            origins[f"{at}{key}"] = origin


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings. Values of the second override values of the first."""
    tree: dict[str, Any] = {}
    for content in (first, second):
        _merge(tree, content, {}, "")
    return tree


def config_keys(model: type[BaseModel] = Config, at: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema that holds a value. Keys of sections are left out."""
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section is None:
            yield f"{at}{name}"
        else:
            yield from config_keys(section, f"{at}{name}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds; None if the field holds a value."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def nearest_key(key: str) -> str:
    """Return a hint for an unknown key: the nearest key, and the valid keys of the same section."""
    known = list(config_keys())
    sections = sorted({k.split(".")[0] for k in known})
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    last = key.rsplit(".", 1)[-1]
    if not close or close[0].rsplit(".", 1)[-1] != last:
        section = difflib.get_close_matches(key, sections, n=1) if "." not in key else []
        close = [k for k in known if k.rsplit(".", 1)[-1] == last] or section or close
    prefix = key.rsplit(".", 1)[0] + "." if "." in key else ""
    beside = [k for k in known if prefix and k.startswith(prefix)] or sections
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid here: {', '.join(beside)}"


def _key(error: Any) -> str:
    # pydantic adds the types of unions to the location: keep only the names of keys.
    return ".".join(part for part in error["loc"] if isinstance(part, str) and not _is_type_tag(part))


def _explain(error: Any, origins: Mapping[str, str]) -> str:
    key = _key(error)
    origin = next((origins[k] for k in (key, *_parents(key)) if k in origins), None)
    where = f"{key} (from {origin})" if origin else key
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        return f"{where}: no such setting; {nearest_key(key)}"
    if error["type"] == "model_type":
        keys = [k for k in config_keys() if k.startswith(f"{key}.")]
        return f"{where}: {value!r} is not a section; give a mapping with these keys: {', '.join(keys)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    if error["type"] == "bool_type":
        message = "write true or false"
    elif error["type"] == "literal_error":
        message = message.replace("True or False", "true or false")
    return f"{where}: {message}, not {_as_written(value)}"


def _as_written(value: Any) -> str:
    """Return a value as the user may have written it, with quotes around texts."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rsplit(".", 1)[0]
        yield key


def _is_type_tag(part: str) -> bool:
    return part in ("str", "int", "float", "bool") or part.startswith(("list[", "constrained-", "function-"))


def to_yaml(config: Config) -> str:
    """Return the complete config as YAML. `load_config` reads it back to the same config."""
    return dump_yaml(config.model_dump(mode="json"))
