"""The table of a sweep: which trials count, and what is said about the points."""

import csv
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_ray.cli.compare import compare as compare_command
from minimind_ray.config.errors import UserError
from minimind_ray.data.claim import claimed
from minimind_ray.sweep.compare import compare, seconds_to
from minimind_ray.sweep.export import importance_text, to_json
from minimind_ray.sweep.report import matrix, render
from minimind_ray.sweep.table import Comparison
from minimind_ray.sweep.trials import NOT_FINITE, read_sweep
from minimind_ray.train.loop import TrainingRun
from minimind_ray.train.step import NonFiniteError
from tests.sweep.synthetic import BETA_LR, make_full_sweep, make_sweep

pytestmark = pytest.mark.unit


def by_point(comparison: Comparison) -> dict[tuple[Any, ...], Any]:
    return {tuple(row.point.values()): row for row in comparison.rows}


def test_the_table_of_a_sweep(tmp_path: Path) -> None:
    comparison = compare([read_sweep(make_full_sweep(tmp_path / "s"))])
    rows = by_point(comparison)
    assert len(rows) == 8
    assert comparison.rows[0].verdict == "best"
    assert tuple(comparison.rows[0].point.values()) == (0.1, 1e-5)
    assert [row.verdict for row in comparison.rows].count("worse") >= 2
    assert [row.verdict for row in comparison.rows].count("not distinguishable") >= 1
    values = [row.metric.value for row in comparison.rows if row.metric]
    assert values[:7] == sorted(values[:7]) and comparison.rows[7].diverged_seeds == 1
    assert rows[0.05, 1e-5].status in ("1 finished, 1 failed", "1 failed, 1 finished")
    assert len(rows[0.05, 1e-5].compared) == 1
    assert comparison.winner in comparison.rows[0].compared
    assert comparison.winner.best("val/loss") == min(t.best("val/loss") or 9 for t in comparison.rows[0].compared)
    for row in comparison.rows:
        assert row.seconds == pytest.approx(sum(t.seconds for t in row.trials))
        assert (row.difference is None) == (row.verdict == "best")
    assert comparison.low_PP.shape == (8, 8)
    # The points' costs are their parts of the sweep's cost: 2 places for 20 minutes at 1.8 an hour.
    seconds = sum(row.seconds for row in comparison.rows)
    assert [row.cost for row in comparison.rows] == pytest.approx([r.seconds / seconds * 1.2 for r in comparison.rows])


