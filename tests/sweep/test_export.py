"""What is said about a comparison: the same in the terminal, CSV, JSON, the report and for trackers."""

from __future__ import annotations

import csv
import html
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.text import Text

from minimind_ray.display.comparison import print_comparison
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.export import best_set_text, more_text, sentences, standing, to_json, to_records
from minimind_ray.sweep.more import NO_DIFFERENCE
from minimind_ray.sweep.report import render
from minimind_ray.sweep.statistics import Interval
from minimind_ray.sweep.table import Comparison, More
from minimind_ray.sweep.text import value_text
from minimind_ray.sweep.trials import Sweep, read_sweep
from tests.sweep.synthetic import make_full_sweep, make_sweep

MORE = More(("beta 0.1", "beta 0.3"), 7, 2400, "", 125.0, 0.35)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    found = read_sweep(make_full_sweep(tmp_path_factory.mktemp("export") / "betas"))
    # The failed trial has not diverged.
    failed = [replace(trial, error="out of memory") if trial.state == "failed" else trial for trial in found.trials]
    return replace(found, trials=failed)


@pytest.fixture(scope="module")
def comparison(sweep: Sweep) -> Comparison:
    """A comparison with everything that may be said of one."""
    found = compare([sweep])
    assert found.rows[0].metric
    value = found.rows[0].metric.value
    return replace(
        found, clusters=40, cluster_noun="prompts", headline=Interval(value + 0.01, value - 0.02, value + 0.04),
        more=[MORE], margin=0.01,
    )  # fmt: skip


def printed(comparison: Comparison) -> str:
    text = io.StringIO()
    print_comparison(comparison, text)
    return text.getvalue()


def test_all_forms_say_the_same(sweep: Sweep, comparison: Comparison) -> None:
    table, page, parsed = printed(comparison), html.unescape(render(sweep, comparison)), to_json(comparison)
    assert json.loads(json.dumps(parsed))["sentences"] == sentences(comparison)
    assert len(sentences(comparison)) >= 4
    for sentence in sentences(comparison):
        assert sentence in table
        assert sentence in page
    records = to_records(comparison)
    assert len({tuple(record) for record in records}) == 1
    digits = comparison.digits
    for row, record, point in zip(comparison.rows, records, parsed["points"], strict=True):
        assert record["verdict"] == (point["verdict"] or "not compared")
        assert f">{record['verdict']}</td>" in page
        assert record["seeds"] == point["seeds"] == sum(t["counted"] == "finished" for t in point["trials"])
        assert record["stopped seeds"] == point["stopped_seeds"]
        place = [record[key] for key in comparison.keys]
        line = next(line for line in table.splitlines() if line.split()[:2] == place)
        assert record["verdict"] in line
        if row.difference:
            assert record["difference low"] == point["difference_to_best"]["low"]
            for text in (f"{row.difference.value:+.{digits}f}", row.difference.text(digits)):
                assert text in line
                assert f">{text}</td>" in page
    assert records[0]["corrected"] == parsed["headline"]["value"]
    assert {record["corrected"] for record in records[1:]} == {None}


def test_why_a_trial_does_not_count(comparison: Comparison) -> None:
    trials = [trial for point in to_json(comparison)["points"] for trial in point["trials"]]
    [failed] = [trial for trial in trials if trial["state"] == "failed"]
    assert (failed["counted"], failed["left_out"]) == (None, "failed")
    assert any(record["left out"] == f"{failed['id']}: failed" for record in to_records(comparison))


def test_what_is_said(comparison: Comparison) -> None:
    said = sentences(comparison)
    assert said[0].startswith("240 validation examples of 40 prompts. ")
    assert any("is optimistic, because the point was picked from 8" in sentence for sentence in said)
    assert any(sentence.startswith("With 95 % confidence, the best is ") for sentence in said)
    assert said[-1].startswith("To tell beta 0.3 from beta 0.1, if the difference stays as it is: 7 seeds each, 2:05 ")
    plain = replace(comparison, clusters=comparison.examples, headline=comparison.rows[0].metric, more=[])
    assert sentences(plain)[0].startswith("240 validation examples. ")
    assert not any("optimistic" in sentence for sentence in sentences(plain))


def test_the_best_set_does_not_contradict_the_verdicts(comparison: Comparison) -> None:
    rows = [replace(row, may_be_best=row.verdict == "best") for row in comparison.rows]
    words = "This compares each point only with the best"
    text = best_set_text(replace(comparison, rows=rows))
    assert text.startswith(f"With 95 % confidence, the best is {rows[0].label}. {words}")
    rows = [replace(row, verdict="best" if row.verdict == "best" else "worse") for row in rows]
    assert words not in best_set_text(replace(comparison, rows=rows))


def test_the_best_set_is_of_points_with_a_finished_trial(comparison: Comparison) -> None:
    words = "the best of the points with a finished trial is"
    assert words not in best_set_text(comparison)
    # A point without a finished trial has no comparison with the best.
    rows = [*comparison.rows[:-1], replace(comparison.rows[-1], vs_best=None, may_be_best=False)]
    assert words in best_set_text(replace(comparison, rows=rows))
    rows = [replace(row, compared=row.compared[:1]) for row in rows]
    words = "the best of these trained models with a finished trial (one seed) is"
    assert words in best_set_text(replace(comparison, rows=rows))


