"""Each format gives the conversation or pair that MiniMind's own format gives; no field is dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import FIELD_NAMES, DataConfig, FormatName
from minimind_ray.config.stages import StageName
from minimind_ray.data.encode import RowEncoder
from minimind_ray.data.fields import BadRowError
from minimind_ray.data.formats import FORMATS, RowReader, question_of, recognise, texts_of
from minimind_ray.data.pack import Group
from minimind_ray.data.records import Reject, Row
from minimind_ray.data.tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.unit

Turns = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"What is {i} + 1? It is {i + 1}. 是{i + 1}。" for i in range(200)], 500)


def encode(
    tokenizer: Tokenizer, stage: StageName, *values: dict[str, Any], **data: Any
) -> tuple[list[Group | Reject], RowEncoder]:
    config = DataConfig.model_validate({"max_seq_len": 2048, "pack_tokens": 4096, **data})
    encoder = RowEncoder(stage, tokenizer, config)
    return list(encoder.encode(Row("f.jsonl", i, value) for i, value in enumerate(values, 1))), encoder


def same(tokenizer: Tokenizer, stage: StageName, value: dict[str, Any], own: dict[str, Any], **data: Any) -> None:
    """The row gives the ids and loss weights of `own`, a row in MiniMind's format."""
    ((expected,), _), ((given,), _) = encode(tokenizer, stage, own), encode(tokenizer, stage, value, **data)
    assert isinstance(expected, tuple), expected
    assert isinstance(given, tuple), given
    for one, other in zip(expected, given, strict=True):
        assert other.tokens.tolist() == one.tokens.tolist()
        assert other.weights.tolist() == one.weights.tolist()


def reason(tokenizer: Tokenizer, stage: StageName, value: dict[str, Any], **data: Any) -> str:
    ((outcome,), _) = encode(tokenizer, stage, value, **data)
    assert isinstance(outcome, Reject), "the row was accepted"
    return outcome.reason


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


Q, A, BAD = user("What is 1 + 1?"), assistant("It is 2."), assistant("It is 3.")
SYSTEM = {"role": "system", "content": "是"}
ADD = {"name": "add", "description": "a sum", "parameters": {"type": "object"}}
CALL = {"name": "add", "arguments": {"a": 1}}


# Conversations


@pytest.mark.parametrize(
    ("value", "own"),
    [
        ({"messages": [Q, A]}, [Q, A]),
        ({"messages": json.dumps([Q, A])}, [Q, A]),
        ({"messages": [{"role": "developer", "content": "是"}, Q, A]}, [SYSTEM, Q, A]),
        ({"system": "是", "messages": [Q, A]}, [SYSTEM, Q, A]),
        ({"system_prompt": "是", "conversations": [Q, A]}, [SYSTEM, Q, A]),
        ({"system": "是", "messages": [SYSTEM, Q, A]}, [SYSTEM, Q, A]),
        ({"system": None, "messages": [Q, A], "tools": [], "score": float("nan")}, [Q, A]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text":
          " 1 + 1?"}]}, {"role": "assistant", "content": [{"type": "text", "text": "It is 2."}]}]}, [Q, A]),
        ({"messages": [Q, {"role": "assistant", "content": [{"type": "thinking", "thinking": "是"}, {"type": "text",
          "text": "It is 2."}]}]}, [Q, assistant("It is 2.", reasoning_content="是")]),
        *[({"messages": [{**Q, name: None}, assistant("It is 2.", **{name: "是"})]},
           [Q, assistant("It is 2.", reasoning_content="是")])
          for name in ("thinking", "reasoning", "thought", "reasoning_content")],
        ({"conversations": [{"from": "human", "value": Q["content"]}, {"from": "gpt", "value": "It is 2."}]}, [Q, A]),
        ({"system": "是", "conversations": [{"from": "human", "value": Q["content"]},
          {"from": "gpt", "value": "It is 2."}]}, [SYSTEM, Q, A]),
        ({"messages": [{"from": "system", "value": "是"}, {"from": "user", "value": Q["content"]},
          {"from": "assistant", "value": "It is 2."}]}, [SYSTEM, Q, A]),
        ({"instruction": Q["content"], "input": "", "output": "It is 2."}, [Q, A]),
        ({"instruction": "What is", "input": "1 + 1?", "output": "It is 2."}, [user("What is\n1 + 1?"), A]),
        ({"instruction": Q["content"], "output": "It is 2.", "system": "是", "history": [["2?", "是2"]]},
         [SYSTEM, user("2?"), assistant("是2"), Q, A]),
        ({"instruction": Q["content"], "input": None, "output": "It is 2.", "text": "### rendered"}, [Q, A]),
        ({"prompt": Q["content"], "completion": "It is 2."}, [Q, A]),
        ({"prompt": [SYSTEM, Q], "completion": [A]}, [SYSTEM, Q, A]),
        ({"prompt": [SYSTEM, Q], "completion": A}, [SYSTEM, Q, A]),
        ({"prompt": Q["content"], "messages": [Q, A]}, [Q, A]),
        ({"prompt": [Q], "messages": [SYSTEM, Q, A]}, [SYSTEM, Q, A]),
        ({"prompt": '[1] + [2]? [{"a"', "completion": "3"}, [user('[1] + [2]? [{"a"'), assistant("3")]),
    ],
)  # fmt: skip
def test_a_conversation_in_another_format(tokenizer: Tokenizer, value: dict[str, Any], own: Turns) -> None:
    same(tokenizer, "sft", value, {"conversations": own})


