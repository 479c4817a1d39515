"""Read a row of any common format as a text, a conversation, a pair, a prompt or a rated answer.

`encode.py` tokenizes the results. There is one function for each format (see FORMATS). The format is recognised from
the row's fields, or given by `data.format`. All rows of a file have the same format. If a field has a meaning in a
common format, it is used, or the row is rejected and the reason names the field; such a field is never dropped
silently. Unknown fields are counted and named in the summary.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig, FormatName
from minimind_ray.config.stages import STAGES, RowKind, StageName
from minimind_ray.data.chat_template import Message
from minimind_ray.data.fields import (
    PRINTED_TURNS,
    BadRowError,
    Fields,
    as_list,
    as_object_or_json,
    as_string,
    as_text,
    is_absent,
    is_harmless,
    renamed,
    turns_in_text,
)
from minimind_ray.data.records import Reject, Row
from minimind_ray.data.turns import ALIASES, NOT_TEXT, Turn, TurnReader, take_tools

Kind = RowKind | Literal["prompt", "rated"]

MOST_IGNORED = 100  # names of ignored fields to count separately; without a limit, every row could add a name


class Conversation(NamedTuple):
    """Turns with the tools that they may call."""

    turns: list[Turn]
    tools: list[Any] | None = None

    @property
    def messages(self) -> list[Message]:
        """The turns as messages for a chat template."""
        return [turn.message for turn in self.turns]


class Pair(NamedTuple):
    """Two conversations with the same beginning."""

    chosen: Conversation
    rejected: Conversation

    @property
    def shared(self) -> int:
        """The number of equal turns at the beginning of both sides."""
        common = 0
        for one, other in zip(self.chosen.turns, self.rejected.turns):
            if one.message != other.message:
                break
            common += 1
        return common

    @property
    def prompt(self) -> Conversation:
        """The turns that both sides share."""
        return self.chosen._replace(turns=self.chosen.turns[: self.shared])


class Prompt(NamedTuple):
    """A conversation without its last answer, and the right answer if the row has one."""

    conversation: Conversation
    answer: Any = None


class Rated(NamedTuple):
    """A conversation whose last answer is rated good or bad."""

    conversation: Conversation
    good: bool


Item = str | Conversation | Pair | Prompt | Rated


class Format(NamedTuple):
    """How to recognise and read rows of a format. A row fits if it has at least one field of each group in `needs`."""

    kind: Kind
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Fields, TurnReader], Item]
    fits: Callable[[dict[str, Any]], bool] = lambda value: True


class RowReader:
    """Reads the rows of one kind. `writes` says whether the chat template could write a field of a message.

    `cluster` is the field that `eval.cluster` names. A row may have this field although its format does not use it.
    `ignored` counts, for each field that is not used, the rows that have it. `formats` has for each file the format and
    the line of its first row.
    """

    def __init__(
        self,
        kind: Kind,
        config: DataConfig,
        writes: Callable[[str, str], bool] = lambda field, role: False,
        cluster: str | None = None,
    ) -> None:
        if config.format and FORMATS[config.format].kind != kind:
            raise UserError(f"data.format is {config.format}, {_learners(config.format)}; leave it out or change it")
        self.kind: Kind = kind
        self.ignored: Counter[str] = Counter()
        self.formats: dict[str, tuple[FormatName, int]] = {}
        self._named: FormatName | None = config.format
        self._row_names = {ours: theirs for ours, theirs in config.fields.items() if ours not in TURN_FIELDS}
        self._turn_names = {ours: theirs for ours, theirs in config.fields.items() if ours in TURN_FIELDS}
        self._left_out = frozenset(config.ignore)
        self._writes, self._cluster = writes, cluster

    def read(self, row: Row) -> Item:
        """Read a row.

        Raises:
            BadRowError: the row cannot be used.
            UserError: the row has another format than the rows before it in its file.
        """
        value = self._fields(row)
        name = self._named or self._recognised(value)
        fields, turns = Fields(value), TurnReader(self._writes, self._turn_names, self._left_out)
        item = FORMATS[name].read(fields, turns)
        first, line = self.formats.setdefault(row.file, (name, row.line))
        if first != name:
            raise UserError(mixed(row.file, (first, line), (name, row.line)))
        self._account(name, fields, turns)
        return item

    def note(self, row: Row | Reject) -> None:
        """Remember the format of a file's first row. `read` then compares rows of a later piece of the file with it."""
        if isinstance(row, Row):
            with suppress(BadRowError):
                name = self._named or self._recognised(self._fields(row))
                self.formats.setdefault(row.file, (name, row.line))

    def _fields(self, row: Row) -> dict[str, Any]:
        """Return the row's fields under standard names, without the fields of `data.ignore`."""
        value = row.value
        if self._left_out:
            value = {name: field for name, field in value.items() if name not in self._left_out}
        return renamed(value, self._row_names)

    def _recognised(self, value: dict[str, Any]) -> FormatName:
        name = recognise(value, self.kind)
        if name is None:
            raise BadRowError(_unknown(value, self.kind))
        if FORMATS[name].kind != self.kind:
            raise BadRowError(_other_kind(name, value, self.kind))
        return name

    def _account(self, name: FormatName, fields: Fields, turns: TurnReader) -> None:
        """Check the unread fields: refuse the row if one has a meaning, else count them."""
        unread = fields.unread()
        if FORMATS[name].kind != "text":
            _refuse_meaningful(name, {field: value for field, value in unread.items() if field != self._cluster})
        for field in {*(field for field in unread if not is_harmless(field)), *turns.ignored}:
            count_ignored(self.ignored, field, 1)


