"""What each stage learns from a row, and what is wrong with the rows it cannot use."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import DataConfig
from minimind_ray.config.stages import StageName
from minimind_ray.data.encode import RowEncoder, Tally, length_for_most, remarks
from minimind_ray.data.pack import Document, Group
from minimind_ray.data.records import Reject, Row
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.unit

CONFIG = DataConfig(max_seq_len=64, pack_tokens=256)
USER, ANSWER = {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"What is {i} + 1? It is {i + 1}. 是{i + 1}。" for i in range(200)], 500)


def encode(
    tokenizer: Tokenizer, stage: StageName, *values: dict[str, Any], config: DataConfig = CONFIG
) -> tuple[list[Group | Reject], Tally]:
    encoder = RowEncoder(stage, tokenizer, config)
    rows = [Row("file.jsonl", i, value) for i, value in enumerate(values, 1)]
    return list(encoder.encode(rows)), encoder.tally


def documents(outcomes: list[Group | Reject]) -> list[Document]:
    assert not any(isinstance(outcome, Reject) for outcome in outcomes)
    return [document for group in outcomes if not isinstance(group, Reject) for document in group]


def answers(tokenizer: Tokenizer, document: Document) -> list[str]:
    """The texts that carry loss, one for each run of tokens."""
    marks = np.flatnonzero(np.diff(document.weights, prepend=0, append=0) % 2)
    return [tokenizer.decode(document.tokens[a:b].tolist()) for a, b in zip(marks[::2], marks[1::2])]


# Pretraining


def test_a_text_has_a_start_and_an_end_and_all_but_the_start_is_predicted(tokenizer: Tokenizer) -> None:
    (document,) = documents(encode(tokenizer, "pretrain", {"text": "It is <|im_end|> 2."})[0])
    assert (document.tokens.dtype, document.weights.dtype) == (np.int32, np.uint8)
    assert document.tokens.tolist() == [1, *tokenizer.encode(["It is <|im_end|> 2."])[0], 2]
    assert document.tokens.tolist().count(2) == 1
    assert document.weights.tolist() == [0] + [1] * (len(document.tokens) - 1)


@pytest.mark.slow
@settings(deadline=None)
@given(st.text(min_size=1, max_size=80).filter(lambda t: not t.isspace()), st.integers(2, 12))
def test_a_split_text_predicts_each_token_once_after_the_one_before_it(
    tokenizer: Tokenizer, text: str, longest: int
) -> None:
    whole = [1, *tokenizer.encode([text])[0], 2]
    config = DataConfig(max_seq_len=longest, pack_tokens=64)
    outcomes, tally = encode(tokenizer, "pretrain", {"text": text}, config=config)
    parts = documents(outcomes)
    assert all(2 <= len(d.tokens) <= longest for d in parts)
    predicted = [(int(d.tokens[i - 1]), int(d.tokens[i])) for d in parts for i in range(len(d.tokens)) if d.weights[i]]
    assert predicted == list(zip(whole, whole[1:]))
    assert tally == Tally(kept=1, split=int(len(whole) > longest))


def test_a_truncated_text_is_counted(tokenizer: Tokenizer) -> None:
    config = DataConfig(max_seq_len=5, pack_tokens=64, long_documents="truncate")
    outcomes, tally = encode(tokenizer, "pretrain", {"text": "What is 1 + 1? It is 2."}, {"text": "2"}, config=config)
    whole = [1, *tokenizer.encode(["What is 1 + 1? It is 2."])[0], 2]
    first, second = documents(outcomes)
    assert first.tokens.tolist() == whole[:5]
    assert second.tokens.tolist() == [1, *tokenizer.encode(["2"])[0], 2]
    assert tally == Tally(kept=2, cut=1, cut_tokens=len(whole) - 5)


def test_order_is_kept_and_rejects_pass_through(tokenizer: Tokenizer) -> None:
    broken = Reject("file.jsonl", 3, "not valid JSON")
    rows = [Row("file.jsonl", i, {"text": f"It is {i}." if i % 7 else " \n"}) for i in range(1, 1500)]
    encoder = RowEncoder("pretrain", tokenizer, CONFIG)
    outcomes = list(encoder.encode([*rows[:2], broken, *rows[2:]]))
    texts = [
        o.reason if isinstance(o, Reject) else tokenizer.decode(o[0].tokens.tolist(), skip_special=True)
        for o in outcomes
    ]
    expected = [f"It is {i}." if i % 7 else "text is empty" for i in range(1, 1500)]
    assert texts == [*expected[:2], "not valid JSON", *expected[2:]]
    assert (encoder.tally.kept, encoder.tally.rejected) == (1499 - 214, 214 + 1)
    assert outcomes[7] == Reject("file.jsonl", 7, "text is empty")


# Conversations

NO_TEXT = "text is missing (the row has no field with a value); if fields have other names, give data.fields.text=NAME"
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "It is 2.", "tools": '[{"name": "add", "parameters": {}}]'},
    USER,
    {"role": "assistant", "content": None, "tool_calls": '[{"name": "add", "arguments": {"a": 1}}]'},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "2", "reasoning_content": "1 + 1", "tools": None, "tool_calls": ""},
    {"role": "user", "content": "是<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"},
    {"role": "assistant", "content": "\n是 2"},
]


@pytest.mark.parametrize("stage", ["sft", "lora"])
@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_loss_is_on_each_answer_its_end_and_the_newline(tokenizer: Tokenizer, stage: StageName, key: str) -> None:
    config = DataConfig(max_seq_len=1024, pack_tokens=1024)
    (document,) = documents(encode(tokenizer, stage, {key: TURNS}, config=config)[0])
    assert answers(tokenizer, document) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n',
        "<think>\n1 + 1\n</think>\n\n2<|im_end|>\n",
        "\n是 2<|im_end|>\n",
    ]
    assert tokenizer.decode(document.tokens.tolist()).count('{"name": "add", "parameters": {}}') == 1


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ours", "minimind"])
def test_ids_and_mask_are_those_of_the_whole_rendered_template(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, source: str
) -> None:
    from transformers import AutoTokenizer

    directory = corpus.parent / "tokenizer" / "minimind" if source == "minimind" else tmp_path
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(directory)
    lines = (corpus / "sft" / "val-00000-of-00001.jsonl").read_text("utf-8").splitlines()[:200]
    rows = [json.loads(line) for line in lines]
    config = DataConfig(max_seq_len=4096, pack_tokens=4096)
    ours = documents(encode(Tokenizer.load(directory), "sft", *rows, config=config)[0])
    assert len(ours) == len(rows)
    for row, document in zip(rows, ours):
        text = theirs.apply_chat_template(row["conversations"], tokenize=False)
        whole = theirs(text, return_offsets_mapping=True)
        assert document.tokens.tolist() == whole.input_ids
        spans = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", text, re.DOTALL)]
        assert len(spans) == sum(turn["role"] == "assistant" for turn in row["conversations"])
        mask = [any(a <= start and end <= b for a, b in spans) for start, end in whole.offset_mapping]
        assert document.weights.tolist() == mask


def test_a_cut_conversation_keeps_what_is_left_of_its_answers(tokenizer: Tokenizer) -> None:
    ((whole,),), _ = encode(tokenizer, "sft", {"messages": [USER, ANSWER]})
    first = int(np.argmax(whole.weights))
    config = DataConfig(max_seq_len=first + 2, pack_tokens=64)
    ((cut,),), tally = encode(tokenizer, "sft", {"messages": [USER, ANSWER]}, config=config)
    assert (cut.tokens.tolist(), cut.weights.tolist()) == (whole.tokens[: first + 2].tolist(), [0] * first + [1] * 2)
    assert tally == Tally(kept=1, cut=1, cut_tokens=len(whole.tokens) - first - 2)


@pytest.mark.parametrize("policy", ["drop", "cut_prompt", "refuse"])
def test_a_conversation_that_keeps_nothing_of_its_answer(tokenizer: Tokenizer, policy: str) -> None:
    value = {"messages": [USER, ANSWER]}
    ((whole,),), _ = encode(tokenizer, "sft", value)
    first = int(np.argmax(whole.weights))
    config = DataConfig.model_validate({"max_seq_len": first, "pack_tokens": 64, "long_conversations": policy})
    outcomes, tally = encode(tokenizer, "sft", value, config=config)
    if policy == "refuse":
        reason = f"the answer begins at token {first}, but only {first} tokens are kept"
        assert outcomes == [Reject("file.jsonl", 1, reason)]
        assert tally == Tally(rejected=1)
    else:  # Its question is too short for a beginning to be cut.
        assert outcomes == []
        assert tally == Tally(too_long=Counter({64: 1}))


TALK = [{"role": "system", "content": "It is."}] + [
    {"role": role, "content": f"{words} {i} + 1" * 3}
    for i in range(4)
    for role, words in (("user", "What is"), ("assistant", "It is"))
]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_oldest_turns_go_first_and_the_system_turn_stays(tokenizer: Tokenizer, kept: int) -> None:
    expected = [TALK[0], *TALK[-2 * kept :]]
    roomy = DataConfig(max_seq_len=2048, pack_tokens=2048)
    ((shorter,),), _ = encode(tokenizer, "sft", {"messages": expected}, config=roomy)
    config = DataConfig(max_seq_len=len(shorter.tokens) + 1, pack_tokens=2048, long_conversations="cut_prompt")
    ((document,),), tally = encode(tokenizer, "sft", {"messages": TALK}, config=config)
    assert document.tokens.tolist() == shorter.tokens.tolist()
    assert document.weights.tolist() == shorter.weights.tolist()
    assert tally == Tally(kept=1, shortened=1)


def test_then_the_beginning_of_the_question_goes(tokenizer: Tokenizer) -> None:
    question = " ".join(f"是 {i} + 1" for i in range(60))
    config = DataConfig(max_seq_len=80, pack_tokens=200, long_conversations="cut_prompt")
    talk = [USER, ANSWER, {"role": "user", "content": question}, ANSWER]
    ((document,),), tally = encode(tokenizer, "sft", {"messages": talk}, config=config)
    assert 75 <= len(document.tokens) <= 80
    assert answers(tokenizer, document) == ["It is 2.<|im_end|>\n"]
    asked = tokenizer.decode(document.tokens.tolist()).split("user\n")[1].split("<|im_end|>")[0]
    assert len(asked) > 20 and question.endswith(asked) and "\ufffd" not in asked
    assert tally == Tally(kept=1, shortened=1)

    pair = {"chosen": talk, "rejected": [*talk[:-1], {**ANSWER, "content": "It is 3."}]}
    config = DataConfig(max_seq_len=100, pack_tokens=160, long_conversations="cut_prompt")
    ((chosen, rejected),), tally = encode(tokenizer, "dpo", pair, config=config)
    assert answers(tokenizer, chosen) == ["It is 2.<|im_end|>\n"]
    assert answers(tokenizer, rejected) == ["It is 3.<|im_end|>\n"]
    start = int(np.argmax(chosen.weights))
    assert chosen.tokens[:start].tolist() == rejected.tokens[:start].tolist()
    assert 75 <= max(len(chosen.tokens), len(rejected.tokens)) <= 80


def test_an_answer_longer_than_the_limit_keeps_its_beginning_and_the_end_of_the_question(tokenizer: Tokenizer) -> None:
    talk = [{"role": "user", "content": "What is " * 50 + "7?"}, {"role": "assistant", "content": "It is 7. " * 50}]
    config = DataConfig(max_seq_len=64, pack_tokens=64, long_conversations="cut_prompt")
    ((document,),), tally = encode(tokenizer, "sft", {"messages": talk}, config=config)
    text = tokenizer.decode(document.tokens.tolist())
    assert "What is 7?<|im_end|>" in text and "It is 7. It is 7." in text
    assert (len(document.tokens), tally.cut, tally.shortened) == (64, 1, 1)


def test_a_row_that_cannot_be_shortened_is_cut_as_others_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = DataConfig(max_seq_len=64, pack_tokens=200, long_conversations="cut_prompt")
    silent = {"messages": [USER, ANSWER, {"role": "user", "content": "What is " * 90}, {**ANSWER, "weight": 0}]}
    one_sided = {
        "chosen": [{"role": "system", "content": "2"}, ANSWER, {"role": "user", "content": "1 " * 90}, ANSWER],
        "rejected": [{"role": "system", "content": "2"}, {**ANSWER, "content": "It is 3. " * 40}],
    }
    for stage, row in (("sft", silent), ("dpo", one_sided)):
        (group,), tally = encode(tokenizer, stage, row, config=config)
        assert isinstance(group, tuple) and (tally.kept, tally.shortened) == (1, 0)
    tokenizer.save(tmp_path)
    template = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    check = "{% if messages[0].content == '3' %}{{ raise_exception('no') }}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(check + template, "utf-8")
    talk = [USER, {**ANSWER, "content": "It is 2. " * 20}, {"role": "user", "content": "3"}, ANSWER]
    (group,), tally = encode(Tokenizer.load(tmp_path), "sft", {"messages": talk}, config=config)
    assert isinstance(group, tuple) and (tally.kept, tally.cut, tally.shortened) == (1, 1, 0)


def test_many_turns_are_shortened_in_good_time(tokenizer: Tokenizer) -> None:
    config = DataConfig(max_seq_len=128, pack_tokens=200, long_conversations="cut_prompt")
    ((document,),), _ = encode(tokenizer, "sft", {"messages": [USER, ANSWER] * 300}, config=config)
    exchange = len(encode(tokenizer, "sft", {"messages": [USER, ANSWER]})[0][0][0].tokens)
    assert len(document.tokens) == 128 // exchange * exchange


def test_the_length_that_keeps_99_percent() -> None:
    too_long = Counter({128: 1, 192: 1, 1024: 1})
    assert length_for_most(197, too_long) == 128
    assert length_for_most(96, too_long + Counter({64: 1})) == 192
    assert length_for_most(0, too_long) == 1024
    assert length_for_most(299, Counter({128: 3})) is None
    (line,) = remarks("sft", CONFIG, 197, 0, too_long, Counter())
    assert line == (
        "3 of 200 rows left out: too long for data.max_seq_len 64, so that no answer is kept; data.max_seq_len 128 "
        "would keep 99 % of the rows; data.long_conversations=cut_prompt shortens them instead"
    )
    small = DataConfig(max_seq_len=64, pack_tokens=100, long_conversations="cut_prompt")
    (line,) = remarks("dpo", small, 197, 0, too_long, Counter())
    assert line == (
        "3 of 200 rows left out: too long for half of data.pack_tokens 100, which a pair's answers share, so that no "
        "answer is kept; data.max_seq_len 128 with data.pack_tokens 256 would keep 99 % of the rows"
    )
    assert remarks("sft", CONFIG, 9, 1, Counter(), Counter({f"f{i:02}": 1 for i in range(12)})) == [
        "1 row shortened to fit: cut the oldest turns or the beginning of the question",
        f"ignored fields: {', '.join(f'f{i:02} (1 row)' for i in range(10))} and 2 more",
    ]
    assert remarks("sft", CONFIG, 9, 0, Counter(), Counter({"difficulty": 4000, "a": 1})) == [
        "ignored fields: difficulty (4,000 rows), a (1 row)"
    ]


def test_tools_of_a_row_are_those_of_its_system_turn(tokenizer: Tokenizer) -> None:
    config = DataConfig(max_seq_len=1024, pack_tokens=1024)
    tools = [{"name": "add"}]
    on_row = {"messages": [USER, ANSWER], "tools": tools}
    on_turn = {"messages": [{"role": "system", "content": "", "tools": json.dumps(tools)}, USER, ANSWER]}
    first, second = documents(encode(tokenizer, "sft", on_row, on_turn, config=config)[0])
    assert first.tokens.tolist() == second.tokens.tolist()


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "conversations is missing (the row has no field with a value); if fields have other names, give"),
        ({"question": "a"}, "conversations is missing (the row has question); if fields have other names, give"),
        ({"text": "a"}, "conversations is missing, but text is there, which pretrain would read"),
        ({"chosen": [USER]}, "conversations is missing, but chosen is there, which dpo would read"),
        ({"messages": None}, "conversations is missing (the row has no field with a value)"),
        ({"conversations": "[]"}, "conversations is empty"),
        ({"conversations": "hello"}, "conversations is a string but not JSON"),
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": [USER, "a"]}, "conversations[1] is a string, not an object"),
        ({"conversations": [USER]}, "the conversation has no assistant turn"),
        ({"conversations": [{"content": "a"}]}, "conversations[0].role is null; known roles are system, user"),
        (
            {"conversations": [{"role": "narrator", "content": "a"}]},
            'conversations[0].role is "narrator"; known roles are',
        ),
        ({"conversations": [{"role": ["user"], "content": "a"}]}, 'conversations[0].role is ["user"]; known roles are'),
        ({"conversations": [{"role": "user"}]}, "conversations[0].content is missing"),
        ({"conversations": [{"role": "user", "content": None}]}, "conversations[0].content is missing"),
        ({"conversations": [{"role": "user", "content": " "}]}, "conversations[0].content is empty"),
        ({"conversations": [{"role": "user", "content": True}]}, "conversations[0].content is true or false, not a"),
        (
            {"conversations": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            'conversations[0].content[0] is of type "image_url"; only text can be read',
        ),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content is empty"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": 1}]}, "messages[1].reasoning_content is a number, not"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "{"}]}, "messages[1].tool_calls is a string but not JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "{}"}]}, "messages[1].tool_calls is an object, not a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "messages[1].tool_calls[0] is a number, not an object"),
        ({"messages": [USER, call()]}, "messages[1].tool_calls[0].name is missing"),
        ({"messages": [USER, call(name=1)]}, "messages[1].tool_calls[0].name is a number, not a string"),
        ({"messages": [USER, call(name="add")]}, "messages[1].tool_calls[0].arguments is missing"),
        ({"messages": [{**USER, "tools": [{}]}, ANSWER]}, "messages[0].tools: only one system turn can have tools"),
        ({"messages": [USER, ANSWER], "tools": 3}, "tools is a number, not a list"),
        ({"messages": [USER, ANSWER], "tools": '["\\ud800"]'}, "tools[0] is a string, not an object"),
        ({"messages": [USER, ANSWER], "tools": '[{"a": "\\ud800"}]'}, "the text holds half a surrogate pair"),
        ({"messages": [USER, ANSWER], "tools": '[{"a": ' + "[" * 5000 + "]" * 5000 + "}]"}, "objects are nested too"),
        ({"messages": [USER, ANSWER], "tools": "[" * 100_000}, "objects are nested too deeply"),
    ],
)
def test_a_bad_conversation_names_the_field(tokenizer: Tokenizer, value: dict[str, Any], reason: str) -> None:
    (outcome, after), tally = encode(tokenizer, "sft", value, {"messages": [USER, ANSWER]})
    assert isinstance(outcome, Reject)
    assert outcome.reason.startswith(reason)
    assert isinstance(after, tuple)
    assert tally == Tally(kept=1, rejected=1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"messages": []}, "text is missing, but messages is there, which sft and lora would read"),
        ({"text": None}, NO_TEXT),
        ({"text": 3.5}, "text is a number, not a string"),
        ({"text": ["a"]}, "text is a list, not a string"),
        ({"text": ""}, "text is empty"),
        ({"text": "\ud800"}, "the text holds half a surrogate pair, which is not a character"),
    ],
)
def test_a_bad_text_names_the_field(tokenizer: Tokenizer, value: dict[str, Any], reason: str) -> None:
    assert encode(tokenizer, "pretrain", value)[0] == [Reject("file.jsonl", 1, reason)]


def test_a_template_that_refuses_a_conversation_rejects_only_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    check = "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
    template = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    (tmp_path / "chat_template.jinja").write_text(check + template, "utf-8")
    rows = [{"messages": [USER, ANSWER] * n} for n in (2, 1)]
    (refused, kept), _ = encode(Tokenizer.load(tmp_path), "sft", *rows)
    assert isinstance(refused, Reject)
    assert refused.reason.endswith("too many turns")
    assert isinstance(kept, tuple)


def test_a_template_that_leaves_out_turns_is_no_use(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    template = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    (tmp_path / "chat_template.jinja").write_text("{% set messages = messages[-2:] %}" + template, "utf-8")
    (outcome,), _ = encode(Tokenizer.load(tmp_path), "sft", {"messages": [USER, ANSWER] * 2})
    assert isinstance(outcome, Reject)
    assert outcome.reason.startswith("the chat template does not write the content of turn 1 (user)")


def test_a_tokenizer_without_chatml_stops_the_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", "utf-8")
    with pytest.raises(UserError, match="the loss mask needs a chat template"):
        encode(Tokenizer.load(tmp_path), "sft", {"messages": [USER, ANSWER]})


# Pairs


def test_a_pair_is_one_group_with_loss_after_what_both_share(tokenizer: Tokenizer) -> None:
    shared = [USER, ANSWER, {"role": "user", "content": "What is 2 + 1?"}]
    value = {
        "chosen": [*shared, {"role": "assistant", "content": "3"}],
        "rejected": [*shared, {"role": "assistant", "content": "4"}, USER, {"role": "assistant", "content": "5"}],
    }
    config = DataConfig(max_seq_len=512, pack_tokens=1024)
    ((chosen, rejected),), _ = encode(tokenizer, "dpo", value, config=config)
    assert answers(tokenizer, chosen) == ["3<|im_end|>\n"]
    assert answers(tokenizer, rejected) == ["4<|im_end|>\n", "5<|im_end|>\n"]


def test_the_two_of_a_pair_have_half_a_pack_each(tokenizer: Tokenizer) -> None:
    value = {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "What is " * 60}]}
    config = DataConfig(max_seq_len=80, pack_tokens=100)
    ((chosen, rejected),), tally = encode(tokenizer, "dpo", value, config=config)
    assert len(chosen.tokens) < 50
    assert len(rejected.tokens) == 50
    assert (tally.kept, tally.cut) == (1, 1)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([USER, ANSWER], [USER, ANSWER], "chosen and rejected are the same"),
        ([USER, ANSWER], "a", "rejected has no turn before the answer"),
        ([ANSWER], [{**ANSWER, "content": "3"}], "chosen has no turn before the answer; give prompt"),
        ([USER, ANSWER], [USER], "rejected has no assistant turn"),
        ([USER, ANSWER, USER, ANSWER], [USER, ANSWER], "rejected has no answer after the turns that both share"),
        ([USER, ANSWER], [{**USER, "content": "a"}, ANSWER], "chosen and rejected answer different prompts"),
    ],
)  # fmt: skip
def test_a_bad_pair_says_why(tokenizer: Tokenizer, chosen: Any, rejected: Any, reason: str) -> None:
    (outcome,), _ = encode(tokenizer, "dpo", {"chosen": chosen, "rejected": rejected})
    assert isinstance(outcome, Reject)
    assert outcome.reason.startswith(reason)


def test_fields_that_nobody_reads_do_not_tell_turns_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def pair(key: str, answer: str) -> dict[str, Any]:
        return {"chosen": [{**USER, key: 1}, {**ANSWER, key: 2}], "rejected": [{**USER, key: 3}, {**ANSWER, key: 4,
                "content": answer}]}  # fmt: skip

    (kept, same), _ = encode(tokenizer, "dpo", pair("id", "3"), pair("id", str(ANSWER["content"])))
    assert isinstance(kept, tuple) and answers(tokenizer, kept[0]) == ["It is 2.<|im_end|>\n"]
    assert same == Reject("file.jsonl", 2, "chosen and rejected are the same")
    tokenizer.save(tmp_path)
    template = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].id }}" + template, "utf-8")
    (told_apart,), _ = encode(Tokenizer.load(tmp_path), "dpo", pair("id", "3"))
    assert told_apart == Reject("file.jsonl", 1, "chosen and rejected answer different prompts")


def test_a_pair_that_is_the_same_once_cut_is_no_pair(tokenizer: Tokenizer) -> None:
    long = "It is " * 60
    value = {"chosen": [USER, {**ANSWER, "content": long + "2"}], "rejected": [USER, {**ANSWER, "content": long + "3"}]}
    outcomes, tally = encode(tokenizer, "dpo", value)
    assert (outcomes, tally.left_out, tally.rejected) == ([], 1, 0)
    config = DataConfig(max_seq_len=64, pack_tokens=256, long_conversations="refuse")
    (outcome,), tally = encode(tokenizer, "dpo", value, config=config)
    assert outcome == Reject("file.jsonl", 1, "chosen and rejected are the same in the 64 tokens that are kept")
    assert tally == Tally(rejected=1)
