"""Rows to documents with loss weights: what each stage learns from, and on which tokens.

    pretrain   {"text": ...}                           every token but the first
    sft, lora  {"conversations": [...]} or "messages"  each assistant turn's answer and its end token (see chat_format)
    dpo        {"chosen": [...], "rejected": [...]}    the same, in the turns after those that both share

A turn is {"role": system|user|assistant|tool, "content": ...}; a system turn may have `tools`, an assistant turn
`tool_calls` and `reasoning_content`. `tools` and `tool_calls` are lists, or JSON texts of lists, as MiniMind's data
has them. A row that cannot be used becomes a Reject that says which field is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig, StageName
from minimind_ray.data.chat_format import Rendering
from minimind_ray.data.chat_template import Message
from minimind_ray.data.pack import Document, Group
from minimind_ray.data.records import Reject, Row
from minimind_ray.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
SAID = ("role", "content", "reasoning_content", "tool_calls")
ROWS_AT_ONCE = 512  # tokenized in one call, which spreads over the cores


@dataclass(slots=True)
class Tally:
    """What encoding did, counted: rows kept and rejected; documents split or cut at max_seq_len, and tokens cut off."""

    kept: int = 0
    rejected: int = 0
    split: int = 0
    cut: int = 0
    cut_tokens: int = 0


class BadRowError(ValueError):
    """Why a row cannot be used."""


class _Draft(NamedTuple):
    """A row checked: the text to tokenize, or the conversations, and how many of their first answers carry no loss."""

    text: str = ""
    conversations: tuple[Rendering, ...] = ()
    shared: int = 0


def encode_rows(
    stage: StageName,
    rows: Iterable[Row | Reject],
    tokenizer: Tokenizer,
    config: DataConfig,
    tally: Tally | None = None,
) -> Iterator[Group | Reject]:
    """Documents of each row, in the rows' order: groups of one, in dpo of two (chosen, rejected).

    Rejects among the rows pass through. A pretraining text longer than `data.max_seq_len` is split into consecutive
    documents which share one token, so that every token is predicted exactly once, or cut, as
    `data.long_documents` says. A conversation is cut at its end; one that keeps no answer token is rejected. The
    two of a pair have half a pack each at most. `tally` is counted up.

    Raises:
        UserError: the tokenizer's chat template is none that answers can be found in.
    """
    tally = Tally() if tally is None else tally
    for whole in whole_documents(stage, rows, tokenizer):
        outcome = whole if isinstance(whole, Reject) else fit(stage, *whole, config, tally)
        if isinstance(outcome, Reject):
            tally.rejected += 1
            yield outcome
        else:
            tally.kept += 1
            yield from outcome


def whole_documents(
    stage: StageName, rows: Iterable[Row | Reject], tokenizer: Tokenizer
) -> Iterator[tuple[Row, Group] | Reject]:
    """The first half of `encode_rows`: each row with its documents, of whatever length."""
    if stage == "pretrain":
        documents = _text_documents
    else:
        tokenizer.require_conversations()
        documents = _chat_documents
    remaining = iter(rows)
    while chunk := list(islice(remaining, ROWS_AT_ONCE)):
        drafts = [row if isinstance(row, Reject) else _draft(stage, row, tokenizer) for row in chunk]
        groups = documents([draft for draft in drafts if not isinstance(draft, Reject)], tokenizer)
        for draft in drafts:
            yield draft if isinstance(draft, Reject) else next(groups)


def fit(stage: StageName, row: Row, group: Group, config: DataConfig, tally: Tally) -> list[Group] | Reject:
    """The second half: split or cut what is longer than `data.max_seq_len`."""
    longest = config.max_seq_len if stage != "dpo" else min(config.max_seq_len, config.pack_tokens // 2)
    excess = [len(d.tokens) - longest for d in group if len(d.tokens) > longest]
    if not excess:
        return [group]
    if stage == "pretrain" and config.long_documents == "split":
        tally.split += 1
        return [(part,) for part in _split(group[0], longest)]
    kept = tuple(Document(d.tokens[:longest], d.weights[:longest]) for d in group)
    for whole, document in zip(group, kept, strict=True):
        if not document.weights.any():
            first = int(np.argmax(whole.weights))
            return Reject(row.file, row.line, f"the answer begins at token {first}, beyond the {longest} that are kept")
    if stage == "dpo" and np.array_equal(kept[0].tokens, kept[1].tokens):
        return Reject(row.file, row.line, f"chosen and rejected are the same in the {longest} tokens that are kept")
    tally.cut += len(excess)
    tally.cut_tokens += sum(excess)
    return [kept]


def row_texts(value: dict[str, Any]) -> Iterator[str]:
    """All that was written in a row of any stage's data, for training a tokenizer."""
    text = value.get("text")
    if isinstance(text, str):
        yield text
    for key in ("conversations", "messages", "chosen", "rejected"):
        turns = value.get(key)
        for turn in cast("list[Any]", turns) if isinstance(turns, list) else []:
            content = cast("dict[str, Any]", turn).get("content") if isinstance(turn, dict) else None
            if isinstance(content, str):
                yield content