def _refuse_meaningful(name: FormatName, unread: dict[str, Any]) -> None:
    for field, value in unread.items():
        why = _meaning(field)
        if why and why.applies(value):
            raise BadRowError(f"{field} cannot be used in a row of format {name}: {why.reason}")


def _meaning(field: str) -> _Meaning | None:
    return _ONLY_TEXT if NOT_TEXT.fullmatch(field) else MEANINGFUL.get(field)


def is_meaningful(field: str) -> bool:
    """Whether a row may be refused because it has this field."""
    return _meaning(field) is not None


def count_ignored(total: Counter[str], field: str, rows: int) -> None:
    """Add rows to the count of an ignored field. After MOST_IGNORED names, all others are counted together."""
    total[field if field in total or len(total) < MOST_IGNORED else "others"] += rows


def mixed(file: str, first: tuple[FormatName, int], other: tuple[FormatName, int]) -> str:
    """Return the error message for a file with two formats."""
    return (
        f"{file}:{other[1]}: a row of format {other[0]}, but line {first[1]} has format {first[0]}: a file holds one "
        "format; split the file, or name the format to keep by data.format (other rows are then rejected)"
    )


def recognise(value: dict[str, Any], kind: Kind | None = None) -> FormatName | None:
    """Return the first format that a row's fields fit; None if no format fits. Tries the formats of `kind` first.

    Fields with a value decide. If no format fits them, fields with an empty value count, too.
    """
    own, others = _in_order(kind)
    for has, names in ((_has, own), (_has_value, own), (_has, others), (_has_value, others)):
        for name in names:
            format = FORMATS[name]
            if all(any(has(value, field) for field in group) for group in format.needs) and format.fits(value):
                return name
    return None


def _has_value(value: dict[str, Any], field: str) -> bool:
    return value.get(field) is not None


@functools.cache
def _in_order(kind: Kind | None) -> tuple[list[FormatName], list[FormatName]]:
    """Return the formats of `kind`, and the others."""
    return (
        [name for name, format in FORMATS.items() if format.kind == kind],
        [name for name, format in FORMATS.items() if format.kind != kind],
    )


def _has(value: dict[str, Any], field: str) -> bool:
    return field in value and not is_absent(value[field])


FIRST_FIELD: dict[Kind, str] = {"text": "text", "conversation": "conversations", "pair": "chosen"}

EXAMPLES: dict[Kind, str] = {
    "text": "data.fields.text=NAME",
    "conversation": "data.fields.prompt=NAME and data.fields.completion=NAME (texts), or data.fields.messages=NAME "
    "(turns)",
    "pair": "data.fields.prompt=NAME, data.fields.chosen=NAME and data.fields.rejected=NAME",
}
"""Settings that name a row's fields, as examples in error messages."""


def _unknown(value: dict[str, Any], kind: Kind) -> str:
    present = [name for name in value if _has(value, name)]
    has = f"the row has {', '.join(present[:8])}" if present else "the row has no field with a value"
    hint = f"; if fields have other names, give {EXAMPLES[kind]}" if kind in EXAMPLES else ""
    return f"{FIRST_FIELD.get(kind, 'prompt')} is missing ({has}){hint}"


