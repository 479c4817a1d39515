"""The demo corpus: what the rest of the demo relies on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.stages import StageName
from minimind_ray.data.demo import SPLITS, DemoFiles, Question, all_facts, read_questions, write_demo
from minimind_ray.data.demo_world import LANGUAGES, RELATIONS

pytestmark = pytest.mark.unit

STAGES: tuple[StageName, ...] = ("pretrain", "sft", "lora", "dpo")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("demo"), seed=0)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentences(path: Path) -> set[str]:
    return {s for row in rows(path) for s in re.split(r"(?<=\.) |(?<=。)", row["text"]) if s}


def questions(path: Path) -> set[str]:
    """What users say in the file, without words of courtesy."""
    turns = [turn for row in rows(path) for turn in row.get("conversations") or row["chosen"]]
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    courtesy = r"^(Hello! |Please tell me: |I would like to know: |A question: |你好！|请问，|我想知道：|有个问题：)"
    return {re.sub(courtesy, "", text) for text in asked}


def content(files: DemoFiles) -> dict[str, bytes]:
    return {str(p.relative_to(files.directory)): p.read_bytes() for p in files.directory.rglob("*.jsonl")}


@pytest.mark.slow
def test_the_same_seed_writes_the_same_bytes(files: DemoFiles, tmp_path: Path) -> None:
    assert content(write_demo(tmp_path / "again", seed=0)) == content(files)


def test_another_seed_writes_other_rows(files: DemoFiles, tmp_path: Path) -> None:
    other, mine = content(write_demo(tmp_path / "other", seed=1)), content(files)
    assert other.keys() == mine.keys()
    assert all(other[name] != mine[name] for name in mine if name != "questions.jsonl")


def test_every_row_has_its_stages_format(files: DemoFiles) -> None:
    for split in SPLITS:
        assert all(row.keys() == {"text"} and row["text"].strip() for row in rows(files.rows("pretrain", split)))
        for row in rows(files.rows("sft", split)) + rows(files.rows("lora", split)):
            roles = [turn["role"] for turn in row["conversations"]]
            assert roles in (["system"] * s + ["user", "assistant"] * n for s in (0, 1) for n in (1, 2, 3))
            assert all(turn["content"].strip() for turn in row["conversations"])
        for row in rows(files.rows("dpo", split)):
            assert [turn["role"] for turn in row["chosen"]] == ["user", "assistant"]
            assert row["chosen"][0] == row["rejected"][0]
            assert row["chosen"][1] != row["rejected"][1]


@pytest.mark.parametrize("stage", STAGES)
def test_no_validation_row_is_in_train(files: DemoFiles, stage: StageName) -> None:
    train, val = (files.rows(stage, split).read_text(encoding="utf-8").splitlines() for split in SPLITS)
    assert len(val) >= 10
    assert not set(train) & set(val)


def test_a_held_out_wording_is_never_trained_on(files: DemoFiles) -> None:
    assert not sentences(files.rows("pretrain", "train")) & sentences(files.rows("pretrain", "val"))
    train = questions(files.rows("sft", "train")) | questions(files.rows("dpo", "train"))
    follow_ups = {
        phrasing.follow_up for relation in RELATIONS for phrasing in (relation.en, relation.zh) if phrasing.follow_up
    }
    for stage in ("sft", "dpo"):
        assert not train & (questions(files.rows(stage, "val")) - follow_ups)
    assert not questions(files.rows("lora", "train")) & questions(files.rows("lora", "val"))


def test_every_fact_is_stated_and_asked_in_train(files: DemoFiles) -> None:
    stated, asked = sentences(files.rows("pretrain", "train")), questions(files.rows("sft", "train"))
    for fact in all_facts(0):
        assert set(fact.statements("train")) <= stated
        assert set(fact.questions("train")) <= asked
        assert len(fact.statements("train")) >= 3


def test_the_ten_questions_are_new_and_their_facts_are_not(files: DemoFiles) -> None:
    ten = read_questions(files)
    assert len(ten) == 10
    trained = questions(files.rows("sft", "train")) | questions(files.rows("dpo", "train"))
    facts = all_facts(0)
    stated = sentences(files.rows("pretrain", "train"))
    for question in ten:
        assert question.question not in trained
        [fact] = [fact for fact in facts if question.question in fact.questions("val")]
        assert question.is_right(fact.answer())
        assert any(question.is_right(statement) for statement in stated & set(fact.statements("train")))


def test_a_wrong_answer_is_wrong() -> None:
    question = Question("What is 7 plus 5?", ("12", "twelve"))
    assert question.is_right("7 plus 5 is 12.")
    assert question.is_right("Twelve.")
    assert not question.is_right("7 plus 5 is 112.")
    assert not question.is_right("7 plus 5 is 11.")


def test_an_answer_to_another_question_is_wrong(files: DemoFiles) -> None:
    [question] = [q for q in read_questions(files) if "Monday" in q.question]
    assert question.is_right("The day after Monday is Tuesday.")
    assert not question.is_right("The day after Tuesday is Wednesday.")


def test_what_a_preference_pair_prefers_is_true_and_plain(files: DemoFiles) -> None:
    answers = {fact.answer() for fact in all_facts(0)}
    bare = {fact.bare_answer() for fact in all_facts(0)}
    kinds = {"false": 0, "rambling": 0, "bare": 0}
    for row in rows(files.rows("dpo", "train")):
        chosen, rejected = row["chosen"][1]["content"], row["rejected"][1]["content"]
        assert chosen in answers
        kinds["bare" if rejected in bare else "rambling" if rejected.endswith(chosen) else "false"] += 1
    assert all(count > 100 for count in kinds.values())


def test_dialogues_go_on_about_the_same_thing_and_about_others(files: DemoFiles) -> None:
    facts = all_facts(0)
    answers = {(fact.language, fact.answer()): fact for fact in facts}
    found: set[tuple[str, str]] = set()
    for row in rows(files.rows("sft", "train")):
        said = [turn["content"] for turn in row["conversations"] if turn["role"] == "assistant"]
        for language in LANGUAGES:
            if all((language, text) in answers for text in said):
                about = [answers[language, text] for text in said]
                for fact, after in zip(about, about[1:]):
                    kind = "thing" if fact.thing == after.thing else "relation"
                    found.add((language, kind if fact.relation is after.relation or kind == "thing" else "any"))
    assert found == {(language, kind) for language in LANGUAGES for kind in ("thing", "relation", "any")}


def test_identity_is_told_nowhere_but_in_its_own_file(files: DemoFiles) -> None:
    for stage in STAGES:
        for split in SPLITS:
            assert ("MiniMind" in files.rows(stage, split).read_text(encoding="utf-8")) == (stage == "lora")


def test_no_two_facts_ask_the_same() -> None:
    asked = [question for fact in all_facts(0) for split in SPLITS for question in fact.questions(split)]
    assert len(asked) == len(set(asked))


def test_both_languages_know_the_same() -> None:
    counts = {language: sum(fact.language == language for fact in all_facts(0)) for language in LANGUAGES}
    assert counts["en"] == counts["zh"]
