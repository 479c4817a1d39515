"""Turn the turns of a conversation, which projects write in different ways, into messages for chat templates.

`formats.py` reads whole rows with it.

    OpenAI, MiniMind    {"role": "user", "content": "…"}; content may be a list of text parts
    ShareGPT            {"from": "human", "value": "…"}

A message has a `role` (system, user, assistant or tool) and `content`. An assistant's message may have
`reasoning_content` and `tool_calls`. A message keeps any other field that the chat template writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from minimind_ray.data.chat_template import Message
from minimind_ray.data.fields import (
    BadRowError,
    Fields,
    as_list,
    as_object,
    as_object_or_json,
    as_objects,
    as_string,
    as_text,
    is_harmless,
    renamed,
    turns_in_text,
)

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""The standard role for each known name. The content of a `function_call` or `tool_call` turn is a call in JSON."""

THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts", "think")
LOSS_FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_scale", "loss_weight")
"""Names of the field that says whether loss counts on a turn, in OpenAI's, Axolotl's, ms-swift's and other formats."""

REFUSED = {
    "from": "the turn has role, too", "value": "the turn has content, too",
    "train_detail": "loss on a part of a turn is not supported; split the turn or remove the field",
    "mask": "its meaning differs between projects; use weight 0 or 1",
    "masked": "its meaning differs between projects; use weight 0 or 1",
    "loss_mask": "its meaning differs between projects; use weight 0 or 1",
    "refusal": "it is the answer itself in OpenAI's rows; move it to content",
}  # fmt: skip
"""Fields of a turn that are not supported, and the reason shown to the user."""

NOT_TEXT = re.compile(r"(image|video|audio)s?(_.*)?")
"""Names of fields that hold images, video or audio."""

TEXT_PARTS = (None, "text", "input_text", "output_text")


class Turn(NamedTuple):
    """A message, and whether loss counts on it. Loss counts only on an assistant's messages."""

    message: Message
    learned: bool


@dataclass
class TurnReader:
    """Reads turns.

    `writes(field, role)` says whether the chat template writes another field of a message. `names` maps `role` and
    `content` to the user's names for them. `left_out` are fields to skip. `ignored` collects the unread fields.
    """

    writes: Callable[[str, str], bool]
    names: dict[str, str] = field(default_factory=dict[str, str])
    left_out: frozenset[str] = frozenset()
    ignored: set[str] = field(default_factory=set[str])

    def turns(self, value: Any, where: str) -> tuple[list[Turn], list[Any] | None]:
        """Read a list of turns, the JSON text of such a list, or a single turn. Returns the turns and the tools.

        The tools are those on the system turn, or None.

        Raises:
            BadRowError: a turn cannot be used. The message names the field and the reason.
        """
        if isinstance(value, str):
            value = turns_in_text(value, where) or value
        items = [value] if isinstance(value, dict) else as_list(value, where)
        if not items:
            raise BadRowError(f"{where} is empty")
        turns: list[Turn] = []
        tools: list[Any] | None = None
        for i, item in enumerate(items):
            turn, own_tools = self._turn(as_object(item, f"{where}[{i}]"), where, i)
            if own_tools and (turn.message["role"] != "system" or tools):
                raise BadRowError(f"{where}[{i}].tools: only one system turn can have tools")
            turns.append(turn)
            tools = tools or own_tools
        return turns, tools

    def _turn(self, values: dict[str, Any], key: str, index: int) -> tuple[Turn, list[Any] | None]:
        if _is_plain(values):
            return Turn(values, values["role"] == "assistant"), None
        if self.left_out:
            values = {name: value for name, value in values.items() if name not in self.left_out}
        fields = Fields(renamed(values, self.names), f"{key}[{index}].")
        named = _role(fields)
        role = ALIASES[named]
        message: Message = {"role": role}
        content = _content(fields)
        parts_thought = None
        if isinstance(content, list):
            content, parts_thought = self._join_parts(content, f"{fields.where}content", key)
        calls = _calls(fields)
        if named in ("function_call", "tool_call"):
            content, calls = "", _spoken_calls(content, f"{fields.where}content")
        if content is not None:
            message["content"] = content
        thought = fields.string(*THOUGHTS) or parts_thought
        for name, value in (("reasoning_content", thought), ("tool_calls", calls)):
            if value and role != "assistant":
                raise BadRowError(f"{fields.where}{name} is on a turn of role {role}; it belongs to an assistant's")
            if value:
                message[name] = value
                message.setdefault("content", "")
        learned = _learned(fields, role)
        tools = take_tools(fields)
        self._others(fields, key, message)
        _require_content(message, fields.where)
        return Turn(message, learned), tools

    def _join_parts(self, parts: list[Any], where: str, key: str) -> tuple[str, str | None]:
        """Return the text of a list of content parts, and the thought in it or None."""
        texts: list[str] = []
        thoughts: list[str] = []
        for i, item in enumerate(parts):
            if isinstance(item, str):
                texts.append(item)
                continue
            part = Fields(as_object(item, f"{where}[{i}]"), f"{where}[{i}].")
            _, kind = part.take("type")
            if kind in ("thinking", "reasoning"):
                named, thought = part.take("thinking", "reasoning", "text")
                inner = self._join_parts(thought, named, key)[0] if isinstance(thought, list) else thought
                thoughts.append(as_string(inner, named))
            elif kind in TEXT_PARTS:
                texts.append(as_string(part.raw("text"), f"{part.where}text"))
            else:
                raise BadRowError(f"{where}[{i}] is of type {json.dumps(kind)}; only text can be read")
            named, flag = part.take(*LOSS_FLAGS)
            if flag not in (None, 1):
                raise BadRowError(f"{named} is {json.dumps(flag)}; only a whole turn can be kept out of the loss")
            self.ignored.update(f"{key}[].content[].{name}" for name in part.unread() if not is_harmless(name))
        return "".join(texts), "".join(thoughts) or None

    def _others(self, fields: Fields, key: str, message: Message) -> None:
        for name, value in fields.unread().items():
            if why := REFUSED.get(name) or (NOT_TEXT.fullmatch(name) and "only text can be read"):
                raise BadRowError(f"{fields.where}{name} cannot be used: {why}; data.ignore can leave it out")
            if self.writes(name, message["role"]):
                message[name] = value
            elif not is_harmless(name):
                self.ignored.add(f"{key}[].{name}")