def test_tools_and_calls_in_older_and_other_forms(tokenizer: Tokenizer) -> None:
    tools = [{"type": "function", "function": ADD}]
    call = assistant("Wait.", tool_calls=[{"type": "function", "function": CALL}])
    result = {"role": "tool", "content": "2"}
    own = {"tools": tools, "messages": [Q, call, result, A]}
    said = {**{k: v for k, v in call.items() if k != "tool_calls"}, "function_call": CALL}
    same(tokenizer, "sft", {"functions": [ADD], "messages": [Q, said, {**result, "role": "function"}, A]}, own)
    spoken = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    turns = [
        {"from": "human", "value": Q["content"]},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "It is 2."},
    ]
    sharegpt = {"tools": json.dumps([ADD]), "conversations": turns}
    same(tokenizer, "sft", sharegpt, {"tools": [ADD], "messages": [Q, spoken, result, A]})


@pytest.mark.parametrize("flag", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, False])
def test_a_turn_kept_out_of_the_loss_carries_none(tokenizer: Tokenizer, flag: str, off: Any) -> None:
    talk: Turns = [Q, {**BAD, flag: off}, Q, {**A, flag: 1}]
    ((whole,),), ((given,),) = encode(tokenizer, "sft", {"messages": [Q, BAD, Q, A]})[0], encode(
        tokenizer, "sft", {"messages": talk}
    )[0]  # fmt: skip
    ((first,),) = encode(tokenizer, "sft", {"messages": [Q, BAD]})[0]
    assert given.tokens.tolist() == whole.tokens.tolist()
    cut = len(first.tokens)
    assert not given.weights[:cut].any()
    assert given.weights[cut:].tolist() == whole.weights[cut:].tolist()


