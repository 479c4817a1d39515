"""Checked access to the fields of a row or a turn, for `formats.py` and `turns.py`.

`Fields` records which fields were read, so that the unread ones can be listed afterwards. The functions `as_…` check a
value's type. A field counts as absent if its value is null, NaN, an empty text, an empty list or an empty object,
because in a file made from a table every row has every column.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, cast

NOTHING: tuple[Any, ...] = (None, "", [], {})

HARMLESS = re.compile(
    r"_.*|(.*[_-])?(id|idx|index|uuid|hash|md5|sha1|sha256|source|sources|origin|dataset|dataset_name|subset|split"
    r"|license|author|username|score|scores|rating|ratings|version|timestamp|date|created_at|updated_at)"
    r"|(source|page|web)_url|url|link|time|created|updated|lang|language|languages|locale|rank|quality|topic|topics"
    r"|category|categories|tag|tags|domain|domains|title|model|models|model_name|generator|provider|meta|metadata|info"
    r"|tokens|num_tokens|token_count|num_turns|length|parallel_tool_calls|(score|rating|num|n|len|length)_.*",
    re.IGNORECASE,
)
"""Names of fields that training does not need, such as a row's source or rating. The summary does not mention them. All
other unread fields are counted and named in the summary."""


class BadRowError(ValueError):
    """A row cannot be used. The message is the reason shown to the user."""


def is_absent(value: Any) -> bool:
    """Whether a value counts as a missing field (see the module's docstring)."""
    return value in NOTHING or (isinstance(value, float) and math.isnan(value))


def is_harmless(name: str) -> bool:
    """Whether a field of this name need not be mentioned when nothing reads it."""
    return HARMLESS.fullmatch(name) is not None


def renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the fields under standard names. `names` maps each standard name to the user's name for the field.

    Raises:
        BadRowError: the row has a field under the standard name and another one under the user's name.
    """
    theirs = {own: name for name, own in names.items() if own in values}
    if not theirs:
        return values
    for own, name in theirs.items():
        if not is_absent(values.get(name)) and name not in theirs:
            raise BadRowError(
                f"the row has both {name} and {own}, which data.fields reads as {name}; list {name} in data.ignore"
            )
    kept = {name: value for name, value in values.items() if name not in theirs}
    return {**kept, **{name: values[own] for own, name in theirs.items()}}


class Fields:
    """The fields of one object. `where` stands before their names in errors, such as `messages[2].`"""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._values = values
        self.where = where
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return not is_absent(self._values.get(name))

    def take(self, *names: str) -> tuple[str, Any]:
        """Return (full name, value) of the first of these fields that is present. Marks the present fields as read.

        Returns (full name of the first, None) if all are absent.

        Raises:
            BadRowError: two of the fields are present and differ.
        """
        found = [name for name in names if name in self._values and name in self]
        if not found:
            return self.where + names[0], None
        self._read.update(found)
        for other in found[1:]:
            if self._values[other] != self._values[found[0]]:
                raise BadRowError(f"{self.where}{found[0]} and {self.where}{other} are both given, and differ")
        return self.where + found[0], self._values[found[0]]

    def string(self, *names: str) -> str | None:
        """Return the text of the first of these fields that is present, or None if all are absent.

        Raises:
            BadRowError: the value is not a text, or two of the fields are present and differ.
        """
        where, value = self.take(*names)
        return None if value is None else as_string(value, where)

    def raw(self, name: str) -> Any:
        """Return the value of a field, even an empty value; None if the field is missing. Marks the field as read."""
        self._read.add(name)
        return self._values.get(name)

    def has_key(self, name: str) -> bool:
        """Whether there is a field of this name, even if it is empty."""
        return name in self._values

    def was_read(self, name: str) -> bool:
        """Whether the field was read before."""
        return name in self._read

    def unread(self) -> dict[str, Any]:
        """Return the present fields that were not read."""
        return {k: v for k, v in self._values.items() if k not in self._read and not is_absent(v)}


def as_string(value: Any, where: str) -> str:
    """Check that the value is a text, and return it.

    Raises:
        BadRowError: the value is something else.
    """
    if not isinstance(value, str):
        raise BadRowError(_wrong(value, where, "a string"))
    return value


def as_text(value: Any, where: str) -> str:
    """Check that the value is a text with more than white space, and return it.

    Raises:
        BadRowError: the value is something else.
    """
    text = as_string(value, where)
    if not text or text.isspace():
        raise BadRowError(f"{where} is empty")
    return text


def as_object(value: Any, where: str) -> dict[str, Any]:
    """Check that the value is an object, and return it.

    Raises:
        BadRowError: the value is something else.
    """
    if not isinstance(value, dict):
        raise BadRowError(_wrong(value, where, "an object"))
    return cast("dict[str, Any]", value)


def as_list(value: Any, where: str) -> list[Any]:
    """Check that the value is a list, or the JSON text of a list (as in tables and MiniMind's data); return the list.

    Raises:
        BadRowError: the value is something else.
    """
    value = _from_json(value, where)
    if not isinstance(value, list):
        raise BadRowError(_wrong(value, where, "a list"))
    return cast("list[Any]", value)


def as_objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Check that the value is a list of objects, or the JSON text of such a list; return the list.

    Raises:
        BadRowError: the value is something else, or holds NaN or Infinity, which JSON does not have.
    """
    objects = [as_object(item, f"{where}[{i}]") for i, item in enumerate(as_list(value, where))]
    try:
        json.dumps(objects, allow_nan=False)
    except ValueError:
        raise BadRowError(f"{where} holds NaN or Infinity, which JSON does not have") from None
    return objects


PRINTED_TURNS = re.compile(r"""\s*\[?\s*\{\s*['"](role|from|content|value)['"]\s*:""")


def turns_in_text(value: str, where: str) -> Any:
    """Parse a text that holds a turn or a list of turns as JSON; None for any other text.

    Raises:
        BadRowError: the text looks like turns but is not JSON, such as a list printed by Python.
    """
    if not PRINTED_TURNS.match(value):
        return None
    try:
        parsed = json.loads(value)
    except ValueError:
        raise BadRowError(
            f"{where} looks like turns but is not JSON (perhaps printed by Python); save it as JSON or Parquet"
        ) from None
    first = parsed[0] if isinstance(parsed, list) and parsed else parsed
    return parsed if isinstance(first, dict) and ("role" in first or "from" in first) else None


def as_object_or_json(value: Any, where: str) -> dict[str, Any]:
    """Check that the value is an object, or the JSON text of an object; return the object.

    Raises:
        BadRowError: the value is something else.
    """
    return as_object(_from_json(value, where), where)


def _from_json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRowError(f"{where} is a string but not JSON ({error})") from None


def _wrong(value: Any, where: str, expected: str) -> str:
    if value is None:
        return f"{where} is missing"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return f"{where} is {kinds.get(type(value), 'an object')}, not {expected}"