def _is_plain(values: dict[str, Any]) -> bool:
    """Whether a turn is already a plain message. Nearly all turns are; this check is quicker than the full checks."""
    if len(values) != 2 or values.get("role") not in ROLES:
        return False
    content = values.get("content")
    return isinstance(content, str) and bool(content) and not content.isspace()


def take_tools(fields: Fields) -> list[Any] | None:
    """Return the field `tools`, or OpenAI's older `functions` in the form of tools; None if the row has neither.

    Raises:
        BadRowError: the value is not a list of objects, or both fields are given.
    """
    where, tools = fields.take("tools")
    older, functions = fields.take("functions")
    if tools is not None and functions is not None:
        raise BadRowError(f"{where} and {older} are both given")
    if functions is not None:
        return [{"type": "function", "function": function} for function in as_objects(functions, older)] or None
    return None if tools is None else as_objects(tools, where) or None


def _role(fields: Fields) -> str:
    where, role = fields.take("role", "from")
    if not isinstance(role, str) or role.lower() not in ALIASES:
        raise BadRowError(f"{where} is {json.dumps(role)}; known roles are {', '.join(ROLES)}, human, gpt and the like")
    return role.lower()


def _content(fields: Fields) -> str | list[Any] | None:
    """Return the content, a text or a list of parts; None if missing or null. A call's content may be an empty text."""
    name = "value" if "value" in fields and "content" not in fields else "content"
    value = fields.raw(name)
    return (
        cast("list[Any]", value) if value is None or isinstance(value, list) else as_string(value, fields.where + name)
    )


def _calls(fields: Fields) -> list[dict[str, Any]] | None:
    """Return the field `tool_calls`, or OpenAI's older `function_call` in the form of tool calls, or None."""
    where, calls = fields.take("tool_calls")
    older, call = fields.take("function_call")
    if calls is not None and call is not None:
        raise BadRowError(f"{where} and {older} are both given")
    if call is not None:
        return _tool_calls([as_object_or_json(call, older)], older)
    if calls is None:
        return None
    calls = as_objects(calls, where)
    for i, call in enumerate(calls):
        _check_call(as_object(call.get("function") or call, f"{where}[{i}].function"), f"{where}[{i}]")
    return calls


def _spoken_calls(content: Any, where: str) -> list[dict[str, Any]]:
    """Parse the content of a turn that is itself a call, or a list of calls, in JSON."""
    try:
        value = json.loads(as_string(content, where))
    except ValueError as error:
        raise BadRowError(f"{where} should be a call in JSON, as the role says ({error})") from None
    return _tool_calls(as_objects(value if isinstance(value, list) else [value], where), where)


def _tool_calls(functions: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    for function in functions:
        _check_call(function, where)
    return [{"type": "function", "function": function} for function in functions]


def _check_call(function: dict[str, Any], where: str) -> None:
    if function.get("name") is None:
        raise BadRowError(f"{where}.name is missing")
    as_text(function["name"], f"{where}.name")
    if "arguments" not in function:
        raise BadRowError(f"{where}.arguments is missing")


def _learned(fields: Fields, role: str) -> bool:
    """Whether loss counts on the turn, by its role and its loss flag.

    Raises:
        BadRowError: the flag is neither 0 nor 1, or asks for loss on a turn that is not an assistant's.
    """
    where, flag = fields.take(*LOSS_FLAGS)
    if flag is None:
        return role == "assistant"
    if not isinstance(flag, bool | int | float) or flag not in (0, 1):
        raise BadRowError(f"{where} is {json.dumps(flag)}; only 0 (no loss on the turn) and 1 are supported")
    if flag and role != "assistant":
        raise BadRowError(f"{where} asks for loss on a turn of role {role}; only an assistant's turns carry loss")
    return bool(flag)


def _require_content(message: Message, where: str) -> None:
    """Check that a question or an answer has content. A system turn, a tool's result and a call may be empty."""
    if "content" not in message:
        raise BadRowError(f"{where}content is missing")
    may_be_empty = message["role"] in ("system", "tool") or "tool_calls" in message or "reasoning_content" in message
    if not may_be_empty:
        as_text(message["content"], f"{where}content")
