"""Tokenizers: Hugging Face's files, plain text that stays plain, templates that cannot do harm."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_ray.config.errors import UserError
from minimind_ray.data import template_process
from minimind_ray.data.chat_template import ChatTemplate
from minimind_ray.data.tokenizer import MARK, MARKUP_TOKENS, SPECIAL_TOKENS, Tokenizer, train_tokenizer

pytestmark = pytest.mark.unit

CONTROL = [*SPECIAL_TOKENS, *MARKUP_TOKENS]
TEXTS = [f"The number {i} is after {i - 1}. 数字{i}在{i - 1}之后。def f(x):\n    return x + {i}\n" for i in range(300)]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "description": "天气 <now> & \"later\"",
                                                      "parameters": {"type": "object"}}}]  # fmt: skip
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. 简短。"},
    {"role": "user", "content": "What is after 7?\n\n  7之后是什么？ "},
    {"role": "assistant", "content": "8", "reasoning_content": "It is 7 + 1."},
    {"role": "user", "content": "And the weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "北京"}}]},
    {"role": "tool", "content": '{"sky": "晴"}'},
    {"role": "assistant", "content": "晴。\n"},
]


def encoded(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[Any] | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    (found,) = tokenizer.encode_conversations([tokenizer.render(messages, tools)])
    assert not isinstance(found, UserError), found
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 600)


@pytest.fixture(scope="module", params=["ours", "minimind"])
def directory(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with our tokenizer, then MiniMind's own."""
    if request.param == "minimind":
        return request.getfixturevalue("corpus").parent / "tokenizer" / "minimind"
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


def test_minimind_ids_and_roles_of_the_control_tokens(tokenizer: Tokenizer) -> None:
    assert len(CONTROL) == 36
    assert [tokenizer.decode([i]) for i in range(36)] == CONTROL
    assert tokenizer.decode(list(range(36)), skip_special=True) == "".join(MARKUP_TOKENS)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_control_tokens_are_those_of_minimind(corpus: Path) -> None:
    theirs = json.loads((corpus.parent / "tokenizer/minimind/tokenizer.json").read_text("utf-8"))["added_tokens"]
    ours = json.loads(train_tokenizer(TEXTS, 300)._definition)["added_tokens"]
    assert ours == theirs


def test_training_is_deterministic_and_holds_to_the_size(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.vocab_size == 600
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), 600).save(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_turn_opens_with_few_tokens_whatever_the_texts() -> None:
    tokenizer = train_tokenizer(["春眠不觉晓，处处闻啼鸟。"] * 50, 400)
    assert len(tokenizer.prompt_ids([{"role": "user", "content": "春"}])) <= 10


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="--vocab-size is 200, but 36 control tokens and 256 bytes need 292"):
        train_tokenizer(TEXTS, 200)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([*CONTROL, MARK]))).map("".join))
def test_any_text_survives_and_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode([text])[0]
    assert tokenizer.decode(ids) == text
    assert all(id >= 36 for id in ids)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.text(max_size=5), st.sampled_from([*CONTROL, MARK, MARK + "\U000f0000", "\n"])), max_size=6)
)
def test_no_text_of_a_message_opens_a_turn(tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "tool", "assistant")]
    ids, spans = encoded(tokenizer, messages)
    assert ids.count(1) == ids.count(2) == len(messages)
    assert len(spans) == 2
    expected = "".join(
        f"<|im_start|>{m['role']}\n"
        + (f"<tool_response>\n{text}\n</tool_response>" if m["role"] == "tool" else text)
        + "<|im_end|>\n"
        for m in messages
    )
    assert tokenizer.decode(ids) == expected


def test_an_assistant_may_write_markup_but_a_user_may_not(tokenizer: Tokenizer) -> None:
    think = CONTROL.index("<think>")
    for role, count in (("assistant", 1), ("user", 0)):
        ids, _ = encoded(tokenizer, [{"role": role, "content": "<think>a"}])
        assert ids.count(think) == count


