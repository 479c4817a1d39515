"""Models that are compared with each other: in tasks, and by the validations of runs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minimind_ray.cli.compare import compare as compare_command
from minimind_ray.config.errors import UserError
from minimind_ray.sweep.measured import Measured, distinct_names
from minimind_ray.sweep.models import MEAN, ModelComparison, compare_models
from minimind_ray.sweep.models_export import sentences
from minimind_ray.tasks.items import Item, Scores, write_items
from tests.sweep.synthetic import make_sweep

EARLIER = [1] * 12 + [0] * 8
LATER = [1] * 11 + [0] + [1] * 6 + [0] * 2


def answers(model: str, task: str, right: Any, cluster_E: np.ndarray | None = None) -> Measured:
    value_E = np.asarray(right, float)
    item_E = np.arange(len(value_E))
    scores = Scores(item_E, item_E if cluster_E is None else cluster_E, value_E, np.ones(len(value_E)))
    return Measured(model, f"{model}.parquet", task, "acc", "max", scores)


def of_shares(rng: np.random.Generator, shares: dict[str, float], tasks: int, items: int) -> ModelComparison:
    ease_KE = rng.random((tasks, items))
    return compare_models(
        [[answers(name, f"t{k}", np.where(rng.random(items) < 0.6, ease_E, rng.random(items)) < share)
          for k, ease_E in enumerate(ease_KE)] for name, share in shares.items()]
    )  # fmt: skip


def test_six_gains_and_one_loss_in_20_items_prove_nothing() -> None:
    """MiniMind's headline of tool use, 12 of 20 against 17 of 20: exact McNemar p = 0.125."""
    comparison = compare_models([[answers("earlier", "tools", EARLIER)], [answers("later", "tools", LATER)]])
    [contest] = comparison.contests
    best, other = contest.standings
    assert (best.model, best.value.value, best.verdict) == ("later", 0.85, "best")
    assert (other.verdict, other.difference and round(other.difference.value, 9)) == ("not distinguishable", -0.25)
    assert other.needed and 22 <= other.needed <= 40
    assert sentences(comparison)[-1].startswith(
        f"tools: to tell earlier from later, about {other.needed} items would be needed instead of 20"
    )
    # As many items as are proposed, in the same proportion, are enough.
    times = 1 + other.needed // 20
    comparison = compare_models([[answers("a", "tools", EARLIER * times)], [answers("b", "tools", LATER * times)]])
    assert comparison.contests[0].standings[1].verdict == "worse on items like these"


def test_gains_without_a_loss_are_judged_exactly() -> None:
    """The mid-p value of 5 gains and no loss is 1/32, of 4 gains 1/16."""
    for gains, verdict in ((5, "worse on items like these"), (4, "not distinguishable")):
        models = [[answers("a", "t", [0] * gains + [1] * 20)], [answers("b", "t", [1] * (gains + 20))]]
        assert compare_models(models).contests[0].standings[1].verdict == verdict
    three = [*[[answers("a", "t", [0] * 5 + [1] * 20)]] * 2, [answers("b", "t", [1] * 25)]]
    assert {s.verdict for s in compare_models(three).contests[0].standings[1:]} == {"not distinguishable"}


def test_questions_on_one_text_count_once() -> None:
    rng = np.random.default_rng(0)
    right_C = rng.random((2, 25)) < np.array([[0.45], [0.85]])
    alone = [[answers(name, "t", right_E)] for name, right_E in zip("ab", np.repeat(right_C, 8, axis=1))]
    together = [
        [answers(name, "t", right_E, np.repeat(np.arange(25), 8))]
        for name, right_E in zip("ab", np.repeat(right_C, 8, axis=1))
    ]
    widths: list[float] = []
    for models in (alone, together):
        difference = compare_models(models).contests[0].standings[1].difference
        assert difference and difference.low is not None and difference.high is not None
        widths.append(difference.high - difference.low)
    assert widths[1] > 2 * widths[0]


def test_the_mean_over_tasks_is_sharper_than_each_task() -> None:
    comparison = of_shares(np.random.default_rng(0), {"a": 0.5, "b": 0.58}, tasks=7, items=120)
    verdicts = [contest.standings[1].verdict for contest in comparison.contests]
    assert verdicts.count("not distinguishable") >= 4
    mean = comparison.mean
    assert mean and (mean.task, mean.items) == (MEAN, 840)
    assert [(s.model, s.verdict) for s in mean.standings] == [("b", "best"), ("a", "worse on items like these")]
    values = [next(s for s in c.standings if s.model == "a").value.value for c in comparison.contests]
    assert mean.standings[1].value.value == pytest.approx(np.mean(values))
    single = comparison.contests[0].standings[0].value
    assert single.low and single.high and mean.standings[0].value.low and mean.standings[0].value.high
    ratio = (mean.standings[0].value.high - mean.standings[0].value.low) / (single.high - single.low)
    assert ratio == pytest.approx(7**-0.5, rel=0.1)


def test_equal_models_and_a_margin() -> None:
    models = [[answers("a", "t", EARLIER * 100)], [answers("b", "t", EARLIER * 100)]]
    comparison = compare_models(models)
    assert comparison.contests[0].standings[1].verdict == "not distinguishable"
    assert sentences(comparison)[-1] == "t: no difference between b and a was observed."
    comparison = compare_models(models, margin=0.05)
    assert comparison.contests[0].standings[1].verdict == "equal within 0.05"


