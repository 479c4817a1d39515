"""What a comparison is judged by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_ray.cli.compare import compare as compare_command
from minimind_ray.config.errors import UserError
from minimind_ray.config.search import search_config
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.table import More
from minimind_ray.sweep.trials import read_sweep
from minimind_ray.tasks.items import Item, write_items
from tests.sweep.synthetic import make_sweep


def add_column(sweep: Path, name: str, mean_by_beta: dict[float, float]) -> None:
    """Add a column of scores to the results of every trial, whose mean depends on the trial's beta."""
    rng = np.random.default_rng(0)
    for path in sorted(sweep.glob("trials/*")):
        beta = json.loads((path / "trial.json").read_text())["point"]["dpo.beta"]
        table = pq.read_table(path / "validation.parquet")
        scores = mean_by_beta[beta] + 0.1 * rng.normal(size=len(table))
        pq.write_table(table.append_column(name, pa.array(scores)), path / "validation.parquet")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_sweep(tmp_path_factory.mktemp("metric") / "s", axes={"dpo.beta": "0.1,0.3"}, steps=10)
    add_column(path, "score", {0.1: 1.0, 0.3: 2.0})
    return path


def test_a_column_of_the_users_own(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_command([str(sweep)], metric="score", mode="max", json=True)
    found = json.loads(capsys.readouterr().out)
    best, other = found["points"]
    assert (found["metric"], best["point"], other["verdict"]) == ("score", {"dpo.beta": 0.3}, "worse")
    assert best["metric"]["value"] == pytest.approx(2, abs=0.05)
    compare_command([str(sweep)], metric="score", mode="min", json=True)
    assert json.loads(capsys.readouterr().out)["points"][0]["point"] == {"dpo.beta": 0.1}


def test_a_column_is_averaged_over_examples_and_a_stages_metric_over_tokens(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", stage="pretrain", axes={"optim.lr": "1e-3"}, quality=lambda point: 3.0, steps=10)
    sweep = read_sweep(path)
    trial = sweep.trials[0]
    assert trial.validation
    trial.validation.columns["score"] = np.arange(240.0)
    sweep.trials[1:] = []
    [row] = compare([sweep], metric="score", mode="max").rows
    assert row.metric and row.metric.value == pytest.approx(119.5)
    [row] = compare([sweep], metric="loss").rows
    columns = trial.validation.columns
    assert row.metric and row.metric.value == pytest.approx(columns["loss"].sum() / columns["count"].sum())


def test_the_direction_of_a_users_column_is_said(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_command([str(sweep)], metric="score", mode="max")
    assert "240 validation examples. Larger values of score are better. Intervals" in capsys.readouterr().out
    compare_command([str(sweep)], metric="score", mode="min")
    assert "Smaller values of score are better." in capsys.readouterr().out
    compare_command([str(sweep)], metric="loss")
    assert "are better" not in capsys.readouterr().out


def test_the_command_for_more_seeds_names_points_that_tune_knows(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [More(("beta 0.1", "beta 0.3"), 7, None, "", None, None)]
    monkeypatch.setattr("minimind_ray.sweep.compare._more", lambda *_: more)
    compare_command([str(sweep)])
    assert capsys.readouterr().out.endswith(f"--resume {sweep} --seeds 7 --points best,second\n")
    # By another metric, another point may be the best.
    compare_command([str(sweep)], metric="score", mode="max")
    assert capsys.readouterr().out.endswith("--seeds 7 --points beta=0.3 --points beta=0.1\n")


def test_a_stages_metric_has_its_own_mode(sweep: Path) -> None:
    assert compare([read_sweep(sweep)], metric="margin", mode="max").mode == "max"
    for name in ("margin", "val/margin"):
        comparison = compare([read_sweep(sweep)], metric=name)
        assert (comparison.metric, comparison.mode) == ("val/margin", "max")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "score"}, "metric score needs a mode"),
        ({"metric": "scor", "mode": "max"}, r"has no scor .* by another metric: .*score"),
        ({"metric": "score", "mode": "most"}, "mode most: give min if less"),
        ({"mode": "max"}, "mode max needs a metric"),
        (
            {"metric": "val/loss", "mode": "max"},
            "mode max contradicts metric val/loss: smaller values of it are better",
        ),
        ({"metric": "accuracy", "mode": "min"}, "mode min contradicts metric val/accuracy: larger values"),
        ({"margin": -0.1}, "margin -0.1: give a number above 0"),
        ({"margin": float("nan")}, "margin nan: give a number above 0"),
    ],
)
def test_bad_values(sweep: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compare([read_sweep(sweep)], **options)


def test_the_margin_is_the_sweeps_own_unless_it_is_given(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "a", axes={"dpo.beta": "0.1,0.3"}, steps=10)
    content = json.loads((path / "sweep.json").read_text())
    assert compare([read_sweep(path)]).margin == 0
    (path / "sweep.json").write_text(json.dumps({**content, "margin": 0.02}))
    assert compare([read_sweep(path)]).margin == 0.02
    assert compare([read_sweep(path)], margin=0.5).margin == 0.5
    assert compare([read_sweep(path)], margin=0.0).margin == 0
    other = read_sweep(make_sweep(tmp_path / "b", axes={"dpo.beta": "0.1,0.3"}, steps=10))
    with pytest.raises(UserError, match=r"the sweeps have the margins 0, 0.02: give a margin"):
        compare([read_sweep(path), other])
    with pytest.raises(UserError, match="margin"):
        search_config({"margin": -1})


def test_columns_of_other_metrics_do_not_matter(sweep: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    shutil.copytree(sweep, path)
    for file in path.glob("trials/*/validation.parquet"):
        table = pq.read_table(file)
        for name, column in {
            "vote": pa.array([None, *[1.0] * (len(table) - 1)]),
            "nothing": pa.nulls(len(table)),
            "answer": pa.array(["yes"] * len(table)),
            "right": pa.array([True] * len(table)),
        }.items():
            table = table.append_column(name, column)
        pq.write_table(table, file)
    found = read_sweep(path)
    assert [row.verdict for row in compare([found]).rows] == [row.verdict for row in compare([read_sweep(sweep)]).rows]
    assert [row.metric.value for row in compare([found], metric="right", mode="max").rows if row.metric] == [1, 1]
    for name in ("vote", "nothing"):
        rows = compare([found], metric=name, mode="max").rows
        assert {reason for row in rows for _, reason in row.left_out} == {
            "a value in its validation is not finite or too large"
        }
    with pytest.raises(UserError, match="the column answer has no numbers; judge the sweep by another metric"):
        compare([found], metric="answer", mode="max")


def add_tasks(sweep: Path, share_by_beta: dict[float, float], items: int = 200) -> None:
    """Add items of two tasks to every trial: answers, right as often as `share_by_beta` says, and nats of texts."""
    ease_E = np.random.default_rng(0).random(items)
    for i, path in enumerate(sorted(sweep.glob("trials/*"))):
        rng = np.random.default_rng([1, i])
        share = share_by_beta[json.loads((path / "trial.json").read_text())["point"]["dpo.beta"]]
        right_E = np.where(rng.random(items) < 0.7, ease_E, rng.random(items)) < share
        rows = [
            Item(*key, float(v), 1.0, "2 + 2 =", "4", "4")
            for name, values in (("acc", right_E), ("acc_norm", ~right_E))
            for key, v in ((("sums", e, e // 2, name), v) for e, v in enumerate(values))
        ]
        rows += [Item("texts", e, e, "bits_per_byte", 10 * (2 - share), 10.0, "", "", "") for e in range(items)]
        write_items(path / "tasks.parquet", rows)


def test_a_task_judges_a_sweep(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    shutil.copytree(sweep, path)
    add_tasks(path, {0.1: 0.3, 0.3: 0.8})
    compare_command([str(path)], metric="task/sums", json=True)
    found = json.loads(capsys.readouterr().out)
    best, other = found["points"]
    assert (found["mode"], found["examples"], found["clusters"]) == ("max", 200, 100)
    assert found["sentences"][0].startswith("200 items of 100 groups of items. Larger values of task/sums are better.")
    assert (best["point"], other["verdict"]) == ({"dpo.beta": 0.3}, "worse")
    assert best["metric"]["value"] == pytest.approx(0.8, abs=0.06)
    assert 0 < other["against_the_best"]["high"] - other["difference_to_best"]["value"] < 0.5
    compare_command([str(path)], metric="task/texts", json=True)
    assert json.loads(capsys.readouterr().out)["mode"] == "min"  # By the name of the task's metric.


def test_task_results_that_do_not_fit(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no trial has results of task sums; name tasks with eval\.tasks"):
        compare([read_sweep(sweep)], metric="task/sums")
    path = tmp_path / "s"
    shutil.copytree(sweep, path)
    add_tasks(path, {0.1: 0.3, 0.3: 0.8})
    with pytest.raises(UserError, match=r"results of task sum; judge the sweep by one of task/sums, task/texts"):
        compare([read_sweep(path)], metric="task/sum")
    with pytest.raises(UserError, match="mode min contradicts metric task/sums"):
        compare([read_sweep(path)], metric="task/sums", mode="min")
    first = next(path.glob("trials/*"))
    first.joinpath("tasks.parquet").rename(tmp_path / "tasks.parquet")
    [left_out] = [row.left_out for row in compare([read_sweep(path)], metric="task/sums").rows if row.left_out]
    assert left_out == ((first.name, "finished; no results of task sums were saved"),)
    table = pq.read_table(tmp_path / "tasks.parquet")
    pq.write_table(table.filter(pa.array([item < 150 for item in table["item"].to_pylist()])), first / "tasks.parquet")
    with pytest.raises(UserError, match="were measured on 200 and 150 examples|were measured on 150 and 200 examples"):
        compare([read_sweep(path)], metric="task/sums")