def test_equal_points_are_not_distinguishable(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", quality=lambda point: 0.5)
    verdicts = [row.verdict for row in compare([read_sweep(path)]).rows]
    assert verdicts == ["best"] + 7 * ["not distinguishable"]


@pytest.mark.parametrize(("metric", "mode"), [("val/accuracy", "max"), ("val/margin", "max")])
def test_higher_is_better(tmp_path: Path, metric: str, mode: str) -> None:
    path = make_sweep(
        tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, metric=metric, mode=mode, seed_noise=0.001,
        quality=lambda point: 1.0 if point["dpo.beta"] == 0.3 else 0.1,
    )  # fmt: skip
    best, worse = compare([read_sweep(path)]).rows
    assert best.point == {"dpo.beta": 0.3}
    # Two points with two seeds have 1 degree of freedom; without noise between them that is enough.
    assert worse.verdict == "worse"
    assert worse.difference and worse.difference.high and worse.difference.high < 0
    values = [t.best(metric) for t in best.trials]
    assert best.metric and best.metric.value == pytest.approx(np.mean(values))  # pyright: ignore


def token_sweep(path: Path, **options: Any) -> Path:
    return make_sweep(
        path, stage="pretrain", axes={"optim.lr": "1e-4,1e-3"}, quality=lambda p: 3.0 if p["optim.lr"] > 5e-4 else 3.3,
        seed_noise=0.002, **options,
    )  # fmt: skip


def test_bits_per_byte_is_the_loss_in_another_unit(tmp_path: Path) -> None:
    loss = compare([read_sweep(token_sweep(tmp_path / "a"))]).rows
    bits = compare([read_sweep(token_sweep(tmp_path / "b", metric="val/bits_per_byte"))]).rows
    assert [row.verdict for row in bits] == [row.verdict for row in loss] == ["best", "worse"]
    for a, b in zip(loss, bits):
        assert a.metric and b.metric
        assert b.metric.value == pytest.approx(a.metric.value / math.log(2) / 3)


def test_running_and_failed_points_have_no_verdict(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.2,0.3"}, seeds=1, running=1, failed=2,
                      quality=lambda point: 0.5)  # fmt: skip
    [gone] = [row.status for row in compare([read_sweep(path)]).rows if row.point["dpo.beta"] == 0.2]
    assert gone == "stopped (its process is gone)"
    with claimed(path):
        comparison = compare([read_sweep(path)])
    rows = by_point(comparison)
    assert [rows[beta,].verdict for beta in (0.1, 0.2, 0.3)] == ["best", None, None]
    assert [rows[beta,].status for beta in (0.1, 0.2, 0.3)] == ["finished", "running", "failed"]
    assert rows[0.2,].metric.low is None
    assert any("One seed" in note for note in comparison.notes)
    for trial in path.glob("trials/*/validation.parquet"):
        trial.unlink()
    comparison = compare([read_sweep(path)])
    assert [row.verdict for row in comparison.rows] == [None, None, None]
    assert comparison.winner is None


def test_a_stopped_point_is_never_the_best(tmp_path: Path) -> None:
    def quality(point: dict[str, Any]) -> float:
        return 3.0 if point["dpo.beta"] == 0.3 else 0.1

    # The best by far was stopped. One finished trial says nothing about how the others would have ended.
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=1, stopped=1, quality=quality)
    comparison = compare([read_sweep(path)])
    assert [(row.point["dpo.beta"], row.verdict) for row in comparison.rows] == [(0.1, "best"), (0.3, None)]
    assert comparison.winner and comparison.winner.point["dpo.beta"] == 0.1
    stopped = comparison.rows[1]
    assert stopped.early_step == 24 and stopped.metric and stopped.metric.low is None
    [trial] = [trial for trial in read_sweep(path).trials if trial.state == "early-stopped"]
    assert stopped.metric.value == next(line["val/loss"] for line in trial.metrics if line["step"] == 24)
    assert any("look too good" in note and "step 24" in note for note in comparison.notes)
    # Another sweep has its own last step with a validation of all trials.
    longer = make_sweep(tmp_path / "u", axes={"dpo.beta": "0.1,0.3"}, seeds=1, stopped=1, steps=80)
    notes = compare([read_sweep(path), read_sweep(longer)]).notes
    assert any(note.endswith("all trials were validated, steps 24 and 32.") for note in notes)
    # Two finished trials do, and the point is still not the best.
    path = make_sweep(tmp_path / "t", axes={"dpo.beta": "0.1,0.2,0.3"}, seeds=1, stopped=2, quality=quality)
    comparison = compare([read_sweep(path)])
    assert comparison.rows[0].point["dpo.beta"] != 0.3 and comparison.winner in comparison.rows[0].compared
    [row] = [row for row in comparison.rows if row.point["dpo.beta"] == 0.3]
    assert (row.seeds, row.stopped_seeds, row.early_step) == (0, 1, None) and row.verdict


def test_if_no_trial_finished_there_is_a_best_so_far_without_a_verdict(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1"}, seeds=1, stopped=0)
    comparison = compare([read_sweep(path)])
    assert [row.verdict for row in comparison.rows] == [None]
    assert comparison.winner and comparison.winner.state == "early-stopped"
    assert comparison.notes[0] == (
        "No point has a verdict yet, because too few trials have finished. The values are those at the last step at "
        "which all trials were validated, step 24."
    )
    assert not any("look too good" in note for note in comparison.notes)


def test_a_point_with_a_stopped_seed_that_cannot_be_predicted_gets_no_verdict(tmp_path: Path) -> None:
    # Of the point 0.1, one seed finished and one was stopped: its mean over the finished seed would be too good.
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=2, stopped=2, failed=3, running=1)
    comparison = compare([read_sweep(path)])
    [row] = [row for row in comparison.rows if row.point["dpo.beta"] == 0.1]
    assert row.verdict is None and row.compared == () and row.early_step == 24
    assert dict(row.left_out) == {
        "beta=0.1,seed=0": "the ends of this point's stopped trials cannot be predicted",
        "beta=0.1,seed=1": "early-stopped; too few trials finished to predict its end",
    }


