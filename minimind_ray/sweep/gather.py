"""Group the trials of sweeps into points, and collect the results that count as arrays for `statistics.py`.

T trials that count, E validation examples, C clusters of examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.stages import STAGES
from minimind_ray.sweep.binary import is_binary
from minimind_ray.sweep.metric import examples_noun, examples_of, terms
from minimind_ray.sweep.stopping import Count, common_step, count_trials, curve_of, has_end, lengths_of
from minimind_ray.sweep.trials import Sweep, Trial, Validation
from minimind_ray.tasks.items import PREFIX


@dataclass(frozen=True)
class Point:
    """A point of a sweep with all its trials. The trials `counted` count as `counts` say.

    `left_out` holds the id of each other trial, and the reason why it does not count. If one of them was stopped and
    its end cannot be predicted, no trial of the point counts, because the mean over the others would be biased. Then
    `early` is the point's mean metric at the last step at which all trials of the sweep were validated, and this step;
    None if the trials have different lengths, since a step then means different things to them.
    """

    sweep: Sweep
    trials: list[Trial]
    counted: list[Trial]
    counts: list[Count]
    left_out: list[tuple[str, str]]
    early: tuple[float, int] | None = None

    @property
    def finished(self) -> bool:
        """Whether a trial that counts was trained to its end."""
        return any(trial.state == "finished" for trial in self.counted)

    @property
    def diverged(self) -> int:
        """The number of trials that diverged and so do not count."""
        return sum(trial.diverged for trial in self.trials if trial not in self.counted)


def points_of(sweep: Sweep, metric: str) -> list[Point]:
    """Return the points of a sweep in the order of its trials, with the trials that count by `count_trials`."""
    counts = {trial.id: count for trial, count in zip(sweep.trials, count_trials(sweep.trials, metric))}
    curves = {trial.id: curve_of(trial.metrics, metric) for trial in sweep.trials if has_end(trial, metric)}
    ended = [trial for trial in sweep.trials if trial.id in curves]
    step = common_step([curve for curve in curves.values() if curve]) if len(set(lengths_of(ended))) == 1 else None
    groups: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        groups.setdefault(repr([trial.point[key] for key in sweep.info.axes]), []).append(trial)
    points: list[Point] = []
    for trials in groups.values():
        early = None
        counted = [trial for trial in trials if counts[trial.id].how]
        if any(trial.id in curves and not counts[trial.id].how for trial in trials):
            counted = []
            values = [curve[step] for trial in trials if step is not None and (curve := curves.get(trial.id))]
            early = (float(np.mean(values)), step) if values and step is not None else None
        left_out = [(trial.id, counts[trial.id].reason or BIASED) for trial in trials if trial not in counted]
        points.append(Point(sweep, trials, counted, [counts[trial.id] for trial in counted], left_out, early))
    return points


BIASED = "the ends of this point's stopped trials cannot be predicted"


@dataclass(frozen=True)
class Results:
    """The results of all trials that count; see `judge` for the arrays.

    `examples` and `clusters` are the numbers of those that count. `binary` tells whether every example has the value 0
    or 1 and counts once. `noun` names the clusters, `examples_noun` the examples. `finer` is empty, or the path
    of a trial whose clusters are parts of these.
    """

    numerator_TC: np.ndarray
    denominator_TC: np.ndarray
    point_T: np.ndarray
    seed_T: np.ndarray
    shift_T: np.ndarray
    extra_T: np.ndarray
    examples: int
    clusters: int
    noun: str
    examples_noun: str
    finer: str
    binary: bool


def results_of(points: Sequence[Point], metric: str) -> Results:
    """Sum the metric's numerator and denominator over the examples of each cluster, for each trial that counts.

    Raises:
        UserError: trials were validated on different examples or with clusters that do not fit together, the
            per-example results lack a column, or no example counts.
    """
    trials_T = [trial for point in points for trial in point.counted]
    counts_T = [count for point in points for count in point.counts]
    check_same_examples(trials_T, metric)
    terms_T = [terms(trial, metric) for trial in trials_T]
    cluster_E, noun, finer = _clusters(points, metric)
    # The denominators of all trials are equal, unless a task divides by what a model has written.
    counts_E = np.any([denominator_E > 0 for _, denominator_E in terms_T], axis=0)
    if not counts_E.any():
        raise UserError(
            f"{_examples(trials_T[0], metric).path}: no example counts for {metric}, because the column that it is "
            "divided by is 0 everywhere; give another data.val, or judge the sweep by another metric"
        )
    _, cluster_E = np.unique(cluster_E[counts_E], return_inverse=True)
    terms_T = [(numerator_E[counts_E], denominator_E[counts_E]) for numerator_E, denominator_E in terms_T]
    clusters = int(cluster_E.max()) + 1

    def summed(value_E: np.ndarray) -> np.ndarray:
        return np.bincount(cluster_E, value_E, clusters)

    return Results(
        numerator_TC=np.stack([summed(numerator_E) for numerator_E, _ in terms_T]),
        denominator_TC=np.stack([summed(denominator_E) for _, denominator_E in terms_T]),
        point_T=np.array([p for p, point in enumerate(points) for _ in point.counted]),
        seed_T=np.array([trial.seed for trial in trials_T]),
        shift_T=np.array([count.shift for count in counts_T]),
        extra_T=np.array([count.extra for count in counts_T]),
        examples=len(cluster_E),
        clusters=clusters,
        noun=noun,
        examples_noun=examples_noun(metric),
        finer=finer,
        binary=all(is_binary(*pair) for pair in terms_T),
    )


def _clusters(points: Sequence[Point], metric: str) -> tuple[np.ndarray, str, str]:
    """Return the number of each example's cluster, 0 to C - 1, the noun for clusters, and `Results.finer`.

    Trials may know different clusters: files of older versions have none, and a run may have been started without
    eval.cluster. If the clusters of one trial are parts of another's, the larger clusters hold for both.

    Raises:
        UserError: the clusters of two trials overlap.
    """
    found: list[tuple[np.ndarray, Trial, Sweep]] = []
    for sweep, trial in ((point.sweep, trial) for point in points for trial in point.counted):
        clusters_E = _examples(trial, metric).cluster_E
        if not any(np.array_equal(clusters_E, _examples(other, metric).cluster_E) for _, other, _ in found):
            found.append((np.unique(clusters_E, return_inverse=True)[1], trial, sweep))
    found.sort(key=lambda grouping: grouping[0].max())
    (largest_E, first, sweep), finer = found[0], ""
    for cluster_E, trial, _ in found[1:]:
        if len(np.unique(np.stack([largest_E, cluster_E]), axis=1).T) > cluster_E.max() + 1:
            raise UserError(
                f"{first.path} and {trial.path} group the {examples_noun(metric)} in different ways, and neither "
                "groups are parts of the other; compare runs with the same eval.cluster"
            )
        if cluster_E.max() > largest_E.max():
            finer = str(trial.path)
    field = sweep.info.config.get("eval", {}).get("cluster")
    if largest_E.max() + 1 == len(largest_E):
        return largest_E, "examples", finer
    noun = "groups of items" if metric.startswith(PREFIX) else STAGES[sweep.info.stage].clusters(field)
    return largest_E, noun, finer


def _examples(trial: Trial, metric: str) -> Validation:
    found = examples_of(trial, metric)
    assert found
    return found


def check_same_examples(trials: Sequence[Trial], metric: str) -> None:
    """Check that a metric of all trials was measured on the same examples.

    Raises:
        UserError: two trials had different examples. The message names the difference.
    """
    first, a = trials[0], _examples(trials[0], metric)
    for trial in trials[1:]:
        b = _examples(trial, metric)
        if len(a.example_E) != len(b.example_E):
            difference = f"{len(a.example_E)} and {len(b.example_E)} examples"
        elif not np.array_equal(a.example_E, b.example_E):
            difference = "different examples"
        elif any(
            not np.array_equal(a.columns.get(name, np.nan), b.columns.get(name, np.nan), equal_nan=True)
            for name in ("count", "bytes")
        ):
            difference = "examples of different lengths"
        elif first.validated_on and trial.validated_on and first.validated_on != trial.validated_on:
            difference = "different prepared data"
        else:
            continue
        if metric.startswith(PREFIX):
            raise UserError(
                f"{first.path} and {trial.path} were measured on {difference} for {metric}; only trials with the same "
                "eval.tasks and the same number of items can be compared"
            )
        raise UserError(
            f"{first.path} and {trial.path} were validated on {difference}; trials can be compared only on the same "
            "validation set, tokenizer and data.max_seq_len"
        )
