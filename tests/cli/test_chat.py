"""chat's commands, in a pipe and on a terminal; and the demo's offer of a chat."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minimind_ray.cli import chat as chat_module
from minimind_ray.cli.demo import offer_chat
from minimind_ray.config.schema import DataConfig, GenerationConfig
from minimind_ray.data.formats import RowReader
from minimind_ray.data.records import Row
from minimind_ray.model.generation import write_generation
from tests.cli.conftest import Command, Models

pytestmark = pytest.mark.slow

GREEDY = ["--temperature", 0, "--max-new-tokens", 12, "--precision", "float32"]
SHORT = ["--max-new-tokens", 12, "--precision", "float32"]


@pytest.fixture
def greedy_model(models: Models, tmp_path: Path) -> Path:
    """A model whose own settings say temperature 0 and 12 tokens."""
    directory = Path(shutil.copytree(models.other, tmp_path / "greedy"))
    write_generation(directory, GenerationConfig(temperature=0, max_new_tokens=12))
    return directory


def test_the_models_own_settings_hold_and_flags_win(command: Command, models: Models, greedy_model: Path) -> None:
    precise = ["--precision", "float32"]
    for name, more in (("generate", ["--prompt", "hi"]), ("chat", [])):
        stdin = "" if more else "hi\n"
        expected = command(name, models.other, *more, *GREEDY, stdin=stdin).out
        assert command(name, greedy_model, *more, *precise, stdin=stdin).out == expected
        hot = ["--temperature", 3, "--top-p", 1, "--max-new-tokens", 12, *precise]
        assert command(name, greedy_model, *more, *hot, stdin=stdin).out != expected


def test_a_broken_setting_of_the_model_is_one_sentence(command: Command, greedy_model: Path) -> None:
    (greedy_model / "generation_config.json").write_text('{"top_p": 7}')
    for args, stdin in ((["generate", greedy_model, "--prompt", "hi"], ""), (["chat", greedy_model], "hi\n")):
        outcome = command(*args, stdin=stdin)
        assert outcome.code == 1 and outcome.err.count("\n") == 1
        assert "generation_config.json: top_p: input should be less than or equal to 1, not 7" in outcome.err


def test_set_changes_the_next_answers(command: Command, models: Models) -> None:
    (expected,) = {command("chat", models.other, *GREEDY, stdin="hi\n").out}
    script = "/set temperature 0\nhi\n"
    assert command("chat", models.other, *SHORT, stdin=script).out == expected
    assert command("chat", models.other, *SHORT, stdin=script.replace("e 0", "e=0")).out == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("temprature 1", "there is no setting temprature; did you mean temperature? All settings: temperature, top_p,"),
        ("top-p 2", "top-p is 2.0: give a number from 0 to 1"),
        ("top_k 1.5", "top_k is '1.5': give a whole number, as in /set top_k 1"),
        ("temperature", "temperature is '': give a number, as in /set temperature 1"),
        ("seed -1", "seed is -1: give a number of at least 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_changes_nothing(
    argument: str, message: str, command: Command, models: Models
) -> None:
    outcome = command("chat", models.other, *GREEDY, stdin=f"/set {argument}\nhi\n")
    assert outcome.err.startswith(f"error: {message}") and outcome.err.count("\n") == 1
    assert outcome.out == command("chat", models.other, *GREEDY, stdin="hi\n").out


def test_a_repeated_question_has_a_new_answer_unless_a_seed_is_given(command: Command, models: Models) -> None:
    script = "hi\n/reset\nhi\n/reset\nhi\n"
    assert len(set(command("chat", models.other, *SHORT, stdin=script).out.splitlines())) == 3
    seeded = command("chat", models.other, *SHORT, "--seed", 3, stdin=script).out.splitlines()
    assert len(seeded) == 3 and len(set(seeded)) == 1
    set_later = command("chat", models.other, *SHORT, stdin=f"/set seed 3\n{script}").out.splitlines()
    assert set_later == seeded


def test_saved_conversations_are_rows_that_sft_reads(command: Command, models: Models, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text('{"conversations": []}')  # without the end of the line
    script = f"hi\nand?\n/system Be brief.\n/save {file}\n/reset\n/system\nhi\n/save {file}\n"
    outcome = command("chat", models.other, *GREEDY, stdin=script)
    assert (outcome.code, outcome.err) == (0, "") and outcome.out.count(f"saved to {file}\n") == 2
    _, first, second = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    turns = [(turn["role"], turn["content"]) for turn in first["conversations"]]
    assert turns[:2] == [("system", "Be brief."), ("user", "hi")] and turns[3] == ("user", "and?")
    assert [turn["role"] for turn in second["conversations"]] == ["user", "assistant"]
    for row in (first, second):
        read: Any = RowReader("conversation", DataConfig()).read(Row(str(file), 1, row))
        assert [message["content"] for message in read.messages] == [turn["content"] for turn in row["conversations"]]


def test_what_cannot_be_saved_is_one_sentence_each(command: Command, models: Models, tmp_path: Path) -> None:
    script = f"/save\n/save {tmp_path}/a.jsonl\nhi\n/save {tmp_path}/a.txt\n/save {tmp_path}/no/a.jsonl\n/save s3://b/a.jsonl"
    errors = command("chat", models.other, *GREEDY, stdin=script).err.splitlines()
    assert len(errors) == 5
    for error, words in zip(
        errors, ["name a file", "there is no answer to save yet", "ends with .jsonl", "No such file", "is a URL"]
    ):
        assert error.startswith("error: ") and words in error
    assert not list(tmp_path.iterdir())


def test_a_system_turn_can_change_in_the_middle(command: Command, models: Models) -> None:
    script = "/system Be brief.\nhi\n/system\n/reset\nhi\n"
    brief, plain = command("chat", models.other, *GREEDY, stdin=script).out.splitlines()
    assert [brief] == command("chat", models.other, "--system", "Be brief.", *GREEDY, stdin="hi\n").out.splitlines()
    assert brief != plain


def on_a_terminal(args: list[object], lines: list[str], state: Path) -> str:
    """Run the command on a terminal of its own, and type a line at each prompt. Return all that the terminal shows."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "minimind_ray", *map(str, args)],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200", "XDG_STATE_HOME": str(state)},
    )  # fmt: skip
    os.close(follower)
    shown, waiting = "", list(lines)
    while True:
        try:
            data = os.read(leader, 4096).decode(errors="replace")
        except OSError:  # The process has ended, and the terminal with it.
            break
        if not data:
            break
        shown += data
        if waiting and shown.endswith("> "):
            os.write(leader, waiting.pop(0).encode() + b"\n")
    os.close(leader)
    assert process.wait(timeout=60) == 0
    return shown.replace("\r\n", "\n")


