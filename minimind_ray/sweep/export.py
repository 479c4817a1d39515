"""The comparison of sweeps in words, as JSON, and as flat records for CSV and trackers.

Terminal, report and trackers show the same `sentences`, so that all of them say the same.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from minimind_ray.sweep.axes import short_names
from minimind_ray.sweep.importance import TIMES, Importance
from minimind_ray.sweep.more import NO_DIFFERENCE
from minimind_ray.sweep.statistics import Interval
from minimind_ray.sweep.table import Comparison, More, Row, Verdict, only_models
from minimind_ray.sweep.text import duration_text, value_text

MOST_LABELS = 5
"""A sentence names at most this many points."""
MOST_PAIRS = 3
"""At most this many pairs get a sentence about how many more seeds or examples would decide them."""
UNKNOWN_SHARE = 0.9
"""An interval of a share wider than this says nothing about the axis."""


def sentences(comparison: Comparison) -> list[str]:
    """Return all that is said about the table as a whole: what was compared, what is certain, and what is not."""
    judged = f"{counts_text(comparison)}. {direction_text(comparison)}{comparison.method}"
    found = [judged] if comparison.method else []
    texts = best_set_text(comparison), headline_text(comparison), importance_text(comparison)
    found += [text for text in texts if text]
    return found + comparison.notes + more_texts(comparison)


def counts_text(comparison: Comparison) -> str:
    """Return the number of examples, such as "687 validation examples of 40 documents"."""
    examples, clusters = comparison.examples, comparison.clusters
    of = f" of {clusters:,} {comparison.cluster_noun}" if clusters != examples else ""
    return f"{examples:,} {comparison.examples_noun}{of}"


def direction_text(comparison: Comparison) -> str:
    """Return the sentence that says which values of a user's own column are better; empty for a stage's metric."""
    if comparison.metric.startswith("val/"):
        return ""
    return f"{'Smaller' if comparison.mode == 'min' else 'Larger'} values of {comparison.metric} are better. "


def best_set_text(comparison: Comparison) -> str:
    """Return the sentence that names the points of which one is the best; empty if nothing is known about it."""
    judged = [row for row in comparison.rows if row.vs_best]
    if not any(row.vs_best and row.vs_best.low is not None for row in judged):
        return ""
    labels = [row.label for row in judged if row.may_be_best]
    reason = only_models(comparison.rows)
    others = [row for row in comparison.rows if row.compared and not row.vs_best]
    without = " and no diverged trial" if any(row.diverged_seeds for row in others) else ""
    of = f" of the points with a finished trial{without}" if others else ""
    if reason:
        of = f" of these trained models{f' with a finished trial{without}' if others else ''} ({reason})"
    # Points outside the set whose verdict, by the wider intervals of all pairs, leaves them open.
    open_too = any(row.verdict == "not distinguishable" and not row.may_be_best for row in judged)
    why = " This compares each point only with the best; the verdicts use wider intervals, which hold for all pairs."
    why = why if open_too else ""
    if len(labels) == 1:
        return f"With 95 % confidence, the best{of} is {labels[0]}.{why}"
    if len(labels) == len(judged):
        return f"With 95 % confidence, the best{of} is among all {len(judged)}: none can be ruled out."
    more = f"; and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else ""
    return (
        f"With 95 % confidence, the best{of} is among {len(labels)} of {len(judged)}: "
        f"{'; '.join(labels[:MOST_LABELS])}{more}.{why}"
    )


def headline_text(comparison: Comparison) -> str:
    """Return the sentence that corrects the best point's value; empty if the correction is too small to be seen."""
    judged, headline = [row for row in comparison.rows if row.vs_best], comparison.headline
    if headline is None or headline.low is None:
        return ""
    assert judged[0].metric
    digits, value = comparison.digits, judged[0].metric.value
    if abs(headline.value - value) < 0.5 * 10**-digits:
        return ""
    measured, corrected = f"{value:.{digits}f}", f"{headline.value:.{digits}f}"
    return (
        f"The measured value of the best point, {measured}, is optimistic, because the point was picked from "
        f"{len(judged)}; corrected for this: {corrected}, 95 % interval {headline.text(digits)}."
    )


def importance_text(comparison: Comparison) -> str:
    """Return the sentence on the importance of the axes; empty if it is unknown."""
    if not comparison.importance:
        return ""
    parts = [f"{importance_name(comparison, each)} {importance_value(each)}" for each in comparison.importance]
    more = f" and {len(parts) - MOST_LABELS} more" if len(parts) > MOST_LABELS else ""
    open_ = all(each.high - each.low > UNKNOWN_SHARE for each in comparison.importance)
    return (
        f"Importance of the axes, as shares of the variance of {comparison.metric} between the points, with 95 % "
        f"intervals: {', '.join(parts[:MOST_LABELS])}{more}."
        f"{' The intervals are so wide that any of these may matter most.' if open_ else ''}"
    )


def importance_name(comparison: Comparison, importance: Importance) -> str:
    """Return an axis or a pair of axes with short names: "beta × lr"."""
    names = short_names(comparison.keys)
    return TIMES.join(names.get(key, key) for key in importance.key.split(TIMES))


def importance_value(importance: Importance) -> str:
    """Return a share with its interval: "82 % (70 to 91)"."""
    share, low, high = (f"{100 * part:.0f}" for part in (importance.share, importance.low, importance.high))
    return f"{share} % ({low} to {high})"