def test_a_correction_that_cannot_be_seen_is_not_mentioned(comparison: Comparison) -> None:
    best = comparison.rows[0].metric
    assert best
    # Less than half of the last decimal is not seen, also where rounding would show another decimal.
    edge, unit = round(best.value, comparison.digits) + 0.5 * 10**-comparison.digits, 10**-comparison.digits
    rows = [replace(comparison.rows[0], metric=replace(best, value=edge - 0.2 * unit)), *comparison.rows[1:]]
    small = replace(comparison, rows=rows, headline=replace(best, value=edge + 0.2 * unit))
    assert not any("optimistic" in sentence for sentence in sentences(small))


def test_tiny_numbers_keep_their_digits(comparison: Comparison) -> None:
    def tiny(interval: Interval | None) -> Interval | None:
        return interval and Interval(
            *(None if x is None else x * 1e-9 for x in (interval.value, interval.low, interval.high))
        )  # type: ignore

    rows = [replace(row, metric=tiny(row.metric), difference=tiny(row.difference)) for row in comparison.rows]
    assert 9 < replace(comparison, rows=rows).digits <= 12
    assert "-0.000000 " not in printed(replace(comparison, rows=rows))


@pytest.mark.parametrize("metric", ["seeds", "seconds", "difference", "cost"])
def test_a_metric_named_like_a_column_of_the_table(metric: str, comparison: Comparison) -> None:
    named = replace(comparison, metric=metric)
    for plain, record in zip(to_records(comparison), to_records(named), strict=True):
        renamed = {name.replace("val/loss", f"metric {metric}"): value for name, value in plain.items()}
        assert record == renamed and list(record) == list(renamed)


def test_how_many_more() -> None:
    assert more_text(MORE).endswith("7 seeds each, 2:05 more training for 0.35 or 2,400 validation examples "
                                     "(enough in about half of all cases).")  # fmt: skip
    only = replace(MORE, seeds=None, why="the examples' part alone is too large", seconds=None, cost=None)
    assert more_text(only).endswith(
        ": 2,400 validation examples (enough in about half of all cases); the examples' part alone is too large."
    )
    assert more_text(replace(only, examples=None)).endswith(": the examples' part alone is too large.")
    equal = replace(only, examples=None, why=NO_DIFFERENCE)
    assert more_text(equal) == "Between beta 0.3 and beta 0.1, no difference was observed."


def test_many_pairs_and_points_do_not_fill_the_page(comparison: Comparison) -> None:
    many = replace(comparison, more=[MORE] * 9)
    assert sentences(many)[-1] == "6 more pair(s) are undecided; --json lists them."
    assert len(to_json(many)["more"]) == 9
    rows = [replace(row, may_be_best=True) for row in comparison.rows]
    assert any("among all" in sentence for sentence in sentences(replace(comparison, rows=rows)))
    rows[-1] = replace(rows[-1], may_be_best=False)
    assert any("; and 2 more." in sentence for sentence in sentences(replace(comparison, rows=rows)))


def test_nothing_is_said_before_there_is_anything_to_say(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "s", axes={"dpo.beta": "0.1"}, seeds=1, steps=10, running=0))
    comparison = compare([sweep])
    assert not [sentence for sentence in sentences(comparison) if "95 %" in sentence]
    assert "not compared" in printed(comparison)


def test_a_table_with_two_axes_fits_into_120_columns(comparison: Comparison) -> None:
    rows = [replace(row, verdict="differs on these examples; one seed", cost=1.5) for row in comparison.rows]
    for found in (comparison, replace(comparison, rows=rows)):
        table = printed(found).split("\n\n")[0]
        assert max(map(len, table.splitlines())) <= 120
        assert table.splitlines()[0].split()[:4] == ["beta", "lr", "seeds", "val/loss"]


@pytest.mark.parametrize("width", [80, 100, 120, 240])
def test_a_narrow_window_shows_whole_axes_and_fewer_columns(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width)}.items():
        monkeypatch.setenv(name, value)
    for keys in (["dpo.beta"], ["dpo.beta", "optim.lr"], ["dpo.beta", "optim.lr", "optim.weight_decay"]):
        rows = [replace(row, point={**row.point, "optim.weight_decay": 0.01}) for row in comparison.rows]
        text = Text.from_ansi(printed(replace(comparison, keys=keys, rows=rows))).plain
        table, rest = text.split("\n\n", 1)
        lines = [line.split() for line in table.splitlines()]
        assert max(map(len, table.splitlines())) <= width
        assert lines[0][: len(keys)] == ["beta", "lr", "weight_decay"][: len(keys)]
        for row in rows:
            values = [value_text(row.point[key]) for key in keys]
            assert row.metric
            value = f"{row.metric.value:.{comparison.digits}f}"
            assert any(line[: len(keys)] == values and value in line for line in lines)
        assert ("time" in lines[0]) != (rest.startswith("Left out for lack of width: "))
        assert ("time" in lines[0]) == (width == 240 or (width == 120 and len(keys) < 3))


def test_csv_reads_back(comparison: Comparison) -> None:
    text = io.StringIO()
    records = to_records(comparison)
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    text.seek(0)
    assert [row["verdict"] for row in csv.DictReader(text)] == [record["verdict"] for record in records]


def test_standings() -> None:
    verdicts = [None, "best", "worse", "better", "equal within 0.01", "differs on these examples; one seed"]
    assert list(map(standing, verdicts)) == ["open", "best", "worse", "tied", "tied", "tied"]
