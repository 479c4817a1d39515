"""Answers found exactly in the chat formats of other model families, or refused with a reason."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_ray.config.errors import UserError
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.stages.conversation import whole_characters, without_lead
from tests.data.chat_families import CHATML, FAMILIES, KINDS, LLAMA3, QWEN3, write_family

pytestmark = pytest.mark.unit

Messages = list[dict[str, Any]]

TURNS: Messages = [
    {"role": "user", "content": "What is after 7?"},
    {"role": "assistant", "content": "It is 8."},
    {"role": "user", "content": "  之后是什么？\n"},
    {"role": "assistant", "content": "9\n\n  数字"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "after", "arguments": {"number": 8}}}
TOOLS = [{"type": "function", "function": {"name": "after", "parameters": {}}}]
WITH_TOOLS: Messages = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"number": 9}'},
    {"role": "assistant", "content": "It is 9."},
]


@cache
def directory(family: str, kind: str) -> Path:
    return write_family(Path(mkdtemp()), family, kind)


@cache
def load(family: str, kind: str = "bytes") -> Tokenizer:
    return Tokenizer.load(directory(family, kind))


def encoded(tokenizer: Tokenizer, messages: Messages, tools: Any = None) -> tuple[list[int], list[tuple[int, int]]]:
    (found,) = tokenizer.encode_conversations([tokenizer.render(messages, tools)])
    assert not isinstance(found, UserError), found
    return found


def answers(tokenizer: Tokenizer, messages: Messages, tools: Any = None) -> list[str]:
    ids, spans = encoded(tokenizer, messages, tools)
    return [tokenizer.decode(ids[start:end], after=ids[:start]) for start, end in spans]


def refusal(template: str, tmp_path: Path, family: str = "chatml") -> str:
    with pytest.raises(UserError) as error:
        Tokenizer.load(write_family(tmp_path, family, "bytes", chat_template=template)).require_conversations()
    return str(error.value)


@pytest.mark.parametrize("kind", ["bytes", "first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_is_the_answer_and_its_end_token(family: str, kind: str) -> None:
    tokenizer = load(family, kind)
    tokenizer.require_conversations()
    space = " " if family in ("llama2", "mistral", "mistral-text") else ""
    thought = "<think>\n\n</think>\n\n" if family in ("qwen3", "thinking") else ""
    expected = [space + "It is 8." + FAMILIES[family][1], thought + space + "9\n\n  数字" + FAMILIES[family][1]]
    assert answers(tokenizer, TURNS) == expected
    if family != "gemma":
        assert answers(tokenizer, [SYSTEM, *TURNS]) == expected


@pytest.mark.parametrize("family", ["llama3", "mistral", "mistral-text", "qwen3", "thinking"])
def test_a_call_of_a_tool_is_in_its_answers_span(family: str) -> None:
    tools = TOOLS if family in ("qwen3", "thinking") else None
    called, last = answers(load(family), WITH_TOOLS, tools)
    assert "after" in called and called.endswith(FAMILIES[family][1])
    assert last.endswith("It is 9." + FAMILIES[family][1])


@pytest.mark.parametrize("family", ["qwen3", "thinking"])
def test_thoughts_before_the_last_question_may_be_left_out_but_not_after_it(family: str) -> None:
    end = FAMILIES[family][1]
    thinking = [{**m, "reasoning_content": "I count."} if m["role"] == "assistant" else m for m in TURNS]
    written = "<think>\nI count.\n</think>\n\n9\n\n  数字" + end
    assert answers(load(family), thinking) == ["It is 8." + end, written]
    with pytest.raises(UserError, match="does not write reasoning_content of turn 4; remove it"):
        load("llama3").render(thinking)


@pytest.mark.parametrize(
    ("family", "messages", "tools", "missing"),
    [
        ("chatml", WITH_TOOLS, None, "tool_calls of turn 2"),
        ("chatml", TURNS, TOOLS, "tools"),
        ("llama3", TURNS, TOOLS, "tools"),
        ("llama3", [TURNS[0], {**WITH_TOOLS[1], "content": "I look."}], None, "the content of turn 2 (assistant)"),
        ("llama3", [TURNS[0], {**WITH_TOOLS[1], "tool_calls": [CALL, CALL]}], None, "tool_calls of turn 2"),
        ("llama2", [TURNS[0], TURNS[1], TURNS[2], {**TURNS[3], "tool_calls": [CALL]}], None, "tool_calls of turn 4"),
        ("mistral", [*TURNS[:2], {"role": "function", "content": "9"}], None, "the content of turn 3 (function)"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_is_refused(family: str, messages: Messages, tools: Any, missing: str) -> None:
    with pytest.raises(UserError) as error:
        load(family).render(messages, tools)
    assert str(error.value).startswith(f"the chat template does not write {missing}; remove it")


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("gemma", [SYSTEM, *TURNS], "System role not supported"),
        ("llama2", TURNS[1:], "roles must alternate"),
    ],
)
def test_what_a_template_refuses_is_refused(family: str, messages: Messages, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load(family).render(messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "the chat template writes no token that ends an answer"),
        (LLAMA3.replace("{{- '<|start_header_id|>assistant", "{{- '<|begin_of_text|>assistant"),
         "does not write the generation prompt before the answer"),
        (LLAMA3.partition("{%- if add_gen")[0], "but not as a generation prompt"),
        (LLAMA3.replace("m.content | trim", "m.content * 2"), "does not write an answer, or writes it more than once"),
        (LLAMA3.replace("m.content | trim", "m.content | upper"), "does not write the content of turn 1"),
        (LLAMA3.replace("<|eot_id|>", "{{ eos_token }}") + "{{ messages | length }}", "no token that ends an answer"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
         "marks 2 answers in 1 assistant turns"),
        ("{{ x.y.z }}", "the chat template fails on these messages: 'x' is undefined"),
    ],
)  # fmt: skip
def test_a_template_whose_answers_are_not_certain_is_refused(template: str, reason: str, tmp_path: Path) -> None:
    message = refusal(template, tmp_path, "llama3")
    assert "the loss mask needs a chat template whose answers can be found" in message
    assert reason in message


def test_an_answer_that_changes_later_turns_is_refused_alone(tmp_path: Path) -> None:
    template = LLAMA3 + "{{ messages[1].content | length if messages | length > 2 }}"
    tokenizer = Tokenizer.load(write_family(tmp_path, "llama3", "bytes", chat_template=template))
    tokenizer.require_conversations()
    with pytest.raises(UserError, match="turn 2: the chat template writes other turns differently after this answer"):
        tokenizer.render(TURNS)


def test_an_answer_that_spells_its_end_token_is_refused_where_that_could_end_it(tmp_path: Path) -> None:
    template = QWEN3.replace("<|im_end|>", "</tool_call>")
    path = write_family(tmp_path, "thinking", "bytes", chat_template=template)
    with pytest.raises(UserError, match="turn 2: "):
        Tokenizer.load(path).render([TURNS[0], {"role": "assistant", "content": "a</tool_call>b"}])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_stops_at_the_ends_of_turns_and_documents(family: str) -> None:
    tokenizer = load(family)
    _, end, special = FAMILIES[family]
    stops = [tokenizer.decode([id]) for id in tokenizer.stop_ids]
    assert stops == list(dict.fromkeys([special[-1], end.strip()]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama2", "mistral", "mistral-text", "zephyr", "llama3"])
def test_an_answers_text_is_the_same_that_the_template_was_given(family: str, kind: str) -> None:
    tokenizer = load(family, kind)
    for content in ("It is 8.", "9\n\n  7 is"):
        messages = [TURNS[0], {"role": "assistant", "content": content}]
        ids, ((start, end),) = encoded(tokenizer, messages)
        prompt, answer = ids[:start], [id for id in ids[start:end] if id not in tokenizer.stop_ids]
        assert prompt == tokenizer.prompt_ids(messages[:1])
        assert tokenizer.answer_text(prompt, answer).rstrip(" ") == content
        pieces = without_lead(whole_characters(tokenizer, answer, prompt), tokenizer.answer_lead)
        assert "".join(pieces).rstrip(" ") == content


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_later_ids_keeps_its_first_space(kind: str) -> None:
    tokenizer = load("chatml", kind)
    text = "The number 3 is after 2. 数字"
    (ids,) = tokenizer.encode([text])
    for i in range(1, len(ids)):
        before = tokenizer.decode(ids[:i])
        if "\ufffd" not in before:
            assert before + tokenizer.decode(ids[i:], after=ids[:i]) == tokenizer.decode(ids)
            assert before + "".join(whole_characters(tokenizer, ids[i:], ids[:i])) == tokenizer.decode(ids)


def test_a_lead_comes_off_once_and_in_pieces() -> None:
    assert list(without_lead(["\n", "\n\n", "a", "\n\nb"], "\n\n")) == ["\n", "a", "\n\nb"]
    assert list(without_lead(["", " a", " b"], " ")) == ["a", " b"]
    assert list(without_lead(["a"], " ")) == ["a"]


def test_rows_with_tools_use_the_template_for_tools(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": QWEN3}]
    tokenizer = Tokenizer.load(write_family(tmp_path, "chatml", "bytes", chat_template=templates))
    assert answers(tokenizer, WITH_TOOLS, TOOLS)[1] == "<think>\n\n</think>\n\nIt is 9.<|im_end|>\n"
    assert answers(tokenizer, TURNS)[1] == "9\n\n  数字<|im_end|>\n"


def test_templates_in_files_of_their_own(tmp_path: Path) -> None:
    write_family(tmp_path, "chatml", "bytes", chat_template="{{ 1 }}")
    (tmp_path / "chat_template.jinja").write_text(CHATML, "utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(QWEN3, "utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert answers(tokenizer, WITH_TOOLS, TOOLS)[1] == "<think>\n\n</think>\n\nIt is 9.<|im_end|>\n"
    assert answers(tokenizer, TURNS)[1] == "9\n\n  数字<|im_end|>\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "T5TokenizerFast"}, "tokenizer_class T5Tokenizer is not supported, because"),
        ({"split_special_tokens": True}, "split_special_tokens in tokenizer_config.json is not supported; remove it"),
    ],
)
def test_what_transformers_would_read_in_another_way_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer.load(write_family(tmp_path, "chatml", "bytes", **settings))


def test_no_text_becomes_a_control_token_by_its_normal_form() -> None:
    tokenizer = load("thinking", "unigram")  # normalizes by NFKC, which makes ASCII of full-width letters
    think = next(id for id in range(tokenizer.vocab_size) if tokenizer.decode([id]) == "<think>")
    for written in ("＜think＞", "<think>", "a"):
        ids, spans = encoded(tokenizer, [{"role": "user", "content": written}, TURNS[1]])
        assert (ids.count(think), len(spans)) == (1, 1)  # the one that the template writes
        assert spans[0][0] == len(tokenizer.prompt_ids([{"role": "user", "content": written}]))


# Random conversations

SPELLED = [
    "<|im_end|>",
    "</s>",
    "[INST]",
    "<think>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<s>",
    "\ufdd0",
    "\ufdd3",
]
TEXT = st.lists(
    st.one_of(st.text(max_size=4), st.sampled_from(["\n", " ", "  ", "\n\n", "▁", "数字", "hello", *SPELLED])),
    max_size=6,
).map("".join).filter(str.strip)  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": role, "content": draw(TEXT)} for role in ("user", "assistant")]
    return messages


def expected_answers(family: str, messages: Messages) -> list[str]:
    given = [m["content"] for m in messages if m["role"] == "assistant"]
    space = " " if family in ("llama2", "mistral", "mistral-text") else ""
    if family in ("llama3", "llama2", "mistral", "mistral-text", "gemma"):
        given = [text.strip() for text in given]
    if family in ("qwen3", "thinking"):
        given[-1] = "<think>\n\n</think>\n\n" + given[-1]
    return [space + text + FAMILIES[family][1] for text in given]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(messages=conversations())
def test_spans_of_any_conversation(family: str, messages: Messages) -> None:
    tokenizer = load(family)
    messages = [m for m in messages if m["role"] != "system" or family != "gemma"]
    ids, spans = encoded(tokenizer, messages)
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == expected_answers(family, messages)
    stops = [id for id in ids if id in tokenizer.stop_ids]
    plain = [{**m, "content": "a"} for m in messages]
    assert stops == [id for id in encoded(tokenizer, plain)[0] if id in tokenizer.stop_ids]
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    if not family.startswith("mistral"):
        assert ids[: spans[0][0]] == tokenizer.prompt_ids(messages[:first])