def _draft(stage: StageName, row: Row, tokenizer: Tokenizer) -> tuple[Row, _Draft] | Reject:
    try:
        _require_fields_of(stage, row.value)
        if stage == "pretrain":
            draft = _Draft(_text(row.value, "text", "text"))
        elif stage == "dpo":
            draft = _draft_pair(row.value, tokenizer)
        else:
            key = "messages" if "messages" in row.value else "conversations"
            draft = _draft_conversation(row.value, key, tokenizer)
        for text in (draft.text, *(rendering.text for rendering in draft.conversations)):
            if not text.isascii():
                text.encode()
    except UnicodeEncodeError:
        return Reject(row.file, row.line, "the text holds half a surrogate pair, which is no character")
    except RecursionError:
        return Reject(row.file, row.line, "objects are nested too deeply")
    except (BadRowError, UserError) as error:
        return Reject(row.file, row.line, str(error))
    return row, draft


def _draft_conversation(value: dict[str, Any], key: str, tokenizer: Tokenizer) -> _Draft:
    messages, tools = conversation(value, key)
    _require_answers(messages, key)
    return _Draft(conversations=(tokenizer.render(messages, tools),))


def _draft_pair(value: dict[str, Any], tokenizer: Tokenizer) -> _Draft:
    chosen, chosen_tools = conversation(value, "chosen")
    rejected, rejected_tools = conversation(value, "rejected")
    _require_answers(chosen, "chosen")
    _require_answers(rejected, "rejected")
    renderings = tokenizer.render(chosen, chosen_tools), tokenizer.render(rejected, rejected_tools)
    if renderings[0].text == renderings[1].text:
        raise BadRowError("chosen and rejected are the same")
    common = 0
    while common < min(len(chosen), len(rejected)) and _same(chosen[common], rejected[common], tokenizer):
        common += 1
    ends = {"chosen": chosen[common:], "rejected": rejected[common:]}
    for key, messages in ends.items():
        if not messages:
            raise BadRowError(f"{key} has no answer after the turns that both share")
    if chosen_tools != rejected_tools or any(messages[0]["role"] != "assistant" for messages in ends.values()):
        raise BadRowError("chosen and rejected answer different prompts")
    return _Draft(conversations=renderings, shared=_count_answers(chosen[:common]))


def _same(one: Message, other: Message, tokenizer: Tokenizer) -> bool:
    """They differ, if at all, in further fields that the chat template does not write, such as an id."""
    differ = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    return not any(key in SAID or tokenizer.writes(key) for key in differ)


def _text_documents(drafts: list[tuple[Row, _Draft]], tokenizer: Tokenizer) -> Iterator[tuple[Row, Group]]:
    flat: list[int] = []
    ends: list[int] = []
    for ids in tokenizer.encode([draft.text for _, draft in drafts]):
        flat.append(tokenizer.bos_id)
        flat += ids
        flat.append(tokenizer.eos_id)
        ends.append(len(flat))
    # One call of numpy's for all texts; copies, so that a document that waits for its pack keeps no others alive.
    tokens, weights, start = np.array(flat, np.int32), np.ones(len(flat), np.uint8), 0
    weights[[0, *ends[:-1]]] = 0
    for (row, _), end in zip(drafts, ends, strict=True):
        yield row, (Document(tokens[start:end].copy(), weights[start:end].copy()),)
        start = end


def _chat_documents(drafts: list[tuple[Row, _Draft]], tokenizer: Tokenizer) -> Iterator[tuple[Row, Group] | Reject]:
    encoded = iter(tokenizer.encode_conversations([r for _, draft in drafts for r in draft.conversations]))
    for row, draft in drafts:
        documents: list[Document] = []
        reasons: list[str] = []
        for one in islice(encoded, len(draft.conversations)):
            if isinstance(one, UserError):
                reasons.append(str(one))
            else:
                documents.append(_chat_document(*one, draft.shared))
        yield Reject(row.file, row.line, reasons[0]) if reasons else (row, tuple(documents))