def more_texts(comparison: Comparison) -> list[str]:
    """Return a sentence for each undecided pair: how many seeds or examples would decide it."""
    texts = [more_text(more, comparison.examples_noun) for more in comparison.more[:MOST_PAIRS]]
    left = len(comparison.more) - len(texts)
    return texts + ([f"{left} more pair(s) are undecided; --json lists them."] if left else [])


def more_text(more: More, examples_noun: str = "validation examples") -> str:
    """Return what would decide a pair of points, if their difference stays as observed.

    In simulations, the seeds proposed decided 55 % of the pairs.
    """
    if more.why == NO_DIFFERENCE:
        return f"Between {more.pair[1]} and {more.pair[0]}, {NO_DIFFERENCE}."
    ways: list[str] = []
    if more.seeds is not None:
        time = "" if more.seconds is None else f", {duration_text(more.seconds)} more training"
        price = "" if more.cost is None else f" for {more.cost:.2f}"
        ways.append(f"{more.seeds} seeds each{time}{price}")
    if more.examples is not None:
        ways.append(f"{more.examples:,} {examples_noun}")
    chance = " (enough in about half of all cases)" if ways else ""
    answer = "; ".join(text for text in (" or ".join(ways) + chance, more.why) if text)
    return f"To tell {more.pair[1]} from {more.pair[0]}, if the difference stays as it is: {answer}."


def standing(verdict: Verdict | None) -> str:
    """Return a verdict's class, which decides on colours: best, tied, worse, or open without a verdict."""
    if verdict is None:
        return "open"
    return "best" if verdict == "best" else "worse" if verdict.startswith("worse") else "tied"


def seeds_text(row: Row) -> str:
    """Return the number of seeds that count: 3, or 1+2 if two of them were stopped before their end."""
    return f"{row.seeds}+{row.stopped_seeds}" if row.stopped_seeds else str(row.seeds)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything that is known about the comparison in a form for JSON."""
    return {
        "metric": comparison.metric,
        "mode": comparison.mode,
        "examples": comparison.examples,
        "clusters": comparison.clusters,
        "cluster_noun": comparison.cluster_noun,
        "margin": comparison.margin,
        "winner": comparison.winner.id if comparison.winner else None,
        "headline": _interval(comparison.headline),
        "may_be_best": [row.label for row in comparison.rows if row.may_be_best],
        "importance": [asdict(importance) for importance in comparison.importance],
        "sentences": sentences(comparison),
        "more": [asdict(more) for more in comparison.more],
        "points": [_point(row) for row in comparison.rows],
    }


def _point(row: Row) -> dict[str, Any]:
    reasons = dict(row.left_out)
    counted = {t.id: "predicted" if t.id in row.predicted else t.state for t in row.compared}
    return {
        "sweep": row.sweep,
        "point": row.point,
        "label": row.label,
        "verdict": row.verdict,
        "may_be_best": row.may_be_best,
        "metric": _interval(row.metric),
        "difference_to_best": _interval(row.difference),
        "against_the_best": _interval(row.vs_best),
        "seeds": row.seeds,
        "stopped_seeds": row.stopped_seeds,
        "diverged_seeds": row.diverged_seeds,
        "early_step": row.early_step,
        "status": row.status,
        "tokens": row.tokens,
        "seconds": row.seconds,
        "cost": row.cost,
        "trials": [
            {"id": t.id, "seed": t.seed, "state": t.state, "counted": counted.get(t.id), "left_out": reasons.get(t.id),
             "error": t.error, "path": str(t.path), "result": str(t.result) if t.result else None}
            for t in row.trials
        ],
    }  # fmt: skip


def _interval(interval: Interval | None) -> dict[str, float | None] | None:
    return asdict(interval) if interval else None


def to_records(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a flat record per point, for CSV and trackers. All records have the same keys.

    Only the best point has a corrected value (`Comparison.headline`). The metric gives three columns their name. If it
    is a user's column that is named like another column here, such as "seconds", they are named "metric seconds".
    """

    def bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
        low, high = (interval.low, interval.high) if interval else (None, None)
        return {name: interval.value if interval else None, f"{name} low": low, f"{name} high": high}

    records: list[dict[str, Any]] = []
    for row in comparison.rows:
        before = {
            "sweep": row.sweep,
            **{key: value_text(value) for key, value in row.point.items()},
            "verdict": row.verdict or "not compared",
            "may be best": row.may_be_best,
            "seeds": row.seeds,
            "stopped seeds": row.stopped_seeds,
            "diverged seeds": row.diverged_seeds,
            "early step": row.early_step,
        }
        after = {
            **bounds("difference", row.difference),
            **bounds("against the best", row.vs_best),
            **bounds("corrected", comparison.headline if row.verdict == "best" else None),
            "examples": comparison.examples,
            "clusters": comparison.clusters,
            "status": row.status,
            "left out": "; ".join(f"{trial}: {reason}" for trial, reason in row.left_out),
            "tokens": row.tokens,
            "seconds": row.seconds,
            "cost": row.cost,
        }
        taken = comparison.metric in before or comparison.metric in after
        name = f"metric {comparison.metric}" if taken else comparison.metric
        records.append({**before, **bounds(name, row.metric), **after})
    return records