def _other_kind(name: FormatName, value: dict[str, Any], kind: Kind) -> str:
    format = FORMATS[name]
    field = next(field for group in format.needs for field in group if field in value)
    if stages := _stages(name):
        missing = FIRST_FIELD.get(kind, "prompt")
        return f"{missing} is missing, but {field} is there, which {' and '.join(stages)} would read"
    content = "a prompt without an answer" if format.kind == "prompt" else "a rated answer (unpaired preference data)"
    return f"the row is {content}, from which no stage learns"


def _stages(name: FormatName) -> list[StageName]:
    return [record.name for record in STAGES.values() if record.rows == FORMATS[name].kind]


def _learners(name: FormatName) -> str:
    stages = _stages(name)
    return f"from which {' and '.join(stages)} learn" if stages else "from which no stage learns yet"


def question_of(value: dict[str, Any]) -> tuple[list[Message], list[Any] | None]:
    """Return the messages of a row without the answers at its end, and its tools, so that a model can answer.

    Raises:
        BadRowError: the row cannot be read, or has no turn to answer.
    """
    for key in ("messages", "conversations"):
        turns = value.get(key)
        turns = turns_in_text(turns, key) if isinstance(turns, str) else turns
        if isinstance(turns, list):
            value = {**value, key: _until_question(turns, key)}
    if "instruction" in value:
        value = {**value, "output": value.get("output") or "no answer yet"}
    name = recognise(value, "conversation")
    if name is None or FORMATS[name].kind not in ("conversation", "prompt"):
        raise BadRowError("the row has no prompt, and no conversations or messages (a list of turns)")
    fields, turn_reader = Fields(value), TurnReader(lambda field, role: True)
    item = FORMATS[name].read(fields, turn_reader)
    _refuse_meaningful(name, fields.unread())
    conversation = item.conversation if isinstance(item, Prompt) else item
    assert isinstance(conversation, Conversation)
    return _until_question(conversation.messages, name), conversation.tools


def _until_question(turns: list[Any], where: str) -> list[Any]:
    """Return the turns without the assistant's turns at the end. (An empty turn there marks the place of an answer.)"""
    end = len(turns)
    while end and isinstance(turns[end - 1], dict) and _speaker(turns[end - 1]) == "assistant":
        end -= 1
    if turns and not end:
        raise BadRowError(f"{where} has no turn to answer")
    return turns[:end]


def _speaker(turn: dict[str, Any]) -> str | None:
    named = turn.get("role", turn.get("from"))
    return ALIASES.get(named) if isinstance(named, str) else None


def texts_of(value: dict[str, Any]) -> list[str]:
    """Return all texts of a row of any format, for training a tokenizer. A pair gives the texts of its chosen side.

    Raises:
        BadRowError: the row cannot be read.
    """
    name = recognise(value)
    if name is None:
        raise BadRowError(_unknown(value, "text"))
    item = FORMATS[name].read(Fields(value), TurnReader(lambda field, role: False))
    if isinstance(item, str):
        return [item]
    conversation = item if isinstance(item, Conversation) else item[0]
    written = (turn.message.get(key) for turn in conversation.turns for key in ("reasoning_content", "content"))
    return [text for text in written if text]


# The formats


def _read_text(row: Fields, turns: TurnReader) -> str:
    return as_text(row.raw("text"), "text")


def _read_messages(row: Fields, turns: TurnReader) -> Conversation:
    where, value = row.take("messages", "conversations")
    if value is None:
        where = "messages" if row.has_key("messages") else "conversations"
        value = row.raw(where)
    conversation = _conversation(row, turns, value, where)
    _require_repeated(row, turns, conversation)
    return conversation


def _read_alpaca(row: Fields, turns: TurnReader) -> Conversation:
    where, output = row.take("output", "response", "completion")
    if isinstance(output, list):
        raise BadRowError(f"{where} is a list: rows with two outputs are pairs; name the fields chosen and rejected")
    answer = _assistant(as_text(output, where))
    return _with_row(row, [*_alpaca_prompt(row), answer], None)


def _read_completion(row: Fields, turns: TurnReader) -> Conversation:
    prompt, tools = _prompt_turns(row, turns)
    where, completion = row.take("completion", "response", "answer")
    answer, _ = _answer_turns(completion, where, turns, _is_spoken(row))
    # As in trl, answers inside the prompt are only context: loss counts on the completion alone.
    silent = [turn._replace(learned=False) for turn in prompt]
    return _with_row(row, _joined(silent, answer, where), tools)