def test_few_items_get_no_interval_and_no_part_in_the_mean() -> None:
    tasks = {"few": EARLIER[8:12], "some": EARLIER, "more": LATER}
    comparison = compare_models([[answers(name, task, right) for task, right in tasks.items()] for name in "ab"])
    assert comparison.contests[0].standings[1].value.low is None
    assert comparison.mean and comparison.mean.items == 40
    assert comparison.notes == ["Too few items for intervals: few.", "The mean is over 2 tasks; it leaves out few."]


def test_names_are_the_ends_of_paths() -> None:
    assert distinct_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert distinct_names(["x/a/best", "x/b/best"]) == ["a/best", "b/best"]
    assert distinct_names(["/a", "a"]) == ["/a", "a"]


def write(path: Path, right: list[int], *, task: str = "tools", prompt: str = "2 + 2 =") -> str:
    write_items(path, (Item(task, i, i, "acc", float(v), 1.0, prompt, "4", "4") for i, v in enumerate(right)))
    return str(path)


def test_files_of_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / "earlier.parquet", EARLIER), write(tmp_path / "later.parquet", LATER)]
    compare_command(files, json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["models"], found["mean"]) == (["earlier", "later"], None)
    [task] = found["tasks"]
    assert (task["task"], task["metric"], task["items"]) == ("tools", "acc", 20)
    assert [m["verdict"] for m in task["models"]] == ["best", "not distinguishable"]
    compare_command(files, csv=True)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["model"] for row in rows] == ["later", "earlier"]
    assert (float(rows[1]["difference"]), rows[0]["difference"]) == (pytest.approx(-0.25), "")
    compare_command(files)
    printed = capsys.readouterr().out
    assert "not distinguishable" in printed
    assert "items would be needed instead of 20" in printed


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"right": EARLIER[:10]}, r"one has 20 items, the other 10; evaluate both with the same .*--limit"),
        (
            {"right": EARLIER, "task": "sums"},
            "b.parquet has no results of task tools, which .*a.parquet has|sums, which",
        ),
        ({"right": EARLIER, "prompt": "1 + 1 = 2\n2 + 2 ="}, "item 0 has another text"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    files = [write(tmp_path / "a.parquet", EARLIER), write(tmp_path / "b.parquet", **other)]
    with pytest.raises(UserError, match=words):
        compare_command(files)


def test_runs_are_compared_by_what_they_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=1, steps=10)
    first, second = runs = [str(path) for path in sorted(sweep.glob("trials/*"))]
    compare_command(runs, json=True)
    found = json.loads(capsys.readouterr().out)
    assert [(t["task"], t["metric"], t["items"]) for t in found["tasks"]] == [("validation", "val/accuracy", 240)]
    compare_command(runs, metric="loss", csv=True)
    assert {row["metric"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))} == {"val/loss"}
    for path in runs:
        write(Path(path) / "tasks.parquet", EARLIER)
    compare_command(runs, json=True)
    assert [t["task"] for t in json.loads(capsys.readouterr().out)["tasks"]] == ["validation", "tools"]
    with pytest.raises(UserError, match=r"is a sweep and .* is not: compare sweeps with sweeps"):
        compare_command([first, str(sweep)])
    with pytest.raises(UserError, match="holds no sweep.json and is no run"):
        compare_command([first, str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="at least two models"):
        compare_command([second])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "max"}, "--mode is for sweeps"),
        ({"limit": 3}, "belong to tasks: give --tasks"),
        ({"task_path": Path("x")}, "belong to tasks: give --tasks"),
        ({"margin": -1.0}, "margin -1: give a number above 0"),
        ({"tasks": "sums"}, "has no results of task sums, only of tools"),
        ({"metric": "acc"}, "--metric is for sweeps and runs"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    file = write(tmp_path / "a.parquet", EARLIER)
    with pytest.raises(UserError, match=words):
        compare_command([file, file], **options)


def test_models_answer_the_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat templates may differ between models that answer here, as they have the same questions."""
    asked: list[Any] = []

    def run(model: str, suite: Any, **settings: Any) -> SimpleNamespace:
        asked.append((model, suite, settings["limit"]))
        right = EARLIER if model.endswith("old") else LATER
        return SimpleNamespace(
            items=[Item("tools", i, i, "acc", float(v), 1.0, model, "", "") for i, v in enumerate(right)]
        )

    monkeypatch.setattr("minimind_ray.stages.benchmark.load_suite", lambda *given: given)
    monkeypatch.setattr("minimind_ray.stages.benchmark.run_benchmark", run)
    monkeypatch.setattr("minimind_ray.train.run.resolve_model", Path)
    models, out = [str(tmp_path / name) for name in ("old", "new")], tmp_path / "items"
    compare_command(models, tasks="tools, ", limit=20, out=out, json=True)
    assert asked == [(model, (["tools"], None, None), 20) for model in models]
    assert json.loads(capsys.readouterr().out)["tasks"][0]["models"][0]["model"] == "new"
    assert {path.name for path in out.iterdir()} == {"old.parquet", "new.parquet"}
    with pytest.raises(UserError, match="another text, as with other examples in the prompt or another chat template"):
        compare_command([str(path) for path in out.iterdir()])