def test_a_prompt_of_turns_carries_no_loss(tokenizer: Tokenizer) -> None:
    value = {"prompt": [Q, BAD, Q], "completion": [A]}
    same(tokenizer, "sft", value, {"messages": [Q, {**BAD, "weight": 0}, Q, A]})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"messages": [Q, {**A, "weight": 0.5}]}, "messages[1].weight is 0.5; only 0 (no loss on the turn) and 1"),
        ({"messages": [{**Q, "train": True}, A]}, "messages[0].train asks for loss on a turn of role user"),
        ({"messages": [Q, {**A, "weight": 0}]}, "the conversation has no assistant turn that carries loss"),
        ({"messages": [Q, {**A, "train_detail": [{"begin": 0}]}]}, "messages[1].train_detail cannot be used: loss on"),
        ({"messages": [Q, {**A, "thinking": "a", "reasoning": "b"}]}, "messages[1].thinking and messages[1].reasoning"),
        ({"messages": [{**Q, "thinking": "a"}, A]}, "messages[0].reasoning_content is on a turn of role user"),
        ({"messages": [Q, {**A, "tool_calls": [{**CALL, "arguments": float("nan")}]}]}, "messages[1].tool_calls holds"),
        ({"system": "a", "messages": [SYSTEM, Q, A]}, "system differs from the system turn; keep one of them"),
        ({"prompt": "other", "messages": [Q, A]}, "prompt is not in the row's turns"),
        ({"prompt": [SYSTEM], "messages": [Q, A]}, "prompt differs from the row's turns"),
        ({"messages": [Q, A], "conversations": [Q, BAD]}, "messages and conversations are both given, and differ"),
        ({"messages": [Q, A], "images": ["a.png"]}, "images cannot be used in a row of format messages: only text"),
        ({"messages": [Q, A], "reasoning": "so"}, "reasoning cannot be used in a row of format messages: put it into"),
        ({"messages": [Q, A], "label": True}, "label cannot be used in a row of format messages: it rates the answer"),
        ({"messages": [Q, A], "weight": 2}, "weight cannot be used in a row of format messages: rows cannot be"),
        ({"prompt": "a", "completion": "b", "history": [["a", "b"]]}, "history cannot be used in a row of format comp"),
        ({"instruction": "a", "output": ["b", "c"]}, "output is a list: rows with two outputs are pairs"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history[0] has 1 texts, not a question and"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "look"}]},
         "conversations[1].content should be a call in JSON, as the role says"),
        ({"prompt": "a"}, "the row is a prompt without an answer, from which no stage learns"),
        ({"chosen": [Q, A], "rejected": [Q, BAD]}, "conversations is missing, but chosen is there, which dpo would"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(tokenizer: Tokenizer, value: dict[str, Any], expected: str) -> None:
    assert reason(tokenizer, "sft", value).startswith(expected)


def test_fields_that_nothing_reads_are_counted_by_row(tokenizer: Tokenizer) -> None:
    rows = [
        {"messages": [{**Q, "mood": "calm", "id": 7}, {**A, "mood": "calm"}], "difficulty": 3, "source": "web"},
        {"messages": [Q, A], "difficulty": 1, "prompt_id": "x", "score_chosen": 1.5, "created_at": "now"},
    ]
    outcomes, encoder = encode(tokenizer, "sft", *rows)
    assert all(isinstance(outcome, tuple) for outcome in outcomes)
    assert encoder.reader.ignored == {"difficulty": 2, "messages[].mood": 1}
    assert encoder.remarks() == ["ignored fields: difficulty (2 rows), messages[].mood (1 row)"]
    _, encoder = encode(tokenizer, "sft", *({"messages": [Q, A], f"field {i}": 1} for i in range(300)))
    assert len(encoder.reader.ignored) == 101
    assert encoder.reader.ignored["others"] == 200


def test_a_field_of_a_turn_that_the_template_writes_is_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    template = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].mood }}" + template, "utf-8")
    ((document,),), encoder = encode(Tokenizer.load(tmp_path), "sft", {"messages": [{**Q, "mood": "是"}, A]})
    assert tokenizer.decode(document.tokens.tolist()).startswith("是<|im_start|>")
    assert not encoder.reader.ignored


