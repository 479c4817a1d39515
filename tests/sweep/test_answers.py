"""The answers of a sweep's trials, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minimind_ray.sweep.answers import answer_records, answers_of
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.report import render
from minimind_ray.sweep.trials import read_sweep
from tests.sweep.synthetic import make_sweep

pytestmark = pytest.mark.unit


def write(trial: Path, *lines: tuple[int, list[tuple[str, str]]], prompts: bool = True) -> None:
    """Write samples.jsonl: for each step pairs of a prompt and its answer."""
    with (trial / "samples.jsonl").open("w") as f:
        for step, pairs in lines:
            line = {"step": step, "samples": [f"{prompt}\n{answer}" for prompt, answer in pairs]}
            f.write(json.dumps(line | ({"prompts": [prompt for prompt, _ in pairs]} if prompts else {})) + "\n")


def test_each_point_answers_each_prompt(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3,1"}, steps=10)
    for beta in ("0.1", "0.3", "1"):
        first = [("Hi", "um"), ("Hi", "er"), ("Go?", "no")]
        last = [("Hi", f"hello {beta}"), ("Hi", "er"), ("Go?", f"yes {beta}")]
        write(path / f"trials/beta={beta},seed=0", (0, first), (5, first), (10, last))
    sweep = read_sweep(path)
    comparison = compare([sweep])
    found = answers_of(comparison)
    assert [each.prompt for each in found] == ["Hi", "Hi", "Go?"] and [each.start for each in found] == [
        "um",
        "er",
        "no",
    ]
    assert [p.row for p in found[0].points] == comparison.rows
    assert [p.text for p in found[0].points] == [f"hello {row.point['dpo.beta']:g}" for row in comparison.rows]
    assert {(p.trial.seed, p.step) for p in found[2].points} == {(0, 10)}
    assert answer_records(found)[2] == {"prompt": "Go?", "start": "no", "beta 0.1": "yes 0.1", "beta 0.3": "yes 0.3",
                                        "beta 1": "yes 1"}  # fmt: skip
    page = render(sweep, comparison)
    assert page.count("before training</h4>") == 3 and page.count("as before training") == 3


def test_points_may_lack_answers_and_differ_before_training(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3,1"}, steps=10, seeds=1)
    write(path / "trials/beta=0.1,seed=0", (0, [("Hi", "um")]), (10, [("Hi", "hello")]))
    write(path / "trials/beta=0.3,seed=0", (0, [("Hi", "er")]), (10, [("Hi", "hello"), ("Go?", "yes")]))
    write(path / "trials/beta=1,seed=0", (0, [("Hi", "um")]))  # Stopped before its first validation.
    sweep = read_sweep(path)
    comparison = compare([sweep])
    hi, go = answers_of(comparison)
    assert hi.start is None and {p.start for p in hi.points} == {"um", "er"} and len(hi.points) == 2
    assert go.start is None and [p.text for p in go.points] == ["yes"]
    assert answer_records([hi, go])[1]["beta 0.1"] is None
    assert "Before training: er" in render(sweep, comparison)


def test_answers_of_earlier_versions_have_no_prompts(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1"}, steps=10, seeds=1)
    write(path / "trials/beta=0.1,seed=0", (10, [("Hi", "hello"), ("Go?", "yes")]), prompts=False)
    sweep = read_sweep(path)
    found = answers_of(compare([sweep]))
    assert [(each.prompt, each.points[0].text) for each in found] == [("", "Hi\nhello"), ("", "Go?\nyes")]
    assert ">Sample 2<" in render(sweep, compare([sweep]))


def test_many_points_are_folded(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": [0.1 + 0.01 * n for n in range(11)]}, steps=10, seeds=1)
    sweep = read_sweep(path)
    assert "<summary>3 more points</summary>" in render(sweep, compare([sweep]))
