"""The comparison of models in words, as JSON, and as flat records for CSV. All of them say the same."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from minimind_ray.sweep.models import MEAN, MOST_ITEMS, Contest, ModelComparison
from minimind_ray.sweep.statistics import Interval
from minimind_ray.sweep.table import LEAST_CLUSTERS


def sentences(comparison: ModelComparison) -> list[str]:
    """Return what is said about the tables as a whole: how certain they are, and what would make them more certain."""
    contests = comparison.contests
    pairs = " They hold for all pairs of models at once." if len(contests[0].models) > 2 else ""
    nouns = {contest.noun for contest in contests}
    noun = nouns.pop() if len(nouns) == 1 else "examples"
    found = [
        f"Intervals cover 95 % and account for the {noun}: all models have the same, so differences are "
        f"paired.{pairs} They say nothing about training such a model again."
    ]
    if len(contests) > 1:
        one = (
            " The mean over tasks is a single comparison; every task counts the same in it." if comparison.mean else ""
        )
        found.append(
            "The intervals are not widened for the number of tasks: each task may show a difference by chance alone in "
            f"up to 5 % of cases.{one}"
        )
    return found + comparison.notes + [text for contest in comparison.all for text in needed_texts(contest)]


def needed_texts(contest: Contest) -> list[str]:
    """Return for each model that is not distinguishable from the best how many examples would tell them apart."""
    best, noun, texts = contest.standings[0].model, contest.noun, list[str]()
    for standing in contest.standings[1:]:
        if standing.verdict != "not distinguishable" or contest.clusters < LEAST_CLUSTERS:
            continue
        assert standing.difference
        pair = f"{contest.task}: to tell {standing.model} from {best}"
        if standing.difference.value == 0:
            texts.append(f"{contest.task}: no difference between {standing.model} and {best} was observed.")
        elif standing.needed is None:
            texts.append(f"{pair}, more than {MOST_ITEMS:,} {noun} would be needed if the difference stays as it is.")
        else:
            texts.append(
                f"{pair}, about {standing.needed:,} {noun} would be needed instead of {contest.items:,}, if the "
                "difference stays as it is (enough in about half of all cases)."
            )
    return texts


def to_json(comparison: ModelComparison) -> dict[str, Any]:
    """Return everything that is known about the comparison in a form for JSON."""
    return {
        "models": comparison.contests[0].models,
        "tasks": [_contest(contest) for contest in comparison.contests],
        "mean": _contest(comparison.mean) if comparison.mean else None,
        "sentences": sentences(comparison),
    }


def _contest(contest: Contest) -> dict[str, Any]:
    return {
        "task": contest.task,
        "metric": contest.metric,
        "mode": contest.mode,
        "items": contest.items,
        "clusters": contest.clusters,
        "models": [
            {
                "model": standing.model,
                "verdict": standing.verdict,
                "value": asdict(standing.value),
                "difference_to_best": asdict(standing.difference) if standing.difference else None,
                "items_needed": standing.needed,
            }
            for standing in contest.standings
        ],
    }


def to_records(comparison: ModelComparison) -> list[dict[str, Any]]:
    """Return a flat record per task and model, for CSV."""

    def bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
        low, high = (interval.low, interval.high) if interval else (None, None)
        return {name: interval.value if interval else None, f"{name} low": low, f"{name} high": high}

    return [
        {
            "task": contest.task,
            "metric": "" if contest.metric == MEAN else contest.metric,
            "model": standing.model,
            "verdict": standing.verdict,
            **bounds("value", standing.value),
            **bounds("difference", standing.difference),
            "items": contest.items,
            "clusters": contest.clusters,
            "items needed": standing.needed,
        }
        for contest in comparison.all
        for standing in contest.standings
    ]