def _read_preference(row: Fields, turns: TurnReader) -> Pair:
    prompt, tools = _optional_prompt(row, turns)
    sides: list[Conversation] = []
    for key in ("chosen", "rejected"):
        answer, own_tools = _answer_turns(row.raw(key), key, turns, _is_spoken(row))
        if not prompt and answer[0].message["role"] == "assistant":
            raise BadRowError(_no_prompt(row, key))
        sides.append(_with_row(row, _joined(prompt, answer, key), own_tools or tools))
    pair = Pair(*sides)
    _require_repeated(row, turns, pair.chosen)
    return pair


def _no_prompt(row: Fields, key: str) -> str:
    texts = [name for name, value in row.unread().items() if isinstance(value, str) and not is_harmless(name)]
    others = [name for name in texts if name not in ("chosen", "rejected", "system")]
    field = others[0] if others else "NAME"
    return f"{key} has no turn before the answer; give prompt, or name its field: data.fields.prompt={field}"


def _read_openai_preference(row: Fields, turns: TurnReader) -> Pair:
    source = Fields(as_object_or_json(row.take("input")[1], "input"), "input.")
    prompt = _conversation(source, turns, source.raw("messages"), "input.messages")
    for name in source.unread():
        if not is_harmless(name):
            turns.ignored.add(f"input.{name}")
    ends: list[Conversation] = []
    for key in ("preferred_output", "non_preferred_output"):
        answer, _ = turns.turns(row.raw(key), key)
        ends.append(Conversation([*prompt.turns, *answer], prompt.tools))
    return Pair(*ends)


def _read_rated(row: Fields, turns: TurnReader) -> Rated:
    where, label = row.take("label", "kto_tag")
    if not _says_good_or_bad(label):
        raise BadRowError(f"{where} is {json.dumps(label)}, not true or false")
    good = str(label).lower() in ("true", "1", "1.0")
    for name in ("messages", "sharegpt", "alpaca", "completion"):
        format = FORMATS[name]
        if all(any(field in row for field in group) for group in format.needs):
            conversation = format.read(row, turns)
            assert isinstance(conversation, Conversation)
            return Rated(conversation, good)
    raise BadRowError(f"{where} rates an answer, but the row has no conversation, completion or output")


def _read_prompt(row: Fields, turns: TurnReader) -> Prompt:
    prompt, tools = _prompt_turns(row, turns)
    _, answer = row.take("answer", "solution", "ground_truth", "gt")
    return Prompt(_with_row(row, prompt, tools), answer)


def _turns_speak(value: dict[str, Any]) -> bool:
    """Whether the turns have `from` and `value`, as in ShareGPT."""
    turns = value.get("conversations") or value.get("messages")
    if isinstance(turns, str):
        return PRINTED_TURNS.match(turns) is not None and '"from"' in turns and '"role"' not in turns
    first = next((turn for turn in turns if isinstance(turn, dict)), None) if isinstance(turns, list) else None
    return first is not None and "from" in first and "role" not in first


def _is_flag(value: dict[str, Any]) -> bool:
    """Whether the row has `kto_tag`, or a `label` that can only mean good or bad."""
    return _has(value, "kto_tag") or _says_good_or_bad(value.get("label"))


def _says_good_or_bad(label: Any) -> bool:
    return label in (True, False) or str(label).lower() in ("true", "false")


ANSWERED = (("messages", "conversations", "completion", "output"),)
TURN_LISTS = (("messages", "conversations"),)

FORMATS: dict[FormatName, Format] = {
    "preference": Format("pair", (("chosen", "rejected"),), _read_preference),
    "openai_preference": Format(
        "pair", (("input",), ("preferred_output",), ("non_preferred_output",)), _read_openai_preference
    ),
    "rated": Format("rated", (("label", "kto_tag"), *ANSWERED), _read_rated, _is_flag),
    "sharegpt": Format("conversation", TURN_LISTS, _read_messages, _turns_speak),
    "messages": Format("conversation", TURN_LISTS, _read_messages),
    "alpaca": Format("conversation", (("instruction",), ("output", "response", "completion")), _read_alpaca),
    "completion": Format("conversation", (("prompt",), ("completion", "response", "answer")), _read_completion),
    "text": Format("text", (("text",),), _read_text),
    "prompt": Format("prompt", (("prompt",),), _read_prompt),
}
"""All formats, in the order in which they are tried."""

