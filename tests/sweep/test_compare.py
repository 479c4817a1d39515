"""The statistics against known truth, and the table that shows them."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind_ray.cli.compare import compare as compare_command
from minimind_ray.config.errors import UserError
from minimind_ray.data.claim import claimed
from minimind_ray.sweep.compare import Comparison, compare
from minimind_ray.sweep.export import to_json
from minimind_ray.sweep.report import render
from minimind_ray.sweep.statistics import Statistics, split_seeds, statistics
from minimind_ray.sweep.trials import read_sweep
from tests.sweep.synthetic import make_full_sweep, make_sweep

pytestmark = pytest.mark.unit


def simulate(
    rng: np.random.Generator, truth: Sequence[float], *, seeds: int = 2, examples: int = 100, common: float = 0.02,
    own: float = 0.03, ease: float = 0.4, noise: float = 0.2, draws: int = 400,
) -> tuple[Statistics, dict[str, Any]]:  # fmt: skip
    """A crossed design of points, seeds and examples of unequal length, each with its own random effect."""
    point_T, seed_T = np.repeat(np.arange(len(truth)), seeds), np.tile(np.arange(seeds), len(truth))
    trials = len(point_T)
    length_E = rng.integers(5, 100, examples).astype(float)
    level_T = np.array(truth)[point_T] + rng.normal(0, common, seeds)[seed_T] + rng.normal(0, own, trials)
    x_TE = level_T[:, None] + rng.normal(0, ease, examples) + rng.normal(0, noise, (trials, examples))
    data = {"numerator_TE": x_TE * length_E, "denominator_TE": np.tile(length_E, (trials, 1)),
            "point_T": point_T, "seed_T": seed_T}  # fmt: skip
    return statistics(**data, draws=draws, random_seed=int(rng.integers(2**31))), data


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    # 200 sweeps of 4 equal points: for each point 95 % of intervals, and 95 % of sweeps for all differences at once.
    rng = np.random.default_rng(0)
    covered, together, apart = [], [], []
    for _ in range(200):
        s, _ = simulate(rng, [2.0] * 4)
        covered.append((s.low_P <= 2) & (s.high_P >= 2))
        together.append(((s.low_PP <= 0) & (s.high_PP >= 0)).all())
        best = int(np.argmin(s.mean_P))
        apart.append((s.low_PP[:, best] > 0).any())
    assert 0.93 <= np.mean(covered) <= 0.995
    assert 0.90 <= np.mean(together) <= 0.995
    assert np.mean(apart) <= 0.10


@pytest.mark.slow
def test_a_clear_difference_is_found_and_its_size_is_right() -> None:
    rng = np.random.default_rng(1)
    found, covered = [], []
    for _ in range(60):
        s, _ = simulate(rng, [2.0, 2.0, 2.0, 2.25], seeds=3)
        found.append(s.low_PP[3, int(np.argmin(s.mean_P))] > 0)
        covered.append(s.low_PP[3, 0] <= 0.25 <= s.high_PP[3, 0])
    assert np.mean(found) >= 0.9
    assert np.mean(covered) >= 0.9


def test_pairing_removes_what_examples_and_seeds_do_to_all() -> None:
    # Examples and seeds move all points alike by far more than the points differ.
    s, _ = simulate(np.random.default_rng(2), [2.0, 2.05], common=0.3, own=0.002, ease=2.0, noise=0.02)
    assert s.high_P[0] - s.low_P[0] > 0.5
    assert s.low_PP[1, 0] > 0
    assert s.difference_PP[1, 0] == pytest.approx(0.05, abs=0.02)


def test_ratio_of_sums_and_mean_over_seeds() -> None:
    s, data = simulate(np.random.default_rng(3), [1.0, 2.0])
    value_T = data["numerator_TE"].sum(1) / data["denominator_TE"].sum(1)
    assert s.mean_P == pytest.approx([value_T[:2].mean(), value_T[2:].mean()])
    assert s.difference_PP[1, 0] == pytest.approx(value_T[2:].mean() - value_T[:2].mean())


def test_examples_alone_give_the_textbook_interval() -> None:
    rng = np.random.default_rng(4)
    x_E = rng.normal(3, 1, 400)
    s = statistics(x_E[None], np.ones((1, 400)), np.zeros(1, int), np.zeros(1, int))
    half = 1.96 * x_E.std(ddof=1) / 20
    assert (s.low_P[0], s.high_P[0]) == pytest.approx((x_E.mean() - half, x_E.mean() + half), abs=0.1 * half)


def test_seeds_alone_give_the_textbook_interval() -> None:
    # No example differs from another: Student's t on 2 degrees of freedom is all there is.
    seeds = np.array([1.0, 1.2, 1.7])
    s = statistics(np.tile(seeds[:, None], 50), np.ones((3, 50)), np.zeros(3, int), np.arange(3), draws=100_000)
    half = 4.303 * seeds.std(ddof=1) / math.sqrt(3)
    assert (s.low_P[0], s.high_P[0]) == pytest.approx((1.3 - half, 1.3 + half), abs=0.05 * half)


def test_the_spread_of_seeds() -> None:
    # By hand: two points, seeds' common effect 0.2 either way, 0.1 left at each, 1 degree of freedom.
    spread = split_seeds(np.array([[0.3, -0.3], [0.1, -0.1]]))
    assert spread.effect_S == pytest.approx([0.2, -0.2])
    assert spread.own_P == pytest.approx([0.04, 0.04])
    assert spread.own_free_P.tolist() == [1, 1]
    assert spread.common == pytest.approx(0.08 - 0.04 / 2)
    # A point gone astray keeps its own variance and spoils no other's; one with a single seed borrows.
    deviation_PS = np.array([[0.01, -0.01], [-0.01, 0.01], [0.02, -0.02], [-0.02, 0.02], [9, -9], [0, np.nan]])
    spread = split_seeds(deviation_PS)
    assert spread.pooled_P.tolist() == [True, True, True, True, False, True]
    assert spread.own_P[5] == spread.own_P[0] < 0.01
    assert spread.own_P[4] > 100
    assert not split_seeds(np.zeros((3, 1))).own_P.any()


def test_seeds_that_points_do_not_have_in_common() -> None:
    nan = np.nan
    # By hand: two pairs of points, each with seeds of its own, whose effects are 0.2 either way in both.
    value_PS = np.array([[1.3, 0.7, nan, nan], [1.1, 0.9, nan, nan], [nan, nan, 2.1, 1.9], [nan, nan, 2.3, 1.7]])
    spread = split_seeds(value_PS)
    assert spread.effect_S == pytest.approx([0.2, -0.2, 0.2, -0.2])
    assert (spread.group_S.tolist(), spread.common_free) == ([0, 0, 1, 1], 2)
    assert spread.own_P == pytest.approx([0.04] * 4) and spread.own_free_P.tolist() == [2] * 4
    weight_PS = np.isfinite(value_PS) / 2
    assert spread.unadjusted(weight_PS).tolist() == [[0.5, 0.5, 0, 0]] * 2 + [[0, 0, 0.5, 0.5]] * 2
    # One that shares a single seed has its level without that seed's effect.
    spread = split_seeds(np.array([[1.3, 0.7, 1.0, nan], [1.3, 0.7, 1.0, nan], [1.3, nan, nan, 1.0]]))
    assert spread.effect_S == pytest.approx([0.3, -0.3, 0, 0]) and spread.group_S.tolist() == [0, 0, 0, -1]
    assert spread.unadjusted(np.array([[0.5, 0, 0, 0.5]])) == pytest.approx(np.array([[1 / 6] * 3 + [1 / 2]]))
    # Seeds in common that tie points into a chain: there is nothing left to tell effects from chance by.
    chain = [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (2, 3)]
    value_PS = np.full((3, 4), nan)
    for number, place in enumerate(chain):
        value_PS[place] = number
    spread = split_seeds(value_PS)
    assert (spread.common, spread.common_free) == (0, 0) and np.isfinite(spread.own_P).all()
    # No seed in common at all: what seeds do to all alike is in each point's own variance.
    spread = split_seeds(np.array([[1.1, 0.9, nan, nan], [nan, nan, 2.3, 1.7]]))
    assert (spread.common, spread.common_free) == (0, 0) and not spread.effect_S.any()
    assert spread.own_P == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    ("points", "seeds"),
    [
        ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [0, 1, 2] * 2 + [10, 11, 12] * 2),
        ([0, 0, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 0, 1, 2, 10]),
        ([0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 3, 4]),
    ],
    ids=["two sweeps", "two points", "one of another seed", "one seed in common"],
)
@pytest.mark.slow
def test_equal_points_with_other_seeds_are_not_told_apart(points: list[int], seeds: list[int]) -> None:
    rng, apart = np.random.default_rng(7), []
    point_T, seed_T = np.array(points), np.array(seeds)
    for _ in range(100):
        common = rng.normal(0, 0.05, 20)[seed_T] + rng.normal(0, 0.01, len(seed_T))
        x_TE = common[:, None] + rng.normal(2, 0.4, 100) + rng.normal(0, 0.2, (len(seed_T), 100))
        s = statistics(x_TE, np.ones_like(x_TE), point_T, seed_T, draws=400, random_seed=int(rng.integers(2**31)))
        apart.append((s.low_PP[:, int(np.argmin(s.mean_P))] > 0).any())
    assert np.mean(apart) <= 0.08


def test_same_input_same_numbers() -> None:
    _, data = simulate(np.random.default_rng(5), [1.0, 1.1])
    a, b = statistics(**data), statistics(**data)
    assert a.low_PP.tobytes() == b.low_PP.tobytes()
    assert a.low_P.tobytes() == b.low_P.tobytes()


def test_trials_that_agree_to_the_last_digit() -> None:
    x_TE = np.tile(np.random.default_rng(6).normal(2, 1, 50), (4, 1))
    with np.errstate(all="raise", under="ignore"):
        s = statistics(x_TE, np.ones_like(x_TE), np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert s.low_PP.tolist() == s.high_PP.tolist() == [[0, 0], [0, 0]]


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
    assert values == sorted(values)
    assert rows[0.05, 1e-5].status in ("1 finished, 1 failed", "1 failed, 1 finished")
    assert len(rows[0.05, 1e-5].compared) == 1
    assert comparison.winner in comparison.rows[0].compared
    assert comparison.winner.best("val/loss") == min(t.best("val/loss") or 9 for t in comparison.rows[0].compared)
    for row in comparison.rows:
        assert row.cost == pytest.approx(row.seconds / 3600 * 1.8)
        assert row.seconds == pytest.approx(sum(t.seconds for t in row.trials))
        assert (row.difference is None) == (row.verdict == "best")
    assert comparison.low_PP.shape == (8, 8)


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
    path = make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1,0.3"}, seeds=1, stopped=1,
                      quality=lambda point: 3.0 if point["dpo.beta"] == 0.3 else 0.1)  # fmt: skip
    comparison = compare([read_sweep(path)])
    assert [(row.point["dpo.beta"], row.verdict) for row in comparison.rows] == [(0.1, "best"), (0.3, "better")]
    assert any("compared by their last validation" in note for note in comparison.notes)


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
    assert comparison.winner and "3 validation example(s) are too few" in comparison.notes[0]
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
        assert ('class="samples"' in render(read_sweep(sweep), found)) == shown