def test_a_loss_that_is_not_finite_is_left_out_by_name(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=1)
    file = path / "trials/beta=0.3,seed=0/validation.parquet"
    table = pq.read_table(file)
    loss = table["loss"].to_numpy().copy()
    loss[0] = np.nan
    pq.write_table(table.set_column(1, "loss", pa.array(loss)), file)
    comparison = compare([read_sweep(path)])
    assert [row.verdict for row in comparison.rows] == ["best", None]
    assert any("beta=0.3,seed=0" in note for note in comparison.notes)


def test_a_point_that_lost_a_seed_may_look_too_good(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, failed=1)
    set_error(path / "trials/beta=0.3,seed=0", "out of memory")
    assert any(note.endswith("lost trials: beta 0.3.") for note in compare([read_sweep(path)]).notes)
    (path / "trials/beta=0.1,seed=1/validation.parquet").unlink()
    assert any(note.endswith("lost trials: beta 0.1, beta 0.3.") for note in compare([read_sweep(path)]).notes)
    # A point without any result does not look good.
    path = make_sweep(tmp_path / "t", axes={"dpo.beta": "0.1,0.3"}, seeds=1, failed=1)
    assert not any("lost trials" in note for note in compare([read_sweep(path)]).notes)


def set_error(trial: Path, error: str) -> None:
    """Change the error of a failed trial."""
    run = json.loads((trial / "run.json").read_text())
    (trial / "run.json").write_text(json.dumps({**run, "error": error}))


def one_good_point(path: Path, **options: Any) -> Path:
    """Three points with three seeds, of which beta 0.1 has by far the best loss."""
    return make_sweep(path, axes={"dpo.beta": "0.02,0.1,0.3"}, seeds=3, steps=10,
                      quality=lambda point: 1.4 if point["dpo.beta"] == 0.1 else 0.9, **options)  # fmt: skip


@pytest.mark.parametrize("how", ["training", "validation", "finite"])
def test_a_worse_divergence_gives_no_better_verdict(tmp_path: Path, how: str) -> None:
    path = one_good_point(tmp_path / "s", failed=4 if how == "training" else None)
    if how != "training":
        added = 8.0 if how == "finite" else math.nan
        put_column(path, "loss", lambda loss_E: loss_E + added, "beta=0.1,seed=1")
    comparison = compare([read_sweep(path)])
    assert [row.verdict for row in comparison.rows] == ["best", "not distinguishable", "not distinguishable"]
    lost = comparison.rows[2]
    assert lost.point == {"dpo.beta": 0.1} and lost.diverged_seeds == int(how != "finite")
    if how != "finite":
        assert lost.metric and lost.metric.low is None and lost.difference and lost.difference.low is None
        assert not lost.may_be_best and lost.label not in [label for more in comparison.more for label in more.pair]
        note = next(note for note in comparison.notes if "divergence" in note)
        assert note.startswith("beta 0.1 lost 1 of 3 seeds by divergence: the loss was not finite.")
        assert not any("lost trials" in note for note in comparison.notes)
        assert "no diverged trial" in to_json(comparison)["sentences"][1]
        assert "no interval, not distinguishable" in render(read_sweep(path), comparison)
        json.dumps(to_json(comparison), allow_nan=False)


@pytest.mark.parametrize("metric", ["val/loss", "val/accuracy"])
def test_a_point_whose_other_seeds_are_worse_is_worse(tmp_path: Path, metric: str) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.02,0.1,0.3"}, seeds=3, steps=10, failed=4,
                      quality=lambda point: 0.1 if point["dpo.beta"] == 0.1 else 1.4)  # fmt: skip
    comparison = compare([read_sweep(path)], metric=metric, margin=10.0)
    assert [row.verdict for row in comparison.rows] == ["best", "equal within 10", "worse"]