TURN_FIELDS = ("role", "content")


class _Meaning(NamedTuple):
    reason: str
    applies: Callable[[Any], bool] = lambda value: True


_ONLY_TEXT = _Meaning("only text can be read; remove the field, or list it in data.ignore")
_THOUGHT = _Meaning("put it into the assistant's turn as reasoning_content")
_WEIGHT = _Meaning("rows cannot be weighted; repeat or remove rows, and remove the field", lambda v: v not in (1, "1"))
_OTHER = _Meaning("the row has a second format's field; remove it, list it in data.ignore, or name it by data.fields")
_TOKENS = _Meaning("rows of token ids cannot be read; give the text")

_RATED = (
    "it rates the answer (unpaired preference data), which no stage learns from; keep the rows with good answers and "
    "list the field in data.ignore"
)

MEANINGFUL: dict[str, _Meaning] = {
    **dict.fromkeys(("thinking", "reasoning", "reasoning_content", "thought", "thoughts"), _THOUGHT),
    **dict.fromkeys(("weight", "sample_weight", "loss_weight", "loss_mask", "train", "mask"), _WEIGHT),
    **dict.fromkeys(
        ("prompt", "completion", "instruction", "input", "output", "response", "history", "messages", "conversations",
         "chosen", "rejected", "system", "system_prompt", "system_message", "tools", "functions", "tool_calls",
         "function_call",
         "preferred_output", "non_preferred_output", "rejected_response", "context", "segments"),
        _OTHER,
    ),
    **dict.fromkeys(("input_ids", "labels", "attention_mask"), _TOKENS),
    "label": _Meaning(_RATED, _says_good_or_bad),
    "kto_tag": _Meaning(_RATED),
    "documents": _Meaning("documents are not supported; write them into a turn"),
    "chat_template": _Meaning("the tokenizer's chat template is used; remove the field"),
    "chat_template_kwargs": _Meaning("settings for chat templates are not supported; remove the field"),
}  # fmt: skip
"""Fields with a meaning in a common format. A row is refused if it has such a field and its own format ignores it."""


# Parts of formats


def _user(text: str) -> Turn:
    return Turn({"role": "user", "content": text}, False)


def _assistant(text: str) -> Turn:
    return Turn({"role": "assistant", "content": text}, True)


def _conversation(row: Fields, turns: TurnReader, value: Any, where: str) -> Conversation:
    """Return the turns of a list, with the row's own system text and tools."""
    read, tools = turns.turns(value, where)
    return _with_row(row, read, tools)


def _with_row(row: Fields, turns: list[Turn], tools: list[Any] | None) -> Conversation:
    """Return the turns with the row's own `system` and `tools`."""
    where, system = row.take("system", "system_prompt", "system_message")
    if system is not None:
        text = as_string(system, where)
        first = turns[0].message
        if first["role"] != "system":
            turns = [Turn({"role": "system", "content": text}, False), *turns]
        elif first["content"] != text:
            raise BadRowError(f"{where} differs from the system turn; keep one of them")
    row_tools = take_tools(row)
    if row_tools and tools and row_tools != tools:
        raise BadRowError("tools are on the row and on the system turn, and differ; keep one of them")
    return Conversation(turns, row_tools or tools)


def _alpaca_prompt(row: Fields) -> list[Turn]:
    """Return the turns before the answer: earlier questions and answers, then the instruction and its input."""
    instruction, more = row.string("instruction"), row.string("input", "context")
    question = "\n".join(part for part in (instruction, more) if part)
    turns: list[Turn] = []
    where, history = row.take("history")
    for i, exchange in enumerate(as_list(history, where) if history is not None else []):
        here = f"{where}[{i}]"
        said = as_list(exchange, here)
        if len(said) != 2:
            raise BadRowError(f"{here} has {len(said)} texts, not a question and an answer")
        turns += [_user(as_text(said[0], f"{here}[0]")), _assistant(as_text(said[1], f"{here}[1]"))]
    return [*turns, _user(as_text(question, "instruction"))]


def _prompt_turns(row: Fields, turns: TurnReader) -> tuple[list[Turn], list[Any] | None]:
    """Return the turns of `prompt`: a question, a dialogue in one text, or a list of turns."""
    prompt = row.raw("prompt")
    if not isinstance(prompt, str):
        return turns.turns(prompt, "prompt")
    if listed := turns_in_text(prompt, "prompt"):
        return turns.turns(listed, "prompt")
    return _dialogue(prompt, "prompt") if _is_dialogue(prompt) else [_user(as_text(prompt, "prompt"))], None