def _chat_document(ids: list[int], spans: list[tuple[int, int]], shared: int) -> Document:
    weights = np.zeros(len(ids), np.uint8)
    for start, end in spans[shared:]:
        weights[start:end] = 1
    return Document(np.array(ids, np.int32), weights)


def _split(document: Document, longest: int) -> Iterator[Document]:
    """A part's first token is the last of the part before, where it was predicted."""
    for start in range(0, len(document.tokens) - 1, longest - 1):
        weights = document.weights[start : start + longest].copy()
        weights[0] = 0
        yield Document(document.tokens[start : start + longest], weights)


# Checks of what a row holds

FIELDS = {
    "text": ("pretrain",), "conversations": ("sft", "lora"), "messages": ("sft", "lora"), "chosen": ("dpo",),
}  # fmt: skip
"""What rows are known by, and the stages that learn from them."""


def _require_fields_of(stage: StageName, value: dict[str, Any]) -> None:
    """A row of another stage's data is told apart from one that lacks a field."""
    own = [field for field, stages in FIELDS.items() if stage in stages]
    others = [field for field in FIELDS if field in value and field not in own]
    if others and not any(field in value for field in own):
        reads = " and ".join(FIELDS[others[0]])
        raise BadRowError(f"{own[0]} is missing, but {others[0]} is there, which {reads} would read")


def conversation(value: dict[str, Any], key: str) -> tuple[list[Message], list[Any] | None]:
    """The row's turns as the chat template takes them, and the tools: those of the system turn or of the row.

    Raises:
        BadRowError: they are none that can be rendered; which field, and why.
    """
    turns = _list(value, key, key)
    tools = _json_list(value, "tools", "tools")
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        where = f"{key}[{i}]"
        message = _object(turn, where)
        role = message.get("role")
        if role not in ROLES:
            raise BadRowError(f"{where}.role is {json.dumps(role)}; known are {', '.join(ROLES)}")
        here = _json_list(message, "tools", f"{where}.tools")
        if here and (role != "system" or tools):
            raise BadRowError(f"{where}.tools are not alone or not on a system turn")
        tools = tools or here
        calls = _json_list(message, "tool_calls", f"{where}.tool_calls")
        for j, call in enumerate(calls or []):
            called = f"{where}.tool_calls[{j}]"
            function = _object(call.get("function") or call, f"{called}.function")
            _text(function, "name", f"{called}.name")
            if "arguments" not in function:
                raise BadRowError(f"{called}.arguments is missing")
        checked: Message = {k: v for k, v in message.items() if k not in ("tools", "tool_calls") and v is not None}
        if calls:
            checked["tool_calls"] = calls
        if "reasoning_content" in checked:
            _string(checked, "reasoning_content", f"{where}.reasoning_content")
        if calls or checked.get("reasoning_content"):
            checked.setdefault("content", "")
        if calls or role in ("system", "tool") or checked.get("reasoning_content"):
            _string(checked, "content", f"{where}.content")
        else:
            _text(checked, "content", f"{where}.content")
        messages.append(checked)
    return messages, tools


def _require_answers(messages: list[Message], key: str) -> None:
    if not _count_answers(messages):
        raise BadRowError(f"{key} has no assistant turn")


def _count_answers(messages: list[Message]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _string(holder: dict[str, Any], key: str, where: str) -> str:
    if key not in holder:
        raise BadRowError(f"{where} is missing")
    value = holder[key]
    if not isinstance(value, str):
        raise BadRowError(f"{where} is {_kind(value)}, not a string")
    return value


def _text(holder: dict[str, Any], key: str, where: str) -> str:
    value = _string(holder, key, where)
    if not value or value.isspace():
        raise BadRowError(f"{where} is empty")
    return value


def _list(holder: dict[str, Any], key: str, where: str) -> list[Any]:
    if key not in holder:
        raise BadRowError(f"{where} is missing")
    value = holder[key]
    if not isinstance(value, list):
        raise BadRowError(f"{where} is {_kind(value)}, not a list")
    if not value:
        raise BadRowError(f"{where} is empty")
    return cast("list[Any]", value)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRowError(f"{where} is {_kind(value)}, not an object")
    return cast("dict[str, Any]", value)


def _json_list(holder: dict[str, Any], key: str, where: str) -> list[dict[str, Any]] | None:
    """A list of objects, or the JSON text of one; None where there is none, which some files write as null or ""."""
    value = holder.get(key)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRowError(f"{where} is a string but not JSON ({error})") from error
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        raise BadRowError(f"{where} is {_kind(value)}, not a list")
    return [_object(item, f"{where}[{i}]") for i, item in enumerate(cast("list[Any]", value))]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}.get(
        type(value), "an object"
    )