# Pairs


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": [Q], "chosen": [A], "rejected": [BAD]},
        {"prompt": Q["content"], "chosen": [A], "rejected": [BAD]},
        {"prompt": Q["content"], "chosen": A, "rejected": BAD},
        {"prompt": Q["content"], "chosen": "It is 2.", "rejected": "It is 3."},
        {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, BAD]},
        {"prompt": Q["content"], "chosen": [Q, A], "rejected": [Q, BAD], "messages": [Q, A], "score_chosen": 8.0},
        {"instruction": Q["content"], "input": "", "chosen": "It is 2.", "rejected": "It is 3."},
        {"conversations": [{"from": "human", "value": Q["content"]}], "chosen": {"from": "gpt", "value": "It is 2."},
         "rejected": {"from": "gpt", "value": "It is 3."}},
        {"chosen": "\n\nHuman: What is 1 + 1?\n\nAssistant: It is 2.",
         "rejected": "\n\nHuman: What is 1 + 1?\n\nAssistant: It is 3."},
        {"prompt": "\n\nHuman: What is 1 + 1?\n\nAssistant:", "chosen": "It is 2.", "rejected": "It is 3."},
        {"input": {"messages": [Q], "tools": [], "parallel_tool_calls": True}, "preferred_output": [A],
         "non_preferred_output": [BAD]},
        {"prompt": json.dumps([Q]), "chosen": json.dumps([A]), "rejected": json.dumps([BAD])},
    ],
)  # fmt: skip
def test_a_pair_in_another_format(tokenizer: Tokenizer, value: dict[str, Any]) -> None:
    same(tokenizer, "dpo", value, {"chosen": [Q, A], "rejected": [Q, BAD]})


def test_a_pair_with_more_than_a_question_before_it(tokenizer: Tokenizer) -> None:
    before = [SYSTEM, Q, BAD, user("And 2?")]
    own = {"chosen": [*before, A], "rejected": [*before, BAD]}
    same(tokenizer, "dpo", {"prompt": before, "chosen": [A], "rejected": [BAD]}, own)
    same(tokenizer, "dpo", {"system": "是", "prompt": before[1:], "chosen": [A], "rejected": [BAD]}, own)
    same(tokenizer, "dpo", {"prompt": "And 2?", **own}, own)
    spoken = "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: "
    talk = [user("a\n\nb"), assistant("c"), user("d")]
    own = {"chosen": [*talk, A], "rejected": [*talk, BAD]}
    same(tokenizer, "dpo", {"chosen": spoken + "It is 2.", "rejected": spoken + "It is 3."}, own)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"chosen": "a", "rejected": "b"}, "chosen has no turn before the answer; give prompt, or name its field"),
        ({"question": "q", "chosen": "a", "rejected": "b"},
         "chosen has no turn before the answer; give prompt, or name its field: data.fields.prompt=question"),
        ({"chosen": [A], "rejected": [BAD]}, "chosen has no turn before the answer"),
        ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, BAD]}, "chosen begins with different turns than prompt"),
        ({"prompt": "a", "chosen": "b"}, "rejected is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": [Q, A]}, "messages differs from the row's"),
        ({"prompt": "a", "completion": "b", "label": True}, "the row is a rated answer (unpaired preference data)"),
    ],
)  # fmt: skip
def test_a_pair_that_cannot_be_used_says_why(tokenizer: Tokenizer, value: dict[str, Any], expected: str) -> None:
    assert reason(tokenizer, "dpo", value).startswith(expected)


# Inputs that a review found to be read wrongly


def test_answers_printed_by_python_are_refused_and_json_answers_are_text(tokenizer: Tokenizer) -> None:
    printed = {"prompt": "q", "chosen": "[{'role': 'user', 'content': 'q'}]", "rejected": "b"}
    assert reason(tokenizer, "dpo", printed).startswith("chosen looks like turns but is not JSON (")
    listed = {"prompt": "Names?", "completion": '[{"name": "Ann"}]'}
    same(tokenizer, "sft", listed, {"messages": [user("Names?"), assistant('[{"name": "Ann"}]')]})
    turn = json.dumps({"from": "gpt", "value": "It is 2."})
    own = {"chosen": [Q, A], "rejected": [Q, BAD]}
    same(tokenizer, "dpo", {"prompt": Q["content"], "chosen": turn, "rejected": json.dumps(BAD)}, own)


