"""The offline tasks: their items, and what their rules accept."""

from __future__ import annotations

from typing import Any

import pytest

from minimind_ray.tasks.own import OWN, follows, own_task, repeated

pytestmark = pytest.mark.slow  # lm-eval's import takes a second.


@pytest.mark.parametrize("name", OWN)
def test_items_are_the_same_each_time_and_have_one_right_answer(name: str) -> None:
    docs, again = own_task(name).eval_docs, own_task(name).eval_docs
    assert list(docs) == list(again)
    assert 100 <= len(docs) <= 300
    for doc in docs:
        if "choices" in doc:
            assert len(set(doc["choices"])) == len(doc["choices"]) == 4
            assert 0 <= doc["gold"] < 4
    if "gold" in docs[0]:
        counts = [sum(doc["gold"] == place for doc in docs) for place in range(4)]
        assert min(counts) > len(docs) / 8, counts


@pytest.mark.parametrize(
    ("rule", "zh", "right", "wrong"),
    [
        ("one_word", False, "Warm.", "It is warm"),
        ("one_word", True, "温暖", "我觉得太阳很好"),
        ("yes_no", False, "Yes.", "Yes, I do"),
        ("yes_no", True, "不是。", "不"),
        ("numbered", False, "1. a\n2. b\n3. c", "1. a\n2. b"),
        ("short", False, "The sun is hot.", "The sun is hot.\nIt is."),
        ("json", False, '{"topic": "the sun"}', '{"topic": "the sun", "more": 1}'),
        ("json", False, '{"topic": 1}', "[" * 5000),
        ("no_digits", False, "It is warm", "It has 2 sides"),
        ("same_language", True, "太阳很热", "The sun"),
        ("same_language", False, "The sun", "太阳"),
        ("question", True, "你喜欢吗？", "我喜欢。"),
        ("begin", False, "Well, it is hot", "It is hot"),
        ("names_it", False, "I see the Sun.", "I see it."),
        ("no_digits", False, "x", ""),
    ],
)
def test_rules(rule: str, zh: bool, right: str, wrong: str) -> None:
    row: dict[str, Any] = {"rule": rule, "zh": zh, "subject": "the sun"}
    assert follows(right, row)
    assert not follows(wrong, row)


def test_repetition_counts_runs_of_four_words() -> None:
    assert repeated("a b c d e f") == (0, 3)
    assert repeated("a b c d a b c d") == (1, 5)
    assert repeated("我我我我我我") == (2, 3)
    assert repeated("") == (0, 0)
