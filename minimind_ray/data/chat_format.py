"""Find the answers of a conversation in the text that a chat template writes.

The span of an answer is the text that the model has to write itself. It begins after the generation prompt, and it ends
with the token that ends the turn. There are three ways to find the spans; the first that applies is used:

    marks     the template has {% generation %} blocks: each block is an answer
    ChatML    the tokenizer finds `<|im_start|>assistant` and a newline among the ids, at no cost (`spans` is None)
    compared  the conversation is rendered again with a sentinel in place of each answer, see `_compare`

`require_answers` refuses a template whose answers cannot be found exactly; `render` refuses a single conversation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

from minimind_ray.config.errors import UserError
from minimind_ray.data.chat_template import ChatTemplate, Message
from minimind_ray.data.template_process import Arguments
from minimind_ray.data.template_sandbox import ANSWER_END, ANSWER_START

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ANSWER_HEADER = f"{TURN_START}assistant\n"

SENTINEL = "\ufdd3"  # stands for an answer; messages must not contain it
RESERVED = (ANSWER_START, ANSWER_END, SENTINEL)

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
MOST_SHAPES = 1_000  # shapes of conversations to remember


class Rendering(NamedTuple):
    """A conversation as the chat template writes it, with its number of answers.

    `spans` holds the first character and the end of each answer in `text`. It is None if the tokenizer can find the
    answers by ids.
    """

    text: str
    answers: int
    spans: tuple[tuple[int, int], ...] | None = None


class ChatFormat:
    """One chat template of a tokenizer, which can find the answers in the text that it writes.

    `special_tokens` are variables in the template, and `added` are the tokens that can end a turn. `with_tools` says
    that the template is used only for conversations with tools.

    Raises:
        UserError: the template does not compile.
    """

    def __init__(
        self, source: str, special_tokens: dict[str, str], added: Collection[str], name: str, *, with_tools: bool
    ) -> None:
        self._name = name
        self._template = ChatTemplate(source, special_tokens, name)
        self._added = added
        self._eos = special_tokens.get("eos_token")
        self._probe_tools = [TOOL] if with_tools else None
        self._written: dict[Any, str | None] = {}  # by shape: the first part that the template does not write, or None

    def expect(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        """Announce a conversation that `render` will be called with. This saves time."""
        with suppress(UserError):  # `render` will raise it.
            self._template.expect(self._renderings(messages, tools))

    def render(self, messages: Sequence[Message], tools: list[Any] | None) -> Rendering:
        """Return the conversation as text, with the places of its answers.

        Raises:
            UserError: the template fails on the conversation or does not write all of it, or the place of an answer is
                uncertain.
        """
        self._require_written(messages, tools)
        marked = self._template.render(list(messages), tools, add_generation_prompt=False)
        text, marks = _unmarked(marked)
        answers = sum(message["role"] == "assistant" for message in messages)
        if not answers:
            return Rendering(text, 0, ())
        if self._kind == "marks" and len(marks) != answers:
            raise UserError(f"the chat template marks {len(marks)} answers in {answers} assistant turns")
        if self._kind == "compared":
            return Rendering(text, answers, self._compare(messages, tools, text))
        return Rendering(text, answers, marks if self._kind == "marks" else None)

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """Return the conversation up to the beginning of the next answer.

        Raises:
            UserError: the template fails on the conversation or does not write all of it.
        """
        self._require_written(messages, tools)
        return self._text(messages, tools, add_generation_prompt=True)

    def require_answers(self) -> None:
        """Check on a small conversation that answers can be found.

        Raises:
            UserError: they cannot be found. The message says why.
        """
        if self._kind == "compared":
            if self.end_token is None:
                raise UserError("the chat template writes no token that ends an answer")
            if self._ignores_generation_prompt and self._opening.strip():
                raise UserError(
                    f"the chat template writes {self._opening!r} before an answer, but not as a generation prompt"
                )

    @cached_property
    def end_token(self) -> str | None:
        """The added token that the template writes after an answer."""
        if TURN_END in self._added and self._probe[1].startswith(TURN_END):
            return TURN_END
        found = re.match(rf"\s*({_any(self._added)})", self._probe[1])
        return found[1] if found else None

    @cached_property
    def _kind(self) -> Literal["marks", "chatml", "compared"]:
        if self._template.marks_answers:
            return "marks"
        before, after = self._probe
        chatml = ANSWER_HEADER in before and TURN_END in after and {TURN_START, TURN_END} <= set(self._added)
        return "chatml" if chatml else "compared"

    @cached_property
    def _question(self) -> list[Message]:
        return [{"role": "user", "content": "1"}]

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """The texts that the template writes before and after the answer to a question."""
        text = self._text([*self._question, _answer(SENTINEL)], self._probe_tools)
        before, found, after = text.partition(SENTINEL)
        if not found or SENTINEL in after:
            raise UserError(f"{self._name}: the chat template does not write an answer, or writes it more than once")
        return before, after

    @cached_property
    def _opening(self) -> str:
        """The text between the generation prompt and the answer's content."""
        prompt = self._text(self._question, self._probe_tools, add_generation_prompt=True)
        before, _ = self._probe
        return before[len(prompt) :] if before.startswith(prompt) else ""

    @cached_property
    def _ignores_generation_prompt(self) -> bool:
        bare, prompt = (self._text(self._question, self._probe_tools, add_generation_prompt=p) for p in (False, True))
        return bare == prompt

    def _text(
        self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        return _unmarked(self._template.render(list(messages), tools, add_generation_prompt))[0]

    # Find answers by comparing two renderings

    def _compare(self, messages: Sequence[Message], tools: list[Any] | None, text: str) -> tuple[tuple[int, int], ...]:
        """Return the span of each answer in `text`.

        For each answer, the conversation is rendered again with a sentinel as the answer. The texts before and after
        the answer must be the same in both renderings. The answer begins at the end of the generation prompt, and it
        ends with its end token.
        """
        spans = [self._locate(messages, tools, text, i) for i, m in enumerate(messages) if m["role"] == "assistant"]
        if any(span[1] > following[0] for span, following in zip(spans, spans[1:])):
            raise UserError("the chat template writes answers that overlap")
        return tuple(spans)

    def _renderings(self, messages: Sequence[Message], tools: list[Any] | None) -> Iterator[Arguments]:
        """Yield the renderings that `render` will need if the first of `_other_answers` is enough for every turn."""
        yield list(messages), tools, False
        for i, message in enumerate(messages) if self._kind == "compared" else ():
            if message["role"] == "assistant":
                yield [*messages[: i - 1], _other_turn(messages[i - 1])] if i else [], tools, True
                yield [*messages[:i], _other_turn(message), *messages[i + 1 :]], tools, False

    def _locate(self, messages: Sequence[Message], tools: list[Any] | None, text: str, i: int) -> tuple[int, int]:
        prompt = self._prompt_end(messages[:i], tools)
        reasons: list[str] = []
        for other in _other_answers(messages[i]):
            try:
                other_text = self._text([*messages[:i], other, *messages[i + 1 :]], tools)
                return self._place(text, other_text, prompt)
            except UserError as error:
                reasons.append(str(error))
        raise UserError(f"turn {i + 1}: {reasons[-1]}")

    def _place(self, text: str, other_text: str, prompt: str) -> tuple[int, int]:
        before, found, after = other_text.partition(SENTINEL)
        end = re.search(self._ends, after)
        if not found or SENTINEL in after:
            raise UserError("the chat template does not write the answer, or writes it more than once")
        if prompt not in before:
            raise UserError("the chat template does not write the generation prompt before the answer")
        if not end:
            raise UserError("the chat template writes no token that ends the answer")
        start = before.rindex(prompt) + len(prompt)
        stop = len(text) - len(after) + end.end()
        same = text[:start] == before[:start] and text[stop:] == after[end.end() :]
        if not same or start >= stop or [m.end() for m in re.finditer(self._ends, text[start:stop])] != [stop - start]:
            raise UserError("the chat template writes other turns differently after this answer: its end is uncertain")
        return start, stop

    def _prompt_end(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """Return the text between the last turn's content and the answer, or the whole prompt if there is no turn."""
        if not messages:
            return self._text([], tools, add_generation_prompt=True)
        for other in _other_answers(messages[-1]):
            text = self._text([*messages[:-1], other], tools, add_generation_prompt=True)
            if SENTINEL in text:
                return text.rpartition(SENTINEL)[2]
        raise UserError(f"the chat template does not write turn {len(messages)}")

    @cached_property
    def _ends(self) -> str:
        return _any({token for token in (self.end_token, self._eos) if token})

    # Check that the template writes everything

    def _require_written(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        """Check that the template writes every part of the conversation.

        Replace every text of the conversation by a word of its own, and look for all words in the rendered text. Which
        parts a template writes depends on which fields there are, so conversations of one shape are checked once. A
        template may leave out the thoughts of turns before the last user turn; Qwen 3's does so on purpose.
        """
        shape = _shape(messages, tools)
        if shape not in self._written:
            if len(self._written) >= MOST_SHAPES:
                self._written.clear()
            self._written[shape] = self._first_unwritten(messages, tools)
        if missing := self._written[shape]:
            raise UserError(f"the chat template does not write {missing}; remove it or use another template")

    def _first_unwritten(self, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
        fields = _Fields()
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        other_messages = [fields.replace_message(m, i, thoughts=i > last_user) for i, m in enumerate(messages)]
        text = self._text(other_messages, fields.replace_tools(tools))
        return next((name for word, name in fields.names.items() if word not in text), None)


class _Fields:
    """Replaces every text of a conversation by a word of its own. `names` says which text each word replaces."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def replace_message(self, message: Message, i: int, thoughts: bool) -> Message:
        role, other = message["role"], dict(message)
        content, thought = message.get("content"), message.get("reasoning_content")
        if isinstance(content, str) and content.strip():
            other["content"] = self._word(f"the content of turn {i + 1} ({role})")
        if isinstance(thought, str) and thought.strip():
            word = self._word(f"reasoning_content of turn {i + 1}") if thoughts else "a thought"
            other |= {key: word for key in ("reasoning_content", "thinking") if key in other}
        if message.get("tool_calls"):
            other["tool_calls"] = [self._call(call, i) for call in message["tool_calls"]]
        return other

    def replace_tools(self, tools: list[Any] | None) -> list[Any] | None:
        return tools and [self._named(tool, "tools") for tool in tools]

    def _call(self, call: dict[str, Any], i: int) -> dict[str, Any]:
        name = f"tool_calls of turn {i + 1}"
        other = self._named(call, name)
        function = cast("dict[str, Any]", other.get("function") or other)
        if function.get("arguments"):
            word = self._word(name)
            is_text = isinstance(function["arguments"], str)
            function["arguments"] = f'{{"{word}": "{word}"}}' if is_text else {word: word}
        return other

    def _named(self, value: Any, name: str) -> Any:
        """Return the tool or the call with a word as its name."""
        if not isinstance(value, dict):
            return value
        other = dict(cast("dict[str, Any]", value))
        if isinstance(other.get("function"), dict):
            other["function"] = {**other["function"], "name": self._word(name)}
        elif "name" in other:
            other["name"] = self._word(name)
        return other

    def _word(self, name: str) -> str:
        word = f"w{len(self.names)}wQz"
        self.names[word] = name
        return word


def _shape(messages: Sequence[Message], tools: list[Any] | None) -> tuple[Any, ...]:
    """Return everything about a conversation that decides which parts a template writes, without the texts."""
    return (
        tuple(
            (
                message["role"],
                bool(isinstance(content := message.get("content"), str) and content.strip()),
                *(
                    (bool(message.get("reasoning_content")), _calls_shape(message.get("tool_calls")))
                    if len(message) > 2
                    else ()
                ),
            )
            for message in messages
        ),
        len(tools or ()),
    )


def _calls_shape(calls: Any) -> tuple[Any, ...]:
    return tuple(
        ("function" in call, isinstance((call.get("function") or call).get("arguments"), str)) for call in calls or ()
    )


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _other_turn(message: Message) -> Message:
    return {"role": message["role"], "content": SENTINEL}


def _other_answers(message: Message) -> Iterator[Message]:
    """Yield the turn with a sentinel: as its only field, as its content, and as the name of its first tool call."""
    yield _other_turn(message)
    if len(message) > 2:
        yield {**message, "content": SENTINEL}
    if calls := message.get("tool_calls"):
        first, *rest = calls
        function = {**(first.get("function") or first), "name": SENTINEL}
        yield {**message, "tool_calls": [{**first, "function": function} if "function" in first else function, *rest]}


def _unmarked(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return the text without the marks of {% generation %} blocks, and the span of each block in it."""
    if ANSWER_START not in text:
        return text, ()
    pieces = re.split(f"[{ANSWER_START}{ANSWER_END}]", text)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    return "".join(pieces), tuple(zip(ends[1:-1:2], ends[2::2]))


def _any(contents: Collection[str]) -> str:
    return "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)"