def test_a_prompt_repeated_in_the_completion_carries_no_loss(tokenizer: Tokenizer) -> None:
    before = [Q, BAD, Q]
    expected = {"messages": [Q, {**BAD, "weight": 0}, Q, A]}
    same(tokenizer, "sft", {"prompt": before, "completion": [*before, A]}, expected)
    own = {"chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, Q, BAD]}
    same(tokenizer, "dpo", {"prompt": [SYSTEM, Q], "chosen": [Q, A], "rejected": [Q, BAD]}, own)


def test_a_spoken_prompt_takes_the_space_before_its_answer(tokenizer: Tokenizer) -> None:
    spoken = {"prompt": "\n\nHuman: What is 1 + 1?\n\nAssistant:", "chosen": " It is 2.", "rejected": " It is 3."}
    same(tokenizer, "dpo", spoken, {"chosen": [Q, A], "rejected": [Q, BAD]})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"instruction": "a", "output": "b", "kto_tag": "false"}, "kto_tag cannot be used in a row of format alpaca"),
        ({"messages": [Q, A], "label": "False"}, "label cannot be used in a row of format messages: it rates"),
        ({"messages": [Q, A], "label": 0}, "label cannot be used in a row of format messages: it rates the answer"),
        ({"messages": [Q, A], "image_url": "x"}, "image_url cannot be used in a row of format messages: only text"),
        ({"messages": [{**Q, "image_url": "x"}, A]}, "messages[0].image_url cannot be used: only text can be read"),
        ({"messages": [Q, A], "input_ids": [1]}, "input_ids cannot be used in a row of format messages: rows of token"),
        ({"messages": [Q, {"role": "assistant", "content": [{"type": "text", "text": "a", "train": False}]}]},
         "messages[1].content[0].train is false; only a whole turn can be kept out of the loss"),
        ({"completion": "q"}, "conversations is missing (the row has completion)"),
        ({"instruction": "a", "output": "", "text": "b"}, "output is missing"),
        ({"prompt": "terse", "question": "q", "answer": "a"}, "the row has both prompt and question, which"),
    ],
)  # fmt: skip
def test_more_that_is_refused_by_name(tokenizer: Tokenizer, value: dict[str, Any], expected: str) -> None:
    fields = {"prompt": "question"} if "question" in value else {}
    assert reason(tokenizer, "sft", value, fields=fields).startswith(expected)


def test_fields_of_turns_and_parts_that_nothing_reads_are_counted(tokenizer: Tokenizer) -> None:
    part = {"type": "text", "text": "It is 2.", "cache_control": {"type": "short"}}
    talk = [{**Q, "name": "Ann"}, {"role": "assistant", "content": [part], "is_masked": True}]
    _, encoder = encode(tokenizer, "sft", {"messages": talk, "is_bad": True})
    assert encoder.reader.ignored == {
        "messages[].name": 1, "messages[].is_masked": 1, "messages[].content[].cache_control": 1, "is_bad": 1,
    }  # fmt: skip
    same(tokenizer, "sft", {"messages": [Q, {**A, "think": "是"}]}, {"messages": [Q, {**A, "reasoning_content": "是"}]})
    dolly = {"instruction": "What is", "context": "1 + 1?", "response": "It is 2."}
    same(tokenizer, "sft", dolly, {"messages": [user("What is\n1 + 1?"), A]})


def test_one_odd_row_does_not_refuse_its_file(tokenizer: Tokenizer) -> None:
    turns = [{"value": "write {code}", "from": "human"}, {"from": "gpt", "value": "It is 2."}]
    rows = [{"conversations": turns}, {"conversations": []}, {"conversations": [None]}, {"messages": json.dumps(turns)}]
    outcomes, _ = encode(tokenizer, "sft", *rows)
    assert [isinstance(outcome, Reject) for outcome in outcomes] == [False, True, True, False]


