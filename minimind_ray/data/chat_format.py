"""Where a conversation's answers stand in the text that a chat template writes.

The span of an answer is what the model has to write itself: all that follows the generation prompt, up to and with the
token that ends the turn. It is found in one of three ways, in this order:

    marks     the template has {% generation %} blocks: each is an answer
    ChatML    the tokenizer finds `<|im_start|>assistant` and a newline among the ids, at no cost (`spans` is None)
    compared  the conversation is rendered again with a sentinel in place of each answer, see `_compare`

A template in which none of them is exact is refused by `require_answers`, a single conversation by `render`.
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

SENTINEL = "\ufdd3"  # stands for an answer; messages must not hold it
RESERVED = (ANSWER_START, ANSWER_END, SENTINEL)

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
MOST_SHAPES = 1_000  # shapes of conversations that are remembered


class Rendering(NamedTuple):
    """A conversation as the chat template writes it, with its number of answers.

    `spans` says where the answers stand in `text`, in characters; None where the tokenizer finds them by ids.
    """

    text: str
    answers: int
    spans: tuple[tuple[int, int], ...] | None = None


class ChatFormat:
    """One chat template of a tokenizer. `special_tokens` are its variables, `added` the tokens that can end a turn;
    `with_tools` says that it is only used with tools.

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
        self._written: dict[Any, str | None] = {}  # shape of a conversation: the first part that is not written

    def expect(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        """Announce a conversation that `render` will be called with. This saves time."""
        with suppress(UserError):  # `render` raises it.
            self._template.expect(self._renderings(messages, tools))

    def render(self, messages: Sequence[Message], tools: list[Any] | None) -> Rendering:
        """The conversation, with its answers' places.

        Raises:
            UserError: the template fails on it or does not write all of it, or an answer's place is not certain.
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
        """The conversation up to where the next answer begins.

        Raises:
            UserError: the template fails on it or does not write all of it.
        """
        self._require_written(messages, tools)
        return self._text(messages, tools, add_generation_prompt=True)

    def require_answers(self) -> None:
        """Check on a small conversation that answers can be found.

        Raises:
            UserError: they cannot; why.
        """
        if self._kind == "compared":
            if self.end_token is None:
                raise UserError("it writes no token that ends an answer")
            if self._ignores_generation_prompt and self._opening.strip():
                raise UserError(f"it writes {self._opening!r} before an answer, but not as a generation prompt")

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
        """What the template writes before and after the answer to a question."""
        text = self._text([*self._question, _answer(SENTINEL)], self._probe_tools)
        before, found, after = text.partition(SENTINEL)
        if not found or SENTINEL in after:
            raise UserError(f"{self._name}: the chat template does not write an answer, or more than once")
        return before, after

    @cached_property
    def _opening(self) -> str:
        """What stands between the generation prompt and the answer's text."""
        prompt = self._text(self._question, self._probe_tools, add_generation_prompt=True)
        before, _ = self._probe
        return before[len(prompt) :] if before.startswith(prompt) else ""

    @cached_property
    def _ignores_generation_prompt(self) -> bool:
        one, other = (self._text(self._question, self._probe_tools, add_generation_prompt=p) for p in (False, True))
        return one == other

    def _text(
        self, messages: Sequence[Message], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        return _unmarked(self._template.render(list(messages), tools, add_generation_prompt))[0]

    # Answers' places, by comparing

    def _compare(self, messages: Sequence[Message], tools: list[Any] | None, text: str) -> tuple[tuple[int, int], ...]:
        """Each answer's place in `text`.

        The conversation is rendered again with another answer, a sentinel. What stands before and after the answer
        must be the same in both; the answer begins where the generation prompt ends and ends with its end token.
        """
        spans = [self._locate(messages, tools, text, i) for i, m in enumerate(messages) if m["role"] == "assistant"]
        if any(one[1] > other[0] for one, other in zip(spans, spans[1:])):
            raise UserError("the chat template writes answers into one another")
        return tuple(spans)

    def _renderings(self, messages: Sequence[Message], tools: list[Any] | None) -> Iterator[Arguments]:
        """What `render` asks of the template, unless the first of `_other_answers` is not enough."""
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
            raise UserError("the chat template does not write the answer, or more than once")
        if prompt not in before:
            raise UserError("the chat template does not write the generation prompt before the answer")
        if not end:
            raise UserError("the chat template writes no token that ends the answer")
        start = before.rindex(prompt) + len(prompt)
        stop = len(text) - len(after) + end.end()
        same = text[:start] == before[:start] and text[stop:] == after[end.end() :]
        if not same or start >= stop or [m.end() for m in re.finditer(self._ends, text[start:stop])] != [stop - start]:
            raise UserError("the chat template writes other turns otherwise after this answer, so its end is uncertain")
        return start, stop

    def _prompt_end(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """The generation prompt's text after the last turn's content; all of it where there is no turn."""
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

    # What is written

    def _require_written(self, messages: Sequence[Message], tools: list[Any] | None) -> None:
        """Check that the template writes all that the conversation holds.

        It is rendered with another text in every place, and all of these must be there. Templates decide by which
        fields there are, so conversations of one shape are checked once. Thoughts of turns before the last user's may
        be left out, as Qwen 3 does on purpose.
        """
        shape = _shape(messages, tools)
        if shape not in self._written:
            if len(self._written) >= MOST_SHAPES:
                self._written.clear()
            self._written[shape] = self._first_unwritten(messages, tools)
        if missing := self._written[shape]:
            raise UserError(f"the chat template does not write {missing}; leave that out or use another template")

    def _first_unwritten(self, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
        fields = _Fields()
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        other_messages = [fields.replace_message(m, i, thoughts=i > last_user) for i, m in enumerate(messages)]
        text = self._text(other_messages, fields.replace_tools(tools))
        return next((name for word, name in fields.names.items() if word not in text), None)


class _Fields:
    """Puts a word of its own in the place of every text of a conversation; `names` says what each stands for."""

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
        """A tool or a call with another name."""
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
    """All of a conversation but its texts."""
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
    """The turn with a sentinel for its text: alone, beside its tool calls, and as their name."""
    yield _other_turn(message)
    if len(message) > 2:
        yield {**message, "content": SENTINEL}
    if calls := message.get("tool_calls"):
        first, *rest = calls
        function = {**(first.get("function") or first), "name": SENTINEL}
        yield {**message, "tool_calls": [{**first, "function": function} if "function" in first else function, *rest]}


def _unmarked(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without the marks of {% generation %} blocks, and where these stood."""
    if ANSWER_START not in text:
        return text, ()
    pieces = re.split(f"[{ANSWER_START}{ANSWER_END}]", text)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    return "".join(pieces), tuple(zip(ends[1:-1:2], ends[2::2]))


def _any(contents: Collection[str]) -> str:
    return "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)"
