"""Diagnose a sweep: the findings of its trials, grouped by rule, and findings about the sweep itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any

import numpy as np

from minimind_ray.data.storage import url_of
from minimind_ray.diagnose.facts import read_facts
from minimind_ray.diagnose.finding import SEVERITIES, Finding, rounded
from minimind_ray.diagnose.rules import diagnose
from minimind_ray.sweep.trials import Sweep, Trial


@dataclass(frozen=True)
class Group:
    """The trials of a sweep that have the same finding; `finding` is the one of the first of them."""

    finding: Finding
    trials: tuple[str, ...]


@dataclass(frozen=True)
class SweepFindings:
    """Findings about a sweep (`own`) and its trials (`groups`, the most common first); `count` trials have begun."""

    own: tuple[Finding, ...]
    groups: tuple[Group, ...]
    count: int


def diagnose_sweep(sweep: Sweep) -> SweepFindings:
    """Return what the rules find in a sweep and its trials. Raises UserError for a damaged file of a trial."""
    begun = [trial for trial in sweep.trials if (trial.path / "config.yaml").exists() and trial.metrics]
    found: dict[str, list[tuple[str, Finding]]] = {}
    for trial in begun:
        for finding in diagnose(read_facts(str(trial.path))):
            found.setdefault(finding.rule, []).append((trial.id, finding))
    groups = [Group(each[0][1], tuple(name for name, _ in each)) for each in found.values()]
    groups.sort(key=lambda group: (SEVERITIES.index(group.finding.severity), -len(group.trials)))
    rules = (sweep_failed, sweep_one_seed, sweep_noise)
    own = [finding for rule in rules if (finding := rule(sweep))] + list(sweep_edges(sweep))
    own.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return SweepFindings(tuple(own), tuple(groups), len(begun))


def sweep_failed(sweep: Sweep) -> Finding | None:
    """Find failed trials."""
    failed = [trial for trial in sweep.trials if trial.state == "failed"]
    if not failed:
        return None
    error = " ".join((failed[0].error or "unknown").split())[:200]
    return Finding("sweep_failed", "warning", {"failed": len(failed), "trials": len(sweep.trials), "error": error})


def sweep_one_seed(sweep: Sweep) -> Finding | None:
    """Find a sweep of several points in which each point has one seed."""
    points = _results(sweep)
    if len(points) < 2 or max(map(len, points.values())) > 1:
        return None
    evidence = {"points": len(points), "where": quote(url_of(sweep.path))}
    return Finding("sweep_one_seed", "note", evidence, (), "seeds", 3)


def sweep_noise(sweep: Sweep) -> Finding | None:
    """Find a sweep in which the seeds of a point differ as much as the means of the points."""
    points = [np.array(values) for values in _results(sweep).values() if len(values) > 1]
    # With fewer degrees of freedom, the scatter of the seeds is not known to a factor of 2.
    freedom = sum(len(values) - 1 for values in points)
    if len(points) < 3 or freedom < 4:
        return None
    within = math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in points) / freedom)
    between = float(np.std([values.mean() for values in points], ddof=1))
    # Means of n seeds scatter by `within` / sqrt(n) by chance alone.
    if between > within:
        return None
    evidence = {"metric": sweep.info.metric, "within": within, "between": between}
    return Finding("sweep_noise", "note", evidence, (), "seeds", 2 * max(map(len, points)))


def sweep_edges(sweep: Sweep) -> Iterable[Finding]:
    """Find axes of at least 3 numbers on which the best point has the smallest or the largest number."""
    points = _results(sweep)
    if not points:
        return
    sign = 1 if sweep.info.mode == "min" else -1
    best = dict(min(points, key=lambda point: sign * float(np.mean(points[point]))))
    for key in sweep.info.axes:
        values = sorted({dict(point)[key] for point in points if _is_number(dict(point)[key])})
        if len(values) < 3 or best[key] not in (values[0], values[-1]):
            continue
        beyond = next_value(values, best[key])
        evidence = {"key": key, "best": best[key], "low": values[0], "high": values[-1], "count": len(values)}
        yield Finding("sweep_edge", "note", evidence, (), key, beyond)


def next_value(values: list[float], edge: float) -> float:
    """Return the value beyond the edge of sorted values, at their mean ratio; if one is 0 or less, mean distance."""
    count, sign = len(values) - 1, -1 if edge == values[0] else 1
    if values[0] > 0:
        beyond = rounded(edge * (values[-1] / values[0]) ** (sign / count))
    else:
        beyond = rounded(edge + sign * (values[-1] - values[0]) / count)
    return beyond if isinstance(edge, float) else (min if sign < 0 else max)(round(beyond), edge + sign)


def _results(sweep: Sweep) -> Mapping[tuple[tuple[str, Any], ...], list[float]]:
    """Return the metric of each finished trial, by point."""
    points: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for trial in sweep.trials:
        if trial.state in ("finished", "early-stopped") and (value := _result(trial, sweep.info.metric)) is not None:
            key = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in trial.point.items())
            points.setdefault(key, []).append(value)
    return points


def _result(trial: Trial, metric: str) -> float | None:
    value = trial.best(metric)
    return value if value is not None and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
