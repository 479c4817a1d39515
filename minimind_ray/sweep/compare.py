"""Compare the points of a sweep: find the better points, and the differences that are too uncertain for a verdict.

A measured difference is uncertain for two reasons: the validation set has a limited number of examples, and each run
has one seed. The intervals of `statistics.py` account for both. All trials are validated on the same examples, so
differences are paired: the same examples, the same seeds. `gather.py` collects the results, `table.py` holds the
table; `chart.py` and `report.py` present it.

    P points, T trials (a point with a seed), C clusters of validation examples
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.stages import Mode
from minimind_ray.sweep.axes import Drawn, parse_axis, short_names
from minimind_ray.sweep.cost import cost_per_second, cost_text
from minimind_ray.sweep.gather import Point, Results, points_of, results_of
from minimind_ray.sweep.importance import Importance, Measured, importance_of
from minimind_ray.sweep.metric import judged_by
from minimind_ray.sweep.more import needed
from minimind_ray.sweep.notes import importance_notes, method_of, notes_of
from minimind_ray.sweep.statistics import Interval, Statistics, judge
from minimind_ray.sweep.table import LEAST_CLUSTERS, Comparison, More, Row, only_models, verdict_of
from minimind_ray.sweep.text import shorten, value_text
from minimind_ray.sweep.trials import Sweep, Trial


def compare(
    sweeps: Sequence[Sweep], *, metric: str | None = None, mode: str | None = None, margin: float | None = None
) -> Comparison:
    """Compare all points of all `sweeps` in one table.

    The sweeps' own metric, mode and margin are used where none is given; see metric.py.

    `points_of` says which trials count. Points without per-example results show their best metric during training and
    get no verdict. If any point has a finished trial, only such points can be the best; of these, only points that lost
    no seed by divergence, if there are any.

    Raises:
        UserError: the sweeps have different metrics, trials were validated on different examples, or the per-example
            results lack a column that the metric needs.
    """
    metric, mode, margin = judged_by(sweeps, metric, mode, margin)
    sign = 1.0 if mode == "min" else -1.0
    keys = list(dict.fromkeys(key for sweep in sweeps for key in sweep.info.axes))
    costs = [text for sweep in sweeps if (text := cost_text(sweep))]
    points = [point for sweep in sweeps for point in points_of(sweep, metric)]
    rows = [_row(point, keys, metric, sweeps) for point in points]
    others = _by_metric([row for point, row in zip(points, rows) if not point.counted], sign)
    rows = [row for point, row in zip(points, rows) if point.counted]
    points = [point for point in points if point.counted]
    if not points:
        return _nothing_to_compare(metric, mode, keys, others, margin, costs)

    results = results_of(points, metric)
    found = _judged(results, points, mode)
    judged = results.clusters >= LEAST_CLUSTERS
    importance, why = _importance(rows, found, sweeps) if judged else ([], "")
    order, pick = found.order_P, np.ix_(found.order_P, found.order_P)
    rows = _with_statistics([rows[p] for p in order], results, found, margin, sign)
    return Comparison(
        metric=metric,
        mode=mode,
        keys=keys,
        rows=rows + others,
        examples=results.examples,
        clusters=results.clusters,
        cluster_noun=results.noun,
        notes=notes_of(results, found, rows + others) + importance_notes(importance, why, rows, others) + costs,
        method=method_of(results, found, rows, margin),
        headline=found.headline
        if judged and found.eligible_P.sum() > 1 and not found.hidden_points()[order[0]]
        else None,
        more=_more(rows, results, found, [cost_per_second(points[p].sweep) for p in order]) if judged else [],
        margin=margin,
        difference_PP=found.difference_PP[pick],
        low_PP=found.low_PP[pick],
        high_PP=found.high_PP[pick],
        hidden_PP=found.hidden_pairs()[pick],
        importance=importance,
    )


def _nothing_to_compare(
    metric: str, mode: Mode, keys: list[str], rows: list[Row], margin: float, costs: list[str]
) -> Comparison:
    """Return the table of points without results. `costs` are sentences about what the sweeps cost."""
    nothing, notes = np.zeros((0, 0)), notes_of(None, None, rows) + costs
    return Comparison(
        metric, mode, keys, rows, 0, 0, "examples", notes, "", None, [], margin, nothing, nothing, nothing, nothing
    )


def _judged(results: Results, points: Sequence[Point], mode: Mode) -> Statistics:
    finished_P = np.array([point.finished for point in points])
    diverged_P = np.array([point.diverged > 0 for point in points])
    eligible_P = next((mask_P for mask_P in (finished_P & ~diverged_P, finished_P) if mask_P.any()), None)
    # A single cluster cannot be resampled, so repeat it. With so few clusters no bounds are shown anyway.
    numerator_TC, denominator_TC = (
        np.tile(terms_TC, 2) if results.clusters == 1 else terms_TC
        for terms_TC in (results.numerator_TC, results.denominator_TC)
    )
    return judge(
        numerator_TC,
        denominator_TC,
        results.point_T,
        results.seed_T,
        larger_is_better=mode == "max",
        shift_T=results.shift_T,
        extra_T=results.extra_T,
        eligible_P=eligible_P,
        diverged_P=diverged_P,
        binary=results.binary,
    )


def _importance(rows: Sequence[Row], found: Statistics, sweeps: Sequence[Sweep]) -> tuple[list[Importance], str]:
    """Return the importance of the axes, and why there is none; `rows` are in the order of the results' points.

    pbt's trials change their settings in training, so their points say nothing about the axes.
    """
    if only_models(rows) == "pbt":
        return [], ""
    drawn: dict[str, Drawn] = {}
    for key, spec in (axis for sweep in sweeps for axis in sweep.info.axes.items()):
        with suppress(UserError):  # An earlier version may have had axes that this version refuses.
            if isinstance(spec, str) and isinstance(axis := parse_axis(key, spec), Drawn):
                drawn.setdefault(key, axis)
    variance_PP = found.examples_variance_PP + found.seeds_variance_PP
    return importance_of([row.point for row in rows], Measured(found.estimate_P, found.draws_BP, variance_PP), drawn)


def _with_statistics(rows: Sequence[Row], results: Results, found: Statistics, margin: float, sign: float) -> list[Row]:
    """Return the rows, which are in the order of `found.order_P`, with values, differences and verdicts."""
    best, reason = found.order_P[0], only_models(rows)
    several = found.eligible_P.sum() > 1
    filled: list[Row] = []
    for p, row in zip(found.order_P, rows):
        value, difference = float(found.estimate_P[p]), float(found.difference_PP[p, best])
        eligible = bool(found.eligible_P[p])
        if results.clusters < LEAST_CLUSTERS:
            first, other = {"verdict": "best"}, {"verdict": "not distinguishable", "difference": Interval(difference)}
            filled.append(replace(row, metric=Interval(value), may_be_best=eligible, **(first if p == best else other)))
            continue
        hidden = bool(found.hidden_pairs()[p, best if p != best else found.order_P[:2][-1]])
        row = replace(
            row,
            metric=_shown(value, float(found.low_P[p]), float(found.high_P[p]), hidden=bool(found.hidden_points()[p])),
            verdict="best",
            may_be_best=bool(found.may_be_best_P[p]),
            vs_best=_shown(*found.vs_best_P3[p].tolist(), hidden=hidden) if eligible and several else None,
        )
        if p != best:
            low, high = float(found.low_PP[p, best]), float(found.high_PP[p, best])
            verdict = verdict_of(*sorted((sign * low, sign * high)), margin=margin, only_models=reason)
            row = replace(row, difference=_shown(difference, low, high, hidden=hidden), verdict=verdict)
        filled.append(row)
    return filled


def _shown(value: float, low: float, high: float, *, hidden: bool) -> Interval:
    return Interval(value) if hidden else Interval(value, low, high)


def _more(rows: Sequence[Row], results: Results, found: Statistics, prices: Sequence[float | None]) -> list[More]:
    """Return what would decide each pair of the best point and a point that is not distinguishable from it.

    More seeds do not make pbt's trials a comparison of settings, and do not undo a divergence, so nothing is returned
    for these. `prices` are those of a second of training.
    """
    best, more = found.order_P[0], list[More]()
    if only_models(rows) == "pbt":
        return more
    for p, row, price in zip(found.order_P, rows, prices):
        if row.verdict != "not distinguishable" or found.diverged_P[[p, best]].any():
            continue
        pair = [rows[0], row]
        difference = abs(float(found.difference_PP[p, best]))
        needs = needed(
            difference,
            float(found.high_PP[p, best] - found.low_PP[p, best]) / 2,
            float(found.examples_variance_PP[p, best]),
            float(found.seeds_variance_PP[p, best]),
            (len(rows[0].compared), len(row.compared)),
            float(min(found.seeds_free_P[p], found.seeds_free_P[best])),
            (len(rows[0].trials) - len(rows[0].compared), len(row.trials) - len(row.compared)),
        )
        seconds = None
        if needs.seeds:
            seconds = sum(seconds_to(needs.seeds, one.trials) for one in pair)
        more.append(
            More(
                pair=(rows[0].label, row.label),
                seeds=needs.seeds,
                examples=None if needs.examples_factor is None else math.ceil(needs.examples_factor * results.examples),
                why=needs.why,
                seconds=seconds,
                cost=None if price is None or seconds is None else seconds * price,
            )
        )
    return more


def seconds_to(seeds: int, trials: Sequence[Trial]) -> float:
    """Return how long a point trains until it has `seeds` seeds that have ended for good.

    A resume trains failed trials again, and continues stopped ones. Each takes as long as the mean finished trial.
    """
    finished = [trial.seconds for trial in trials if trial.state == "finished"]
    each = sum(finished) / len(finished) if finished else max(trial.seconds for trial in trials)
    ended = [trial for trial in trials if trial.state in ("finished", "early-stopped")]
    continued = sum(min(trial.seconds, each) for trial in trials if trial.state in ("stopped", "running"))
    return each * (seeds - len(ended)) - continued


def _row(point: Point, keys: Sequence[str], metric: str, sweeps: Sequence[Sweep]) -> Row:
    """Return a point's row without statistics. Its label names the sweep if there are several `sweeps`."""
    sweep, trials, several = point.sweep, point.trials, len(sweeps) > 1
    name = sweep.name if [other.name for other in sweeps].count(sweep.name) == 1 else str(sweep.path)
    values_by_key = {key: trials[0].point.get(key, _config_value(sweep, key)) for key in keys}
    names = short_names(keys)
    texts = [f"{names[key]} {shorten(value_text(value), 27)}" for key, value in values_by_key.items()]
    values = [v for t in trials if (v := t.best(metric)) is not None and math.isfinite(v)]
    if point.early:
        values = [point.early[0]]
    seconds, per_second = sum(t.seconds for t in trials), cost_per_second(sweep)
    return Row(
        sweep=name,
        point=values_by_key,
        label=f"{', '.join(texts)}{f' ({name})' if several else ''}" if texts else name,
        trials=tuple(trials),
        compared=tuple(point.counted),
        metric=Interval(sum(values) / len(values)) if values else None,
        difference=None,
        vs_best=None,
        verdict=None,
        may_be_best=False,
        seeds=sum(t.state == "finished" for t in point.counted),
        stopped_seeds=sum(t.state != "finished" for t in point.counted),
        diverged_seeds=point.diverged,
        predicted=frozenset(t.id for t, count in zip(point.counted, point.counts) if count.how == "predicted"),
        left_out=tuple(point.left_out),
        early_step=point.early[1] if point.early else None,
        tokens=sum(t.tokens for t in trials),
        seconds=seconds,
        cost=None if per_second is None else seconds * per_second,
        status=_status(trials, sweep.info.seeds) + _moves(trials),
    )


def _by_metric(rows: Sequence[Row], sign: float) -> list[Row]:
    return sorted(rows, key=lambda row: sign * row.metric.value if row.metric else math.inf)


def _config_value(sweep: Sweep, key: str) -> Any:
    value: Any = sweep.info.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _status(trials: Sequence[Trial], seeds: int) -> str:
    states = Counter[str](t.status for t in trials)
    states["waiting"] += max(0, seeds - len(trials))
    states = +states
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{count} {state}" for state, count in states.most_common())


def _moves(trials: Sequence[Trial]) -> str:
    """Return the points to which pbt has moved the trials, as text."""
    ends = [trial.lineage[-1]["point"] for trial in trials if trial.lineage]
    names = short_names(list(ends[0]) if ends else [])
    return "".join(f", moved to {' '.join(f'{names[k]} {value_text(v)}' for k, v in end.items())}" for end in ends)