@pytest.mark.parametrize(
    ("stage", "name", "expected"),
    [
        (
            "pretrain",
            "completion",
            "data.format is completion, from which sft and lora learn; leave it out",
        ),
        ("dpo", "messages", "data.format is messages, from which sft and lora learn"),
        ("sft", "prompt", "data.format is prompt, from which no stage learns yet"),
    ],
)
def test_a_format_of_another_stage_is_refused(tokenizer: Tokenizer, stage: StageName, name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        encode(tokenizer, stage, {"prompt": "a", "completion": "b"}, format=name)


# Rows that no stage learns from yet


def test_prompts_and_rated_answers_are_read() -> None:
    def item(kind: Any, value: dict[str, Any]) -> Any:
        return RowReader(kind, DataConfig()).read(Row("f.jsonl", 1, value))

    assert item("prompt", {"prompt": "a", "answer": "b"}).answer == "b"
    assert item("prompt", {"prompt": [Q]}).conversation.messages == [Q]
    for value in (
        {"prompt": Q["content"], "completion": "It is 2.", "label": False},
        {"messages": [Q, A], "kto_tag": "false"},
        {"instruction": Q["content"], "output": "It is 2.", "kto_tag": False},
        {"conversations": [{"from": "human", "value": Q["content"]}, {"from": "gpt", "value": "It is 2."}],
         "label": "False"},
    ):  # fmt: skip
        rated = item("rated", value)
        assert (rated.conversation.messages, rated.good) == ([Q, A], False)


# Settings


def test_own_names_of_fields(tokenizer: Tokenizer) -> None:
    own = {"messages": [Q, A]}
    names = {"prompt": "question", "answer": "solution"}
    same(tokenizer, "sft", {"question": Q["content"], "solution": "It is 2."}, own, fields=names)
    turns = [{"speaker": "human", "says": Q["content"]}, {"speaker": "gpt", "says": "It is 2."}]
    same(tokenizer, "sft", {"dialog": turns}, own, fields={"messages": "dialog", "role": "speaker", "content": "says"})
    pair = {"question": Q["content"], "chosen": "It is 2.", "rejected": "It is 3."}
    same(tokenizer, "dpo", pair, {"chosen": [Q, A], "rejected": [Q, BAD]}, fields={"prompt": "question"})
    with pytest.raises(ValueError, match=r"data.fields.promt: rows have no such field; did you mean prompt\?"):
        DataConfig(fields={"promt": "question"})


def test_fields_can_be_left_out(tokenizer: Tokenizer) -> None:
    value = {"messages": [Q, A], "label": True, "prompt": "another"}
    same(tokenizer, "sft", value, {"messages": [Q, A]}, ignore=["label", "prompt"])


def test_a_named_format_is_the_only_one_read(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [Q, A]}]
    (first, second), _ = encode(tokenizer, "sft", *rows, format="messages")
    assert isinstance(first, Reject) and isinstance(second, tuple)


def test_a_file_holds_one_format(tokenizer: Tokenizer) -> None:
    rows = [{"messages": 3}, {"messages": [Q, A]}, {"text": "no"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match=r"f.jsonl:4: a row of format completion, but line 2 has format messages"):
        encode(tokenizer, "sft", *rows)


def test_every_format_is_named_in_the_config_and_every_field_can_be_renamed() -> None:
    assert set(FORMATS) == set(get_args(FormatName))
    needed = {field for format in FORMATS.values() for group in format.needs for field in group}
    assert needed - set(FIELD_NAMES) <= {"response", "kto_tag"}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"text": "a", "messages": []}, "text"),
        ({"messages": [], "chosen": None}, "messages"),
        ({"question": 1}, None),
        ({}, None),
        ({"label": "spam", "messages": [Q, A]}, "messages"),
        ({"label": True, "messages": [Q, A]}, "rated"),
    ],
)
def test_recognised_by_present_fields(value: dict[str, Any], name: str | None) -> None:
    assert recognise(value) == name


