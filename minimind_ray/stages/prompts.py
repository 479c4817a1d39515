"""Read prompts from a command line or a file, turn them into ids, and answer them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import DEEPEST, deeper, require_text
from minimind_ray.data.chat_template import Message
from minimind_ray.data.fields import BadRowError
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.sampling import Sampling
from minimind_ray.stages.use import Trained, complete


class Talk(NamedTuple):
    """A conversation that ends with a turn to answer, and its tools."""

    messages: list[Message]
    tools: list[Any] | None


def read_prompts(given: list[str], file: Path | None) -> list[str | Talk]:
    """Return the prompts of the command line and the file: texts, or conversations up to a question.

    Raises:
        UserError: there is no prompt, or the file cannot be read.
    """
    prompts: list[str | Talk] = []
    for text in given:
        require_text(text, "--prompt")
        prompts.append(text)
    if file is not None:
        from minimind_ray.data.records import SUFFIXES

        rows = file.name.endswith(SUFFIXES) and not file.name.endswith(".txt")
        prompts += _row_prompts(str(file)) if rows else _line_prompts(file)
    if not prompts:
        raise UserError("no prompts: give --prompt TEXT or --file FILE" if file is None else f"{file}: no prompts")
    return prompts


def _line_prompts(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return [line for line in lines if line.strip()]


def _row_prompts(path: str) -> list[str | Talk]:
    from minimind_ray.data.records import Reject, discover, read_rows

    prompts: list[str | Talk] = []
    for source in discover(path):
        for row in read_rows(source):
            where = f"{row.file}:{row.line}"
            if isinstance(row, Reject):
                raise UserError(f"{where}: {row.reason}")
            prompts.append(_row_prompt(row.value, where))
    return prompts


def _row_prompt(row: dict[str, Any], where: str) -> str | Talk:
    """Return the row's prompt, or its turns without the answers at the end."""
    from minimind_ray.data.formats import question_of

    prompt = row.get("prompt")
    if isinstance(prompt, str) and len(row) == 1:
        require_text(prompt, f"{where}: prompt")
        return prompt
    try:
        messages, tools = question_of(row)
        if deeper([messages, tools], DEEPEST):  # JSON inside a text is not checked when the row is read.
            raise RecursionError
    except BadRowError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: objects are nested too deeply") from None
    require_text(dumps([messages, tools], ensure_ascii=False), where)
    if tools is None and [m["role"] for m in messages] == ["user"]:
        return str(messages[0]["content"])
    return Talk(messages, tools)


class AnswerText(NamedTuple):
    """The text that follows a prompt, its number of tokens, and whether the model itself ended it."""

    text: str
    tokens: int
    ended: bool


def answers(
    trained: Trained,
    prompts: Sequence[str | Talk],
    sampling: Sampling,
    batch_size: int,
    *,
    raw: bool,
    system: str | None = None,
) -> Iterator[AnswerText]:
    """Answer all prompts in their order, as `complete` does.

    With `raw`, a prompt is a text, and the answer continues it. Without `raw`, a text is a user's turn, and `system` is
    the text of the system turn.

    Raises:
        UserError: a prompt leaves no room for an answer, or is a conversation although `raw` is set.
    """
    tokenizer = trained.tokenizer
    ids = [text_ids(prompt, tokenizer) if raw else chat_ids(prompt, system, tokenizer) for prompt in prompts]
    for asked, (answer, ended) in zip(ids, complete(trained, ids, sampling, batch_size), strict=True):
        if raw:
            text = tokenizer.decode(answer, skip_special=True, after=asked)
        else:
            text = tokenizer.answer_text(asked, answer)
        yield AnswerText(text, len(answer), ended)


def text_ids(prompt: str | Talk, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text to continue. They begin with the start token, as in a pretraining document.

    Raises:
        UserError: the prompt is a conversation.
    """
    if not isinstance(prompt, str):
        raise UserError("--raw continues texts, but the file has conversations: leave --raw out")
    return [tokenizer.bos_id, *tokenizer.encode([prompt])[0]]


def chat_ids(prompt: str | Talk, system: str | None, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a conversation up to the beginning of the answer. A text counts as a user's turn."""
    messages, tools = Talk([{"role": "user", "content": prompt}], None) if isinstance(prompt, str) else prompt
    if system is not None:
        messages = [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
    return tokenizer.prompt_ids(messages, tools)