def _optional_prompt(row: Fields, turns: TurnReader) -> tuple[list[Turn], list[Any] | None]:
    """Return the turns before both answers of a pair, from `prompt`, `conversations` or `instruction`.

    Empty if each answer contains these turns itself.
    """
    if "prompt" in row:
        return _prompt_turns(row, turns)
    if "instruction" in row:
        return _alpaca_prompt(row), None
    if "conversations" in row:
        where, value = row.take("conversations")
        return turns.turns(value, where)
    return [], None


def _is_spoken(row: Fields) -> bool:
    """Whether the row's prompt is a dialogue in one text. Its answers then begin with the space after `Assistant:`."""
    prompt = row.raw("prompt")
    return isinstance(prompt, str) and _is_dialogue(prompt)


def _answer_turns(value: Any, where: str, turns: TurnReader, spoken: bool) -> tuple[list[Turn], list[Any] | None]:
    """Return an answer: a text, a dialogue in one text, a turn, or a list of turns."""
    if value is None:
        raise BadRowError(f"{where} is missing")
    if not isinstance(value, str):
        return turns.turns(value, where)
    if listed := turns_in_text(value, where):
        return turns.turns(listed, where)
    if _is_dialogue(value):
        return _dialogue(value, where), None
    return [_assistant(as_text(value.strip() if spoken else value, where))], None


def _joined(prompt: list[Turn], answer: list[Turn], where: str) -> list[Turn]:
    """Return the prompt's turns and then the answer's. The answer may repeat the prompt's turns, or its last question.

    Raises:
        BadRowError: the answer begins with turns that differ from the prompt.
    """
    if not prompt:
        return answer
    system, prompt = _system_apart(prompt)
    own_system, answer = _system_apart(answer)
    if system and own_system and system[0].message != own_system[0].message:
        raise BadRowError(f"{where} has a different system turn than prompt; leave one of them out")
    ours, theirs = [t.message for t in prompt], [t.message for t in answer]
    if theirs[: len(ours)] == ours:
        answer = answer[len(ours) :]
    # A prompt that is a text is often only the last question of the turns before the answer.
    elif len(ours) == 1 and ours[0] in theirs:
        prompt = []
    elif not theirs or theirs[0]["role"] != "assistant":
        raise BadRowError(f"{where} begins with different turns than prompt; leave prompt out, or these turns")
    return [*(system or own_system), *prompt, *answer]


def _system_apart(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """Split the turns into the system turn at the beginning (or nothing) and the other turns."""
    first = int(turns[0].message["role"] == "system")
    return turns[:first], turns[first:]


def _require_repeated(row: Fields, turns: TurnReader, conversation: Conversation) -> None:
    """Check that `prompt` and `messages`, if the row has them too, repeat the turns that were read.

    Raises:
        BadRowError: they differ from the turns.
    """
    messages = conversation.messages
    for name in ("prompt", "messages"):
        if name not in row or row.was_read(name):
            continue
        where, value = row.take(name)
        if name == "prompt" and isinstance(value, str):
            if not any(m["role"] == "user" and m["content"] == value for m in messages):
                raise BadRowError(f"{where} is not in the row's turns; leave {where} or the turns out")
            continue
        said = [turn.message for turn in turns.turns(value, where)[0]]
        if not any(messages[i : i + len(said)] == said for i in range(2)):
            raise BadRowError(f"{where} differs from the row's turns; leave {where} or the turns out")


SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")


def _is_dialogue(text: str) -> bool:
    """Whether a text is a dialogue as in HH-RLHF: `\\n\\nHuman: …\\n\\nAssistant: …`."""
    return SPEAKER.match(text) is not None and "\n\nAssistant:" in text


def _dialogue(text: str, where: str) -> list[Turn]:
    """Return the turns of a dialogue in one text. A last `Assistant:` without text ends a prompt; it is not a turn."""
    parts = SPEAKER.split(text)[1:]
    said = list(zip(parts[::2], parts[1::2], strict=True))
    if said[-1][0] == "Assistant" and not said[-1][1].strip():
        said.pop()
    make = {"Human": _user, "Assistant": _assistant}
    return [make[who](as_text(words.strip(), f"{where}: turn {i}")) for i, (who, words) in enumerate(said, 1)]