def test_on_a_terminal_a_line_says_who_answers_and_lines_are_remembered(models: Models, tmp_path: Path) -> None:
    state = tmp_path / "state"
    words = [f"/adapter {models.adapter}", "/set temperature 0.25", "hi", "/quit"]
    shown = on_a_terminal(["chat", models.base, *GREEDY], words, state)
    rest = "top_p 0.95, top_k 0, repetition_penalty 1, max_new_tokens 12"
    assert f"{models.base}: temperature 0, {rest}\n/reset " in shown
    assert f"{models.base} with adapter {models.adapter}: temperature 0, {rest}\n" in shown
    assert f"{models.base} with adapter {models.adapter}: temperature 0.25, {rest}\n" in shown

    history = state / "minimind-ray" / "chat_history"
    assert history.read_text().splitlines() == words
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    # The arrow key finds the line of the chat before: after /quit comes "hi".
    again = on_a_terminal(["chat", models.adapter, *GREEDY], ["\x1b[A\x1b[A", "/quit"], state)
    assert re.search(rf"^{re.escape(str(models.base))} with adapter {re.escape(str(models.adapter))}: ", again, re.M)
    assert history.read_text().splitlines() == [*words, "hi", "/quit"]


@pytest.mark.parametrize(("reply", "talks"), [("", True), ("y", True), ("n", False), (None, False)])
def test_the_demo_offers_a_chat_on_a_terminal_only(
    reply: str | None, talks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[object] = []
    monkeypatch.setattr(chat_module, "chat", lambda *args, **options: called.append((*args, options)))
    offer_chat("m", "a", Console())
    printed = capsys.readouterr().out
    assert "minimind-ray chat m\n" in printed and "minimind-ray chat m --adapter a\n" in printed and not called

    def type_reply(question: str) -> str:
        assert question == "talk to it now? [Y/n] "
        if reply is None:
            raise EOFError
        return reply

    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", type_reply)
    offer_chat("m", "a", Console())
    assert called == ([("m", {})] if talks else [])
