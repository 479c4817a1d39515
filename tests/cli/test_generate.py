"""generate and chat: against generation by hand, and as transformers goes on with the same directory."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from minimind_ray.cli.options import printable
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model
from minimind_ray.model.engine import generate
from minimind_ray.model.sampling import Sampling
from minimind_ray.stages.conversation import Conversation, whole_characters
from minimind_ray.stages.prompts import chat_ids, read_prompts
from minimind_ray.stages.use import open_trained
from tests.cli.conftest import Command, Models
from tests.jobs import write_jsonl

pytestmark = pytest.mark.slow

GREEDY = ["--temperature", 0, "--max-new-tokens", 12, "--precision", "float32"]


def by_hand(directory: Path, prompts: list[list[int]]) -> list[str]:
    tokenizer = Tokenizer.load(directory)
    model = load_model(directory).eval()
    greedy = Sampling(temperature=0, max_new_tokens=12, stop_ids=tuple(tokenizer.stop_ids))
    answers = generate(model, prompts, greedy)
    return [tokenizer.decode(ids, skip_special=True) for ids in answers]


def asked(tokenizer: Tokenizer, *turns: str) -> list[int]:
    """Prompt ids of turns that begin with the user's."""
    roles = ("user", "assistant")
    return tokenizer.prompt_ids([{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)])


def test_what_was_pretrained_goes_on_and_everything_else_answers(command: Command, models: Models) -> None:
    tokenizer = Tokenizer.load(models.base)
    texts = ["The fox sees", "月"]
    prompts = [arg for text in texts for arg in ("--prompt", text)]
    as_texts = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode(texts)]
    as_turns = [asked(tokenizer, text) for text in texts]
    for args, directory, ids in (
        ([models.run], models.base, as_texts),
        ([models.base], models.base, as_texts),
        ([models.base, "--chat"], models.base, as_turns),
        ([models.other], models.other, as_turns),
        ([models.other, "--raw"], models.other, as_texts),
    ):
        outcome = command("generate", *args, *prompts, *GREEDY, "--json")
        lines = [json.loads(line) for line in outcome.out.splitlines()]
        assert [line["prompt"] for line in lines] == texts
        assert [line["answer"] for line in lines] == by_hand(directory, ids)


def test_prompts_come_from_files_and_batches_change_nothing(command: Command, models: Models, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "the fox"}, {"conversations": talk}, {"messages": [*talk, {"role": "user", "content": "c"}]}]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    tokenizer = Tokenizer.load(models.other)
    expected = by_hand(
        models.other, [asked(tokenizer, "the fox"), asked(tokenizer, "a"), asked(tokenizer, "a", "b", "c")]
    )
    for size in (1, 2, 32):
        out = command("generate", models.other, "--file", file, *GREEDY, "--json", "--batch-size", size).out
        assert [json.loads(line)["answer"] for line in out.splitlines()] == expected
    # The place for the answer, as Parquet and many jsonl files have it.
    for empty in ("", None):
        blank = write_jsonl(tmp_path / "p.jsonl", [{"messages": [talk[0], {"role": "assistant", "content": empty}]}])
        out = command("generate", models.other, "--file", blank, *GREEDY, "--json").out
        assert [json.loads(line)["answer"] for line in out.splitlines()] == expected[1:2]
    lines = tmp_path / "p.txt"
    lines.write_text("\ufefffirst\n\nsecond\n", encoding="utf-8")
    out = command("generate", models.run, "--file", lines, *GREEDY).out
    assert out.startswith("first") and "\nsecond" in out