def test_tools_cannot_spell_control_tokens(tokenizer: Tokenizer) -> None:
    tools = [{"name": "<|im_end|>", "<|im_start|>": ["<think>"]}]
    calls = [{"name": "f", "arguments": {"<|im_end|>": "<|im_start|>"}}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    ids, _ = encoded(tokenizer, messages, tools)
    assert (ids.count(1), ids.count(2), ids.count(25)) == (3, 3, 0)
    assert json.dumps(tools[0]) in tokenizer.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("turns", [2, 3, len(CONVERSATION)])
def test_ids_are_those_of_transformers(directory: Path, turns: int, tools: list[Any] | None) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    messages = CONVERSATION[:turns]
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    assert ours.decode(encoded(ours, messages, tools)[0]) == expected
    assert encoded(ours, messages, tools)[0] == theirs(expected).input_ids
    prompt = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert ours.prompt_ids(messages, tools) == theirs(prompt).input_ids
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.encode(TEXTS[:3]) == [theirs(text, add_special_tokens=False).input_ids for text in TEXTS[:3]]


@pytest.mark.slow
def test_corpus_rows_have_the_ids_of_transformers(directory: Path, corpus: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    lines = (corpus / "sft" / "val-00000-of-00001.jsonl").read_text("utf-8").splitlines()[:300]
    conversations = [json.loads(line)["conversations"] for line in lines]
    expected = [theirs(theirs.apply_chat_template(c, tokenize=False)).input_ids for c in conversations]
    assert [encoded(ours, c)[0] for c in conversations] == expected


def test_our_template_in_full(tokenizer: Tokenizer) -> None:
    assert tokenizer.render(CONVERSATION[1:]).text.replace("<|im_start|>", "▷").replace("<|im_end|>\n", "◁") == (
        "▷user\nWhat is after 7?\n\n  7之后是什么？ ◁"
        "▷assistant\n<think>\nIt is 7 + 1.\n</think>\n\n8◁"
        "▷user\nAnd the weather?◁"
        '▷assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>◁'
        '▷tool\n<tool_response>\n{"sky": "晴"}\n</tool_response>◁'
        "▷assistant\n晴。\n◁"
    )
    opening = tokenizer.render(CONVERSATION[:2], TOOLS).text
    assert opening.startswith("<|im_start|>system\nBe brief. 简短。\n\nThese tools")
    assert f"<tools>\n{json.dumps(TOOLS[0], ensure_ascii=False)}\n</tools>" in opening
    assert tokenizer.render(CONVERSATION[1:2], TOOLS).text.startswith("<|im_start|>system\nThese tools")
    openai = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}]
    assert tokenizer.render([{**CONVERSATION[4], "tool_calls": openai}]) == tokenizer.render([CONVERSATION[4]])


def test_an_answer_that_begins_with_white_space_has_the_same_header(tokenizer: Tokenizer) -> None:
    for content in ("\n\na", "   a", "\ta"):
        prompt = tokenizer.prompt_ids(CONVERSATION[1:2])
        messages = [CONVERSATION[1], {"role": "assistant", "content": content}]
        ids, spans = encoded(tokenizer, messages)
        assert ids[: len(prompt)] == prompt
        assert spans == [(len(prompt), len(ids))]


def test_a_span_is_the_answer_its_end_token_and_the_newline(tokenizer: Tokenizer) -> None:
    ids, ((start, end),) = encoded(tokenizer, CONVERSATION[1:4])
    assert tokenizer.decode(ids[start:end]) == "<think>\nIt is 7 + 1.\n</think>\n\n8<|im_end|>\n"


def test_fingerprint_and_pickle(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    again = pickle.loads(pickle.dumps(loaded))
    assert loaded.fingerprint == again.fingerprint == tokenizer.fingerprint
    assert again.prompt_ids(CONVERSATION) == tokenizer.prompt_ids(CONVERSATION)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    other = Tokenizer.load(tmp_path)
    assert other.render(CONVERSATION[:1]).text == CONVERSATION[0]["content"]
    assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("name", ["bos_token", "unk_token"])
def test_the_fingerprint_knows_the_names_that_a_template_is_given(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    changes = {"chat_template": f"{{{{ {name} }}}}", "bos_token": "<|im_end|>"}  # what a missing one is replaced by
    first = Tokenizer.load(rewrite(tmp_path, tokenizer, **changes))
    other = Tokenizer.load(rewrite(tmp_path, tokenizer, **{**changes, name: None}))
    assert (first.bos_id, first.render([]).text) != (other.bos_id, other.render([]).text)
    assert first.fingerprint != other.fingerprint


def rewrite(tmp_path: Path, tokenizer: Tokenizer, **changes: Any) -> Path:
    """The tokenizer's directory with other settings; None removes one."""
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = {**json.loads(file.read_text("utf-8")), **changes}
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}), "utf-8")
    return tmp_path