# Property: any conversation, in every format that can hold it

WORDS = st.text(min_size=1, max_size=30).filter(lambda t: t.strip() and not any(0xD800 <= ord(c) < 0xE000 for c in t))


@st.composite
def talks(draw: st.DrawFn) -> Turns:
    turns = [turn for _ in range(draw(st.integers(1, 3))) for turn in (user(draw(WORDS)), assistant(draw(WORDS)))]
    return [{"role": "system", "content": draw(WORDS)}, *turns] if draw(st.booleans()) else turns


def as_sharegpt(talk: Turns) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in talk]}


def as_parts(talk: Turns) -> dict[str, Any]:
    parts = [[{"type": "text", "text": c} for c in t["content"]] for t in talk]
    return {"messages": [{"role": t["role"], "content": p} for t, p in zip(talk, parts)]}


def split_system(talk: Turns) -> tuple[dict[str, Any], Turns]:
    return ({"system": talk[0]["content"]}, talk[1:]) if talk[0]["role"] == "system" else ({}, talk)


def as_row_system(talk: Turns) -> dict[str, Any]:
    system, turns = split_system(talk)
    return {**system, "messages": turns}


def as_alpaca(talk: Turns) -> dict[str, Any]:
    system, turns = split_system(talk)
    said = [t["content"] for t in turns]
    history = [list(pair) for pair in zip(said[:-2:2], said[1:-2:2])]
    return {**system, "instruction": said[-2], "input": "", "output": said[-1], "history": history}


@settings(deadline=None, max_examples=40)
@given(talks())
@pytest.mark.parametrize("form", [as_sharegpt, as_parts, as_row_system, as_alpaca])
def test_any_conversation_in_every_format(
    tokenizer: Tokenizer, form: Callable[[Turns], dict[str, Any]], talk: Turns
) -> None:
    same(tokenizer, "sft", form(talk), {"conversations": talk})


@settings(deadline=None, max_examples=40)
@given(talks(), WORDS)
def test_any_pair_in_every_format(tokenizer: Tokenizer, talk: Turns, other: str) -> None:
    *prompt, answer = talk
    if other.strip() == answer["content"].strip():
        other += "!"
    own = {"chosen": talk, "rejected": [*prompt, assistant(other)]}
    same(tokenizer, "dpo", {"prompt": prompt, "chosen": [answer], "rejected": [assistant(other)]}, own)
    same(tokenizer, "dpo", {"prompt": prompt, "chosen": answer["content"], "rejected": other}, own)
    openai = {"input": {"messages": prompt}, "preferred_output": [answer], "non_preferred_output": [assistant(other)]}
    same(tokenizer, "dpo", openai, own)


# Other users of rows


def test_the_question_of_a_row() -> None:
    assert question_of({"messages": [Q, {"role": "assistant", "content": ""}]}) == ([Q], None)
    assert question_of({"conversations": [{"from": "human", "value": "a"}]}) == ([user("a")], None)
    assert question_of({"instruction": "a", "input": "b", "output": "c"}) == ([user("a\nb")], None)
    assert question_of({"prompt": [SYSTEM, Q], "answer": "2"}) == ([SYSTEM, Q], None)
    with pytest.raises(BadRowError, match="messages has no turn to answer"):
        question_of({"messages": [A]})


def test_texts_of_any_row() -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a"},
        {"conversations": [Q, {**A, "reasoning_content": "b"}]},
        {"prompt": "c", "chosen": "d", "rejected": "e"},
        {"instruction": "f", "output": "g"},
    ]
    assert [texts_of(row) for row in rows] == [["a"], [Q["content"], "b", A["content"]], ["c", "d"], ["f", "g"]]
    with pytest.raises(BadRowError):
        texts_of({"conversations": [3]})
