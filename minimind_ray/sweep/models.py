"""Compare models with each other on the items of tasks, or on any other examples that all of them were measured on.

Each model is one point with one seed, so that the intervals hold for other items like these, and say nothing about
training such a model again. All models answer the same items, so differences are paired; `statistics.judge` computes
them. The mean over tasks combines the intervals of the tasks (Zou & Donner 2008).

    P models, E items, C clusters of items, K tasks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from minimind_ray.config.errors import UserError
from minimind_ray.config.stages import Mode
from minimind_ray.sweep.binary import FEW_DISCORDANT, is_binary, mid_p
from minimind_ray.sweep.measured import VALIDATION, Measured, by_task
from minimind_ray.sweep.statistics import DRAWS, Interval, Statistics, judge
from minimind_ray.sweep.table import LEAST_CLUSTERS, MOST_DIGITS, verdict_of
from minimind_ray.tasks.items import Scores

MEAN = "mean over tasks"
MOST_ITEMS = 10_000_000
"""More items are not proposed."""


@dataclass(frozen=True)
class Standing:
    """How one model stands in one task, or in the mean over tasks.

    `value` has a single 95 % interval. `difference` is this model minus the best one, with an interval that holds for
    all pairs of models at once; None for the best. `verdict` is "best", "worse on items like these", "not
    distinguishable", or "equal within M". `needed` is the number of items that would be enough to tell this model from
    the best, if the difference stays as observed; None if the verdict is another, or if no number would do.
    """

    model: str
    value: Interval
    difference: Interval | None
    verdict: str
    needed: int | None


@dataclass(frozen=True)
class Contest:
    """All models in one task, best first. `items` and `clusters` count the examples and their independent groups.
    `noun` says what the examples are called.

    `share` tells whether the metric lies between 0 and 1 for every item, so that the task counts in the mean over
    tasks. `models` has the models in the order they were given; `low_PP` and `high_PP` are the simultaneous bounds of
    model minus model in this order.
    """

    task: str
    metric: str
    mode: Mode
    standings: list[Standing]
    items: int
    clusters: int
    noun: str
    share: bool
    models: list[str]
    low_PP: np.ndarray
    high_PP: np.ndarray

    @property
    def digits(self) -> int:
        """The number of decimals that show two digits of the narrowest interval."""
        intervals = [i for standing in self.standings for i in (standing.value, standing.difference) if i]
        halves = [(i.high - i.low) / 2 for i in intervals if i.low is not None and i.high is not None]
        narrowest = min((half for half in halves if half > 0), default=1e-3)
        return min(max(1 - math.floor(math.log10(narrowest)), 2), MOST_DIGITS)


@dataclass(frozen=True)
class ModelComparison:
    """The contests of models in all tasks. `mean` is that of the mean over tasks; None if there is one task only."""

    contests: list[Contest]
    mean: Contest | None
    notes: list[str]

    @property
    def all(self) -> list[Contest]:
        """The contests of the tasks, and that of the mean last."""
        return [*self.contests, *([self.mean] if self.mean else [])]


def compare_models(
    measured: Sequence[Sequence[Measured]], *, margin: float = 0.0, why: str = "", draws: int = DRAWS
) -> ModelComparison:
    """Compare models; `measured` has the results of each model in all tasks.

    `why` says why no verdict holds for other models made in the same way, such as "one seed"; then a clear difference
    has the verdict "differs on these examples; one seed".

    A single model has intervals, and is the best.

    Raises:
        UserError: the margin is wrong, or models were measured on different items.
    """
    if not (margin >= 0 and math.isfinite(margin)):
        raise UserError(f"margin {margin:g}: give a number above 0, in units of the metric, such as 0.01")
    contests = [_contest(models, margin, why, draws) for models in by_task(measured)]
    counted = [contest for contest in contests if contest.share and contest.clusters >= LEAST_CLUSTERS]
    mean = _mean(counted, margin, why) if len(counted) > 1 else None
    return ModelComparison(contests, mean, _notes(contests, counted if mean else []))


def _contest(models: Sequence[Measured], margin: float, why: str, draws: int) -> Contest:
    first = models[0]
    for model in models:
        if not (np.isfinite(model.scores.value_E).all() and model.scores.weight_E.sum() > 0):
            raise UserError(f"{model.origin}: a value of task {model.task} is not a finite number, or nothing counts")
    _, cluster_E = np.unique(first.scores.cluster_E, return_inverse=True)
    clusters = int(cluster_E.max()) + 1
    numerator_PC, denominator_PC = (
        np.stack([np.bincount(cluster_E, terms(model.scores), clusters) for model in models])
        for terms in (lambda scores: scores.value_E, lambda scores: scores.weight_E)
    )
    if clusters == 1:  # A single cluster cannot be resampled. With so few no bounds are shown.
        numerator_PC, denominator_PC = np.tile(numerator_PC, 2), np.tile(denominator_PC, 2)
    binary = all(is_binary(model.scores.value_E, model.scores.weight_E) for model in models)
    points = len(models)
    found = judge(
        numerator_PC, denominator_PC, np.arange(points), np.zeros(points, int), larger_is_better=first.mode == "max",
        binary=binary, draws=draws,
    )  # fmt: skip
    names = [model.model for model in models]
    items = len(cluster_E)

    def needed(p: int, best: int) -> int | None:
        reach = float(_reach(found.difference_PP[p, best], found.low_PP[p, best], found.high_PP[p, best]))
        factor = _factor(float(found.difference_PP[p, best]), reach)
        if binary:
            difference_C = numerator_PC[p] - numerator_PC[best]
            above, below = int((difference_C > 0).sum()), int((difference_C < 0).sum())
            factor = max(factor, _exact_factor(above, below, points * (points - 1) // 2))
        return _more_items(factor, items)

    return Contest(
        first.task, first.metric, first.mode,
        _standings(names, found.order_P, *_values(found), needed, clusters, first.mode, margin, why),
        items, clusters, first.noun,
        share=first.task != VALIDATION and first.mode == "max" and all(_is_share(model.scores) for model in models),
        models=names, low_PP=found.low_PP, high_PP=found.high_PP,
    )  # fmt: skip


def _values(found: Statistics) -> tuple[list[Interval], np.ndarray, np.ndarray, np.ndarray]:
    bounds = zip(found.estimate_P.tolist(), found.low_P.tolist(), found.high_P.tolist())
    return [Interval(*each) for each in bounds], found.difference_PP, found.low_PP, found.high_PP


def _standings(
    names: Sequence[str], order_P: np.ndarray, values: Sequence[Interval], difference_PP: np.ndarray,
    low_PP: np.ndarray, high_PP: np.ndarray, needed: Callable[[int, int], int | None], clusters: int, mode: Mode,
    margin: float, why: str,
) -> list[Standing]:  # fmt: skip
    """Return the standings of all models, best first. With too few clusters, they have no bounds."""
    best, sign, standings = int(order_P[0]), 1.0 if mode == "min" else -1.0, list[Standing]()
    for p in map(int, order_P):
        value, difference = values[p], float(difference_PP[p, best])
        if p == best:
            shown = value if clusters >= LEAST_CLUSTERS else Interval(value.value)
            standings.append(Standing(names[p], shown, None, "best", None))
        elif clusters < LEAST_CLUSTERS:
            standings.append(
                Standing(names[p], Interval(value.value), Interval(difference), "not distinguishable", None)
            )
        else:
            low, high = float(low_PP[p, best]), float(high_PP[p, best])
            verdict = verdict_of(*sorted((sign * low, sign * high)), margin=margin, only_models=why)
            more = needed(p, best) if verdict == "not distinguishable" else None
            verdict = f"{verdict} on items like these" if verdict in ("better", "worse") else verdict
            standings.append(Standing(names[p], value, Interval(difference, low, high), verdict, more))
    return standings


def _is_share(scores: Scores) -> bool:
    return bool((scores.value_E >= 0).all() and (scores.value_E <= scores.weight_E).all())


def _mean(contests: Sequence[Contest], margin: float, why: str) -> Contest:
    """Return the contest in the mean over tasks: each task counts the same, whatever its number of items.

    Bounds are combined by the method of variance estimates recovery (Zou & Donner 2008): the distances from the value
    to its bound, as they are in each task, add as independent errors do. So they keep what is special about shares.
    """
    tasks, names = len(contests), contests[0].models
    value_PK = np.array([[_standing(contest, name).value.value for contest in contests] for name in names])
    low_PK, high_PK = (
        np.array([[getattr(_standing(contest, name).value, end) for contest in contests] for name in names])
        for end in ("low", "high")
    )
    value_P = value_PK.mean(1)
    difference_PPK = value_PK[:, None] - value_PK
    low_PPK, high_PPK = (np.stack([getattr(c, end) for c in contests], 2) for end in ("low_PP", "high_PP"))

    def combined(value: np.ndarray, bound: np.ndarray) -> np.ndarray:
        return np.sqrt(((value - bound) ** 2).sum(-1)) / tasks

    low_P, high_P = value_P - combined(value_PK, low_PK), value_P + combined(value_PK, high_PK)
    difference_PP = difference_PPK.mean(2)
    low_PP = difference_PP - combined(difference_PPK, low_PPK)
    high_PP = difference_PP + combined(difference_PPK, high_PPK)
    items, clusters = sum(c.items for c in contests), sum(c.clusters for c in contests)

    def needed(p: int, best: int) -> int | None:
        reach = float(_reach(difference_PP[p, best], low_PP[p, best], high_PP[p, best]))
        return _more_items(_factor(float(difference_PP[p, best]), reach), items)

    intervals = [Interval(*each) for each in zip(value_P.tolist(), low_P.tolist(), high_P.tolist())]
    order_P = np.argsort(-value_P, kind="stable")
    return Contest(
        MEAN, MEAN, "max",
        _standings(names, order_P, intervals, difference_PP, low_PP, high_PP, needed, clusters, "max", margin, why),
        items, clusters, "items", share=True, models=names, low_PP=low_PP, high_PP=high_PP,
    )  # fmt: skip


def _standing(contest: Contest, model: str) -> Standing:
    return next(standing for standing in contest.standings if standing.model == model)


def _reach(difference: float, low: float, high: float) -> float:
    """Return how far the interval of a difference reaches towards 0 from the difference."""
    return difference - low if difference > 0 else high - difference


def _factor(difference: float, reach: float) -> float:
    """Return how many times as many items make an interval reach less far than 0: it narrows with their square root."""
    return (reach / difference) ** 2 if difference else math.inf


def _exact_factor(above: int, below: int, pairs: int) -> float:
    """Return how many times as many differing items make the exact test clear, in the same proportion; 0 if it is.

    With FEW_DISCORDANT of them or more the exact test does not decide.
    """
    if not (now := above + below):
        return math.inf
    for count in range(now, FEW_DISCORDANT):
        more = round(count * above / now)
        if mid_p(more, count - more) <= 0.05 / pairs:
            return count / now if count > now else 0.0
    return FEW_DISCORDANT / now if now < FEW_DISCORDANT else 0.0


def _more_items(factor: float, items: int) -> int | None:
    number = max(factor, 1.0) * items
    return None if number > MOST_ITEMS else max(items + 1, math.ceil(number))


def _notes(contests: Sequence[Contest], counted: Sequence[Contest]) -> list[str]:
    """Return notes for the reader of the tables. `counted` are the contests that the mean over tasks includes."""
    notes: list[str] = []
    if few := [contest.task for contest in contests if contest.clusters < LEAST_CLUSTERS]:
        notes.append(f"Too few items for intervals: {_listed(few)}.")
    left = [c.task for c in contests if c not in counted and c.task not in (*few, VALIDATION)]
    if counted and (left or few):
        notes.append(f"The mean is over {len(counted)} tasks; it leaves out {_listed([*left, *few])}.")
    return notes


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(islice(names, most)) + (f" and {len(names) - most} more" if len(names) > most else "")