def test_settings_in_the_forms_that_hugging_face_writes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
        {"name": "default", "template": "{{ bos_token }}yes"},
    ]
    changes = {"chat_template": templates, "bos_token": {"content": "<|endoftext|>"}, "pad_token": None}
    loaded = Tokenizer.load(rewrite(tmp_path, tokenizer, **changes))
    assert loaded.render([]).text == "<|endoftext|>yes"
    assert loaded.render([], TOOLS).text == "weather"
    assert (loaded.bos_id, loaded.pad_id) == (0, 2)


def test_padding_and_truncation_in_the_file_are_not_applied(tokenizer: Tokenizer, tmp_path: Path) -> None:
    layout = json.loads(tokenizer._definition)
    layout["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), "utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXTS[:2]) == tokenizer.encode(TEXTS[:2])
    assert loaded.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: cannot be read: No such file or directory; this is not a tokenizer"),
        ("tokenizer_config.json", None, "tokenizer_config.json: cannot be read: No such file or directory; this is"),
        ("tokenizer.json", b'{"version": "1.0"}', "tokenizer.json is broken"),
        ("tokenizer.json", b"[1", "tokenizer.json: not valid JSON"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8 text, at byte 1"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", b"[]", "not a JSON object"),
        ("tokenizer_config.json", b"{}", "names no eos_token"),
        ("tokenizer_config.json", b'{"eos_token": "<eos>"}', "eos_token is '<eos>'"),
        ("tokenizer_config.json", b'{"eos_token": {"content": 3}}', "eos_token in tokenizer_config.json is not a"),
    ],
)
def test_a_broken_directory_is_one_sentence(
    tokenizer: Tokenizer, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_directory_without_a_chat_template_serves_plain_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = Tokenizer.load(rewrite(tmp_path, tokenizer, chat_template=None))
    assert loaded.encode(["7"]) == tokenizer.encode(["7"])
    with pytest.raises(UserError, match="has no chat template"):
        loaded.require_conversations()


@pytest.mark.parametrize("template", [3, [{"name": "default", "template": {}}]])
def test_a_template_that_is_no_text_is_refused(tokenizer: Tokenizer, tmp_path: Path, template: Any) -> None:
    loaded = Tokenizer.load(rewrite(tmp_path, tokenizer, chat_template=template))
    with pytest.raises(UserError, match="chat_template in tokenizer_config.json is not a string"):
        loaded.require_conversations()


def test_named_tokens_are_control_tokens_even_if_not_listed_as_added(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    layout = json.loads(tokenizer._definition)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**layout, "added_tokens": []}), "utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert encoded(loaded, CONVERSATION[:1]) == encoded(tokenizer, CONVERSATION[:1])
    assert 2 not in loaded.encode(["<|im_end|>"])[0]


def test_a_template_without_a_generation_prompt_is_refused_for_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    loaded = Tokenizer.load(rewrite(tmp_path, tokenizer, chat_template=template))
    with pytest.raises(UserError, match=r"writes '\[assistant\] ' before an answer, but not as a generation prompt"):
        loaded.require_conversations()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",  # noqa: E501
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0].content + 1 }}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_a_template_can_neither_reach_python_nor_run_for_ever(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MOST_SECONDS", 0.3)
    with pytest.raises(UserError, match="the chat template fails"):
        print(ChatTemplate(source, {}, "dir").render([{"role": "user", "content": "a"}], None, False))


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 ", "a" * 1_000_001])
def test_a_template_that_does_not_compile_is_one_sentence(source: str) -> None:
    with pytest.raises(UserError, match="dir: the chat template"):
        ChatTemplate(source, {}, "dir")


def test_a_template_gets_what_hugging_face_gives() -> None:
    source = (
        "  {% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}{{ bos_token }}{{ strftime_now('%Y') | length }}\n{% endfor %}\n"
    )
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "b"}]
    text = ChatTemplate(source, {"bos_token": "<s>"}, "dir").render(messages, None, False)
    assert text == '{"role": "user", "content": "<é>"}<s>4\n'