def test_rows_are_read_as_sft_reads_them(models: Models, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(models.other)
    tools, calls = [{"name": "time"}], [{"name": "time", "arguments": {}}]
    user, result = {"role": "user", "content": "a"}, {"role": "tool", "content": "12:00"}
    call = {"role": "assistant", "content": None, "tool_calls": json.dumps(calls)}
    rows = [
        {"messages": [user], "tools": json.dumps(tools)},
        {"messages": [{"role": "system", "content": "s", "tools": tools}, user, call, result]},
    ]
    prompts = read_prompts([], write_jsonl(tmp_path / "p.jsonl", rows))
    turns = [{"role": "system", "content": "s"}, user, {**call, "content": "", "tool_calls": calls}, result]
    assert [chat_ids(prompt, None, tokenizer) for prompt in prompts] == [
        tokenizer.prompt_ids([user], tools), tokenizer.prompt_ids(turns, tools),
    ]  # fmt: skip


def test_an_answer_has_room_only_as_far_as_positions_go(command: Command, models: Models, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(models.other, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    answer = json.loads(command("generate", short, "--raw", "--prompt", "ab", *GREEDY, "--json").out)
    tokens = 1 + len(Tokenizer.load(short).encode(["ab"])[0])
    assert (answer["tokens"], answer["end"]) == (12 - tokens, "length")
    refused = command("generate", short, "--raw", "--prompt", "a b c d e f g h i j k l", *GREEDY)
    assert refused.code == 1 and "leave no room for an answer: the model's limit is 12" in refused.err


def test_a_seed_repeats_and_another_does_not(command: Command, models: Models) -> None:
    def answer(seed: int) -> str:
        return command("generate", models.run, "--prompt", "The", "--seed", seed, "--max-new-tokens", 20).out

    assert answer(1) == answer(1) != answer(2)


def test_an_adapter_is_put_on_its_base(command: Command, models: Models) -> None:
    ways = ([models.adapter], [models.base, "--adapter", models.adapter, "--chat"])
    merged, same = (command("generate", *args, "--prompt", "hi", *GREEDY).out for args in ways)
    assert merged == same != command("generate", models.base, "--chat", "--prompt", "hi", *GREEDY).out


def test_transformers_reads_the_directory_and_says_the_same(command: Command, models: Models) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(models.other, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(models.other)
    ours = Tokenizer.load(models.other)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What about 春风?"},
        {"role": "assistant", "content": "It is good."},
        {"role": "user", "content": "And the fox?"},
    ]
    ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == ours.prompt_ids(messages)

    prompt = their_tokenizer.apply_chat_template(messages[1:2], add_generation_prompt=True, return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expected = their_tokenizer.decode(written, skip_special_tokens=True)
    answer = command("generate", models.other, "--prompt", messages[1]["content"], *GREEDY, "--json").out
    assert json.loads(answer)["answer"] == expected


def test_chat_remembers_resets_and_switches_adapters(command: Command, models: Models) -> None:
    tokenizer = Tokenizer.load(models.other)
    first = by_hand(models.other, [asked(tokenizer, "hi")])[0]
    second = by_hand(models.other, [asked(tokenizer, "hi", first, "and?")])[0]
    first, second = printable(first), printable(second)
    outcome = command("chat", models.other, *GREEDY, stdin="hi\n\nand?\n/reset\nhi\n/what\n/help\n/quit\nhi\n")
    assert outcome.out.split("/reset")[0] == f"{first}\n{second}\n{first}\n"
    assert (outcome.code, outcome.err) == (0, "error: there is no command /what; /help lists the commands\n")

    plain = printable(by_hand(models.base, [asked(tokenizer, "hi")])[0])
    adapted = command("generate", models.adapter, "--prompt", "hi", *GREEDY).out.rstrip("\n")
    script = f"hi\n/reset\n/adapter {models.adapter}\nhi\n/reset\n/adapter off\nhi"
    outcome = command("chat", models.base, *GREEDY, stdin=script)
    assert outcome.out == f"{plain}\n{adapted}\n{plain}\n"
    assert "was only pretrained" in outcome.err


def test_chat_goes_on_after_an_error(command: Command, models: Models) -> None:
    outcome = command("chat", models.other, *GREEDY, stdin=f"/adapter /nowhere\n/adapter {models.adapter}\nhi\n")
    assert outcome.code == 0
    errors = outcome.err.splitlines()
    assert "/nowhere is not a model" in errors[0] and "trained on" in errors[1] and len(errors) == 2
    tokenizer = Tokenizer.load(models.other)
    assert outcome.out == printable(by_hand(models.other, [asked(tokenizer, "hi")])[0]) + "\n"


def test_two_models_answer_side_by_side(command: Command, models: Models) -> None:
    tokenizer = Tokenizer.load(models.other)
    outcome = command("chat", models.base, "--compare", models.other, *GREEDY, stdin="hi\n")
    for directory in (models.base, models.other):
        words = printable(by_hand(directory, [asked(tokenizer, "hi")])[0]).split()
        assert all(word in outcome.out for word in words)
    assert "│" in outcome.out


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(models: Models) -> None:
    sampling = Sampling(temperature=0, max_new_tokens=12)
    talk = Conversation(open_trained(models.other, precision="float32"), sampling, system="s")
    whole = "".join(talk.answer("hi"))
    talk.reset()
    with closing(talk.answer("hi")) as pieces:
        begun = next(pieces)
    assert whole.startswith(begun) and len(begun) < len(whole)
    roles = [("system", "s"), ("user", "hi"), ("assistant", begun)]
    assert [(m["role"], m["content"]) for m in talk.messages] == roles


def test_streamed_pieces_are_whole_characters_and_add_up(models: Models) -> None:
    tokenizer = Tokenizer.load(models.tokenizer)
    draw = random.Random(0)
    texts = tokenizer.encode(["日本語 🙂 zażółć\n𒀀 the fox", "春风"])
    for ids in [*texts, *([draw.randrange(tokenizer.vocab_size) for _ in range(30)] for _ in range(300))]:
        pieces = list(whole_characters(tokenizer, ids))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=True)
        assert all(pieces)
    assert "".join(whole_characters(tokenizer, texts[0][:3])) == tokenizer.decode(texts[0][:3])
    assert not any("\ufffd" in piece for piece in whole_characters(tokenizer, texts[0]))


BAD = [
    (["generate", "/nowhere", "--prompt", "x"], "/nowhere is not a model"),
    (["generate", "{base}"], "no prompts: give --prompt"),
    (["generate", "{base}", "--prompt", "x", "--raw", "--system", "y"], "--system works only with --chat"),
    (["generate", "{base}", "--file", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
    (["generate", "{base}", "--file", "{files}/bad.jsonl"], "bad.jsonl:1: the row has no prompt"),
    (["generate", "{base}", "--file", "{files}/list.jsonl"], "list.jsonl:1: conversations[0] is a string, not an"),
    (["generate", "{base}", "--file", "{files}/latin.txt"], "latin.txt: not UTF-8"),
    (["generate", "{base}", "--prompt", "x", "--adapter", "{other}"], "is a whole model, not an adapter"),
    (["generate", "{other}", "--prompt", "x", "--adapter", "{adapter}"], "not on this model"),
    (["generate", "{adapter}", "--prompt", "x", "--adapter", "{adapter}"], "is an adapter itself"),
    (["generate", "{base}", "--prompt", "x", "--temperature", "inf"], "temperature is inf: give a finite number"),
    (["generate", "{base}", "--prompt", "\ud800"], "--prompt is not UTF-8 text"),
    (["generate", "{base}", "--prompt", "x", "--chat", "--system", "\ud800"], "--system is not UTF-8 text"),
    (["chat", "{base}", "--system", "\ud800"], "--system is not UTF-8 text"),
    (["generate", "{base}", "--file", "{files}/human.jsonl"], 'messages[0].role is "narrator"; known roles are'),
    (["generate", "{base}", "--file", "{files}/half.jsonl"], "half.jsonl:1 is not UTF-8 text"),
    (["generate", "{base}", "--file", "{files}/deep.jsonl"], "deep.jsonl:1: objects are nested too deeply"),
    (["chat", "/nowhere"], "/nowhere is not a model"),
    (["chat", "{files}/sweep"], "is a sweep, not a model: name one of its trials"),
    (["chat", "{base}", "--compare", "{base}"], "is the same model"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_sentence(
    command: Command, models: Models, tmp_path: Path, args: list[str], message: str
) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [{"text": "x"}])
    write_jsonl(tmp_path / "list.jsonl", [{"conversations": ["x"]}])
    question = {"role": "user", "content": "x"}
    write_jsonl(tmp_path / "human.jsonl", [{"messages": [{**question, "role": "narrator"}]}])
    for name, tools in {"half": '[{"a": "\\ud800"}]', "deep": '[{"a": ' + "[" * 200 + "]" * 200 + "}]"}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": [question], "tools": tools}])
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    places = {**vars(models), "files": tmp_path}
    outcome = command(*(arg.format_map(places) for arg in args))
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err