def test_if_every_point_lost_a_seed_by_divergence_none_is_worse(tmp_path: Path) -> None:
    path = one_good_point(tmp_path / "s")
    put_column(path, "loss", lambda loss_E: loss_E * math.nan, "*seed=1")
    comparison = compare([read_sweep(path)])
    assert [row.verdict for row in comparison.rows] == ["best", "not distinguishable", "not distinguishable"]
    assert all(row.may_be_best for row in comparison.rows) and comparison.headline is None
    assert any("no point is called worse than another" in note for note in comparison.notes)


def test_another_failure_is_no_divergence(tmp_path: Path) -> None:
    path = one_good_point(tmp_path / "s", failed=4)
    set_error(path / "trials/beta=0.1,seed=1", "out of memory")
    comparison = compare([read_sweep(path)])
    assert [row.verdict for row in comparison.rows] == ["best", "worse", "worse"]
    assert [row.diverged_seeds for row in comparison.rows] == [0, 0, 0]


def test_the_error_of_training_is_known_as_a_divergence() -> None:
    loop = SimpleNamespace(recorder=None, _packs=[], directory=SimpleNamespace(where="run"),
                           context=SimpleNamespace(rank=0))  # fmt: skip
    with pytest.raises(UserError) as refused:
        TrainingRun._refuse(loop, NonFiniteError(3, 2.5, math.inf))  # pyright: ignore
    assert NOT_FINITE.search(str(refused.value))


def put_column(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray], trials: str = "*") -> None:
    """Change a column of the trials' results."""
    for file in path.glob(f"trials/{trials}/validation.parquet"):
        table = pq.read_table(file)
        values = pa.array(change(table[name].to_numpy().astype(float)))
        pq.write_table(table.set_column(table.column_names.index(name), name, values), file)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [1e200, 1e307])
def test_a_loss_that_is_too_large_is_left_out_by_name(tmp_path: Path, loss: float) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.2,0.3"})
    put_column(path, "loss", lambda loss_E: np.full_like(loss_E, loss), "beta=0.3,seed=0")
    comparison = compare([read_sweep(path)])
    assert [len(row.compared) for row in comparison.rows if row.point["dpo.beta"] == 0.3] == [1]
    assert any("beta=0.3,seed=0 (a value in its validation is not finite or too large)" in n for n in comparison.notes)
    json.dumps(to_json(comparison), allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_examples_that_count_for_nothing(tmp_path: Path) -> None:
    path = token_sweep(tmp_path / "s", examples=300)
    put_column(path, "count", lambda count_E: count_E * (np.arange(300) < 20))
    comparison = compare([read_sweep(path)])
    assert comparison.examples == comparison.clusters == 20
    assert all(row.metric and row.metric.low and row.metric.high for row in comparison.rows)
    put_column(path, "count", lambda count_E: count_E * (np.arange(300) < 1))
    comparison = compare([read_sweep(path)])
    assert [row.verdict for row in comparison.rows] == ["best", "not distinguishable"]
    assert "1 validation example(s) are too few" in comparison.notes[0]
    json.dumps(to_json(comparison), allow_nan=False)
    put_column(path, "count", np.zeros_like)
    with pytest.raises(UserError, match="no example counts for val/loss"):
        compare([read_sweep(path)])


def test_several_sweeps_in_one_table(tmp_path: Path) -> None:
    a = make_sweep(tmp_path / "a", axes={"dpo.beta": "0.1,0.3"}, quality=lambda point: 0.5)
    b = make_sweep(tmp_path / "b", axes={"optim.lr": "1e-6,1e-5"}, quality=lambda point: 0.9)
    comparison = compare([read_sweep(a), read_sweep(b)])
    assert comparison.keys == ["dpo.beta", "optim.lr"]
    assert comparison.rows[0].sweep == "b"
    # What a sweep did not vary stands in its config.
    assert {(row.sweep, *row.point.values()) for row in comparison.rows} == {
        ("a", 0.1, 5e-7), ("a", 0.3, 5e-7), ("b", 0.1, 1e-6), ("b", 0.1, 1e-5),
    }  # fmt: skip


def test_labels_name_the_sweep_where_there_are_several(tmp_path: Path) -> None:
    axes = {"dpo.beta": "0.1,0.3"}
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "other/b"]
    (tmp_path / "other").mkdir()
    sweeps = [read_sweep(make_sweep(path, axes=axes, steps=10, quality=lambda point: 0.5)) for path in paths]
    assert {row.label for row in compare(sweeps[:2]).rows} == {
        "beta 0.1 (a)", "beta 0.3 (a)", "beta 0.1 (b)", "beta 0.3 (b)",
    }  # fmt: skip
    assert len({row.label for row in compare(sweeps).rows}) == 6
    assert {row.label for row in compare(sweeps[:1]).rows} == {"beta 0.1", "beta 0.3"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"metric": "val/margin", "mode": "max"}, "same metric"),
        ({"examples": 50}, "240 and 50 examples"),
        ({"example_seed": 2}, "different prepared data"),
    ],
)
def test_sweeps_that_do_not_fit_together(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    axes = {"dpo.beta": "0.1,0.3"}
    sweeps = [
        read_sweep(make_sweep(tmp_path / "a", axes=axes, quality=lambda point: 0.5)),
        read_sweep(make_sweep(tmp_path / "b", axes=axes, quality=lambda point: 0.5, **other)),
    ]
    with pytest.raises(UserError, match=words):
        compare(sweeps)


def test_token_counts_must_agree(tmp_path: Path) -> None:
    path = token_sweep(tmp_path / "a")
    file = next(path.glob("trials/*/validation.parquet"))
    table = pq.read_table(file)
    pq.write_table(table.set_column(2, "count", pa.array(table["count"].to_numpy() + 1)), file)
    with pytest.raises(UserError, match="different lengths"):
        compare([read_sweep(path)])


def test_metrics_without_results_per_example(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "a", axes={"dpo.beta": "0.1"}, quality=lambda point: 0.5, metric="val/perplexity")
    with pytest.raises(UserError, match=r"no perplexity .*accuracy"):
        compare([read_sweep(path)])
    path = make_sweep(tmp_path / "b", axes={"dpo.beta": "0.1"}, quality=lambda point: 0.5, metric="val/bits_per_byte")
    with pytest.raises(UserError, match="no bytes"):
        compare([read_sweep(path)])


def test_json_and_csv_are_all_that_stdout_gets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_full_sweep(tmp_path / "s")
    compare_command([path], json=True)
    parsed = json.loads(capsys.readouterr().out)
    assert parsed == json.loads(json.dumps(to_json(compare([read_sweep(path)]))))
    assert parsed["points"][0]["verdict"] == "best"
    compare_command([path], csv=True)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 8
    assert float(rows[0]["val/loss"]) == parsed["points"][0]["metric"]["value"]
    with pytest.raises(UserError, match="cannot be combined"):
        compare_command([path], json=True, csv=True)


def test_the_printed_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_full_sweep(tmp_path / "[red]s")
    compare_command([path])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["beta", "lr", "seeds", "val/loss"]
    assert "best" in lines[1]
    assert "not distinguishable" in out
    assert "failed: beta=0.05,lr=1e-5,seed=0: step 24" in out


def test_a_few_examples_tell_nothing_apart(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.02,0.1,0.3"}, examples=3, steps=10)
    comparison = compare([read_sweep(sweep)])
    assert [row.verdict for row in comparison.rows] == ["best", *["not distinguishable"] * 2]
    assert all(row.metric and row.metric.low is None for row in comparison.rows)
    assert comparison.winner and len(comparison.notes) == 1
    assert "3 validation example(s) are too few" in comparison.notes[0]
    page = render(read_sweep(sweep), comparison)
    assert "Differences to the best" not in page and "All pairs" not in page
    one = make_sweep(tmp_path / "one", axes={"dpo.beta": "0.02,0.1"}, examples=1, steps=10, seeds=1)
    assert "1 validation example(s) are too few" in compare([read_sweep(one)]).notes[0]


def test_only_a_point_that_is_worse_is_shown_as_worse(tmp_path: Path) -> None:
    equal = make_sweep(tmp_path / "equal", axes={"dpo.beta": "0.1,0.3"}, quality=lambda point: 0.5)
    worse = make_sweep(tmp_path / "worse", axes={"dpo.beta": "0.1,0.3"}, quality=lambda point: 1 - point["dpo.beta"])
    for sweep, shown in ((equal, False), (worse, True)):
        found = compare([read_sweep(sweep)])
        assert (found.rows[-1].verdict == "worse") == shown
        assert ('class="verdict worse"' in render(read_sweep(sweep), found)) == shown


def put_clusters(path: Path, cluster_E: np.ndarray) -> None:
    """Write the clusters of the examples into all trials' results."""
    for file in path.glob("trials/*/validation.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column("cluster", pa.array(cluster_E)), file)


def test_examples_of_one_prompt_count_as_one_cluster(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"})
    put_clusters(path, np.arange(240) // 6)
    comparison = compare([read_sweep(path)])
    assert (comparison.examples, comparison.clusters, comparison.cluster_noun) == (240, 40, "prompts")
    assert "whole prompts are resampled" in comparison.method
    few = make_sweep(tmp_path / "few", axes={"dpo.beta": "0.1,0.3"})
    put_clusters(few, np.arange(240) // 24)
    assert any("Only 10 prompts" in note for note in compare([read_sweep(few)]).notes)
    none = make_sweep(tmp_path / "none", axes={"dpo.beta": "0.1,0.3"})
    put_clusters(none, np.arange(240) // 60)
    comparison = compare([read_sweep(none)])
    assert "too few to compare points, because their number of prompts is only 4:" in comparison.notes[0]
    assert all(row.metric and row.metric.low is None for row in comparison.rows) and comparison.headline is None


def test_groups_of_examples_that_do_not_agree(tmp_path: Path) -> None:
    sweeps = [tmp_path / "a", tmp_path / "b"]
    for path in sweeps:
        make_sweep(path, axes={"dpo.beta": "0.1,0.3"})
    put_clusters(sweeps[0], np.arange(240) // 6)
    comparison = compare([read_sweep(path) for path in sweeps])
    assert (comparison.clusters, comparison.cluster_noun) == (40, "prompts")
    [note] = [note for note in comparison.notes if "smaller groups" in note]
    assert "trials/beta=0.1,seed=0 divides these 40 prompts" in note.replace(str(sweeps[1]) + "/", "")
    put_clusters(sweeps[1], np.arange(240) // 3)
    assert compare([read_sweep(path) for path in sweeps]).clusters == 40
    overlapping = make_sweep(tmp_path / "c", axes={"dpo.beta": "0.1,0.3"})
    put_clusters(overlapping, (np.arange(240) + 2) // 4)
    with pytest.raises(UserError, match=r"group the validation examples in different ways.* eval\.cluster"):
        compare([read_sweep(sweeps[0]), read_sweep(overlapping)])


def test_one_seed_compares_trained_models_only(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=1, quality=lambda p: 1 - p["dpo.beta"] * 2)
    comparison = compare([read_sweep(path)], margin=100.0)
    assert [row.verdict for row in comparison.rows] == ["best", "differs on these examples; one seed"]
    assert "each point has one seed" in comparison.method and "within 100" not in comparison.method
    assert any("not their settings" in note for note in comparison.notes)


def test_pbt_compares_trained_models_only(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.2,0.3"}, seeds=3, seed_noise=0.005,
                      quality=lambda point: 1 - 2 * point["dpo.beta"])  # fmt: skip
    line = {"step": 20, "point": {"dpo.beta": 0.1}}
    (path / "trials/beta=0.3,seed=0/lineage.jsonl").write_text(json.dumps(line) + "\n")
    comparison = compare([read_sweep(path)], margin=100.0)
    assert {row.verdict for row in comparison.rows[1:]} == {"differs on these examples; pbt"}
    assert "not independent runs of their settings" in comparison.method and "within 100" not in comparison.method
    text = to_json(comparison)["sentences"][1]
    assert "the best of these trained models (pbt)" in text
    assert "≠ differs on these examples; pbt." in render(read_sweep(path), comparison)
    put_column(path, "loss", lambda loss_E: loss_E * 0 + 1 + np.arange(240) % 7)
    comparison = compare([read_sweep(path)])
    assert [row.verdict for row in comparison.rows[1:]] == ["not distinguishable"] * 2 and comparison.more == []


@pytest.mark.parametrize("seeds", [1, 2])
def test_pbt_needs_no_more_seeds(seeds: int, tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=seeds, seed_noise=3.0)
    line = {"step": 20, "point": {"dpo.beta": 0.1}}
    (path / "trials/beta=0.3,seed=0/lineage.jsonl").write_text(json.dumps(line) + "\n")
    comparison = compare([read_sweep(path)])
    assert ("the part of the seeds" in comparison.method) == (seeds > 1)
    words = ("use --seeds", "third")
    assert not any(word in sentence for word in words for sentence in to_json(comparison)["sentences"])


def test_runs_of_different_lengths_count_with_their_ends(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=3, quality=lambda point: 0.5)
    for run in path.glob("trials/beta=0.3,*/run.json"):
        lines = (run.parent / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run.parent / "metrics.jsonl").write_text("".join(lines[:30]))
        run.write_text(json.dumps({**json.loads(run.read_text()), "steps": 30, "planned_steps": 30}))
    comparison = compare([read_sweep(path)])
    assert [(row.seeds, row.stopped_seeds, row.left_out) for row in comparison.rows] == [(3, 0, ())] * 2
    assert [row.verdict for row in comparison.rows] == ["best", "not distinguishable"]
    assert any("different numbers of steps, 30 to 60" in note for note in comparison.notes)
    # Without an end, a step of a long run cannot be compared with the same step of a short one.
    for run in path.glob("trials/*/run.json"):
        run.write_text(json.dumps({"planned_steps": 60, **json.loads(run.read_text()), "state": "stopped"}))
    assert [row.early_step for row in compare([read_sweep(path)]).rows] == [None, None]


def test_points_that_are_equal_within_a_margin(tmp_path: Path) -> None:
    path = make_sweep(
        tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=3, quality=lambda point: 0.5, seed_noise=0.005
    )
    comparison = compare([read_sweep(path)], margin=0.1)
    assert [row.verdict for row in comparison.rows] == ["best", "equal within 0.1"]
    assert "two one-sided tests at 2.5 % each" in comparison.method
    assert [row.verdict for row in compare([read_sweep(path)], margin=1e-4).rows] == ["best", "not distinguishable"]


def test_every_row_says_which_seeds_count(tmp_path: Path) -> None:
    comparison = compare([read_sweep(make_full_sweep(tmp_path / "s"))])
    rows = by_point(comparison)
    assert all(row.seeds + row.stopped_seeds == len(row.compared) for row in comparison.rows)
    assert rows[0.05, 1e-5].left_out == (("beta=0.05,lr=1e-5,seed=0", "failed"),)
    assert (rows[0.02, 1e-6].seeds, rows[0.02, 1e-6].stopped_seeds) == (1, 1)
    assert any("predicted end" in note for note in comparison.notes)
    assert any("beta=0.05,lr=1e-5,seed=0 (failed)" in note for note in comparison.notes)
    assert comparison.rows[0].may_be_best and not comparison.rows[-1].may_be_best
    # The best of eight was picked, so its value is corrected upwards.
    best = comparison.rows[0].metric
    assert comparison.headline and best and comparison.headline.value > best.value
    open_rows = [row for row in comparison.rows if row.verdict == "not distinguishable"]
    undecided = [row.label for row in open_rows if not row.diverged_seeds]
    assert [more.pair for more in comparison.more] == [(comparison.rows[0].label, label) for label in undecided]


@pytest.mark.parametrize("failed", [None, 4])
def test_more_seeds_are_more_than_both_points_have(tmp_path: Path, failed: int | None) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=6, quality=lambda p: p["dpo.beta"] / 4,
                      examples=5000, steps=10, seed_noise=0.1, failed=failed)  # fmt: skip
    for seed in range(2 if failed is None else 3, 6):
        shutil.rmtree(path / f"trials/beta=0.1,seed={seed}")
    if failed:
        set_error(path / "trials/beta=0.1,seed=2", "out of memory")
    [more] = compare([read_sweep(path)]).more
    assert more.seeds and more.seeds > 6 and more.seconds
    trial = read_sweep(path).trials[0]
    # A resume trains the failed seed again, so the time is the same as if it had never been there.
    assert more.seconds == pytest.approx(trial.seconds * (more.seeds - 6 + more.seeds - 2), rel=0.1)


def test_a_stopped_trial_needs_only_its_rest(tmp_path: Path) -> None:
    trials = [replace(trial, seconds=10.0) for trial in read_sweep(make_full_sweep(tmp_path / "s")).trials[:3]]
    assert seconds_to(5, trials) == 20.0
    assert seconds_to(5, [*trials[:2], replace(trials[2], state="stopped", seconds=4.0)]) == 26.0
    assert seconds_to(5, [*trials[:2], replace(trials[2], state="failed", seconds=4.0)]) == 30.0
    assert seconds_to(5, [*trials[:2], replace(trials[2], state="early-stopped", seconds=4.0)]) == 20.0


def test_a_point_whose_seeds_differ_more_than_others_is_named(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.02,0.05,0.1,0.3"}, seeds=5, quality=lambda point: 0.5)
    for number, file in enumerate(sorted(path.glob("trials/beta=0.3,*/validation.parquet"))):
        table = pq.read_table(file)
        loss = table["loss"].to_numpy() + 0.5 * (-1) ** number
        pq.write_table(table.set_column(table.column_names.index("loss"), "loss", pa.array(loss)), file)
    [note] = [note for note in compare([read_sweep(path)]).notes if "differ much more" in note]
    assert "beta 0.3" in note and "beta 0.1" not in note


def test_an_interval_that_says_nothing_is_left_out(tmp_path: Path) -> None:
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, quality=lambda point: 0.5, seed_noise=0.0)
    for file in path.glob("trials/*seed=1/validation.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.set_column(1, "loss", pa.array(table["loss"].to_numpy() + 1.0)), file)
    comparison = compare([read_sweep(path)])
    assert all(row.metric and row.metric.low is None for row in comparison.rows)
    assert comparison.rows[1].difference and comparison.rows[1].difference.low is not None
    put_column(path, "loss", lambda loss_E: loss_E + 2.0, "beta=0.3,seed=0")
    difference = compare([read_sweep(path)]).rows[1].difference
    assert difference and difference.low is None and difference.high is None
    rows = [row for row in compare([read_sweep(path)]).rows if row.verdict]
    hover = matrix(compare([read_sweep(path)]), rows)[1][0][1]
    assert re.search(r"minus beta 0\.\d: no interval, not distinguishable", hover)
    assert any("One more seed of each point would narrow them to about 28% of" in note for note in comparison.notes)


@pytest.mark.slow
def test_a_comparison_has_the_importance_of_its_axes(tmp_path: Path) -> None:
    full = compare([read_sweep(make_sweep(tmp_path / "full", seeds=3, steps=10))])
    lr, beta, both = full.importance
    assert [lr.key, beta.key, both.key] == ["optim.lr", "dpo.beta", "dpo.beta × optim.lr"]
    assert lr.low > 0.8 and both.low == 0
    open_ = [replace(each, low=0.0, high=0.95) for each in full.importance]
    assert "so wide" in importance_text(replace(full, importance=open_)) and "so wide" not in importance_text(full)
    assert ": lr 9" in importance_text(full) and ", beta × lr 0 % (0 to" in importance_text(full)
    assert to_json(full)["importance"][0] == {"key": lr.key, "share": lr.share, "low": lr.low, "high": lr.high}
    assert not any("importance" in note.lower() for note in full.notes)
    one = compare([read_sweep(make_sweep(tmp_path / "one", seeds=1, steps=10, axes=BETA_LR, failed=2))])
    # Of 8 points 7 are left, which are no full grid.
    assert one.importance == [] and any("Too few points to tell how important" in note for note in one.notes)
    lost = {"dpo.beta": "0.02,0.05,0.1,0.3,1", "optim.lr": "1e-6,1e-5,1e-4"}
    lost = compare([read_sweep(make_sweep(tmp_path / "lost", seeds=1, steps=10, axes=lost, failed=2))])
    assert lost.importance
    assert any("rests on the 14 points that are compared" in note for note in lost.notes)
    assert any("counts luck with the seed as an effect" in note for note in lost.notes)
