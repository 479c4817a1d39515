"""Say in words how a comparison was computed, and what its reader has to know about its trials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minimind_ray.sweep.gather import Results
from minimind_ray.sweep.importance import Importance
from minimind_ray.sweep.more import narrowing
from minimind_ray.sweep.statistics import Statistics
from minimind_ray.sweep.table import LEAST_CLUSTERS, Row, only_models

FEW_CLUSTERS = 30
MOST_NAMES = 5


def method_of(results: Results, found: Statistics, rows: Sequence[Row], margin: float) -> str:
    """Return how the intervals were computed, in sentences. Empty if there are too few clusters for intervals."""
    if results.clusters < LEAST_CLUSTERS:
        return ""
    drawn = f"whole {results.noun} are resampled" if results.clusters < results.examples else "examples are resampled"
    sources = [f"the {results.examples_noun} (bootstrap: {drawn}, the same for every trial)"]
    if _one_seed(rows):
        text = f"Intervals cover 95 % and account only for {sources[0]}, since each point has one seed."
    else:
        text = f"Intervals cover 95 % and account for both {sources[0]} and the seeds (Student's t)."
    if only_models(rows) == "pbt":
        rough = "" if _one_seed(rows) else ", and the part of the seeds is only rough"
        text += (
            " pbt gave trials the weights of other trials, so the trials are not independent runs of their settings: "
            f"the verdicts compare these trained models{rough}."
        )
    if results.extra_T.any():
        text += " They include the uncertainty of predicted ends."
    if results.binary:
        text += (
            " The intervals of shares are Wilson's; where few examples differ between two points, the mid-p McNemar "
            "test decides."
        )
    if len(found.order_P) > 1:
        text += (
            " A point differs from the best if the interval of their paired difference does not contain zero. These "
            "intervals hold for all pairs of points at once, because the best was chosen from the same data."
        )
    if margin > 0 and not only_models(rows):
        text += (
            f" A point equals the best within {margin:g} if this interval lies inside -{margin:g} to {margin:g} (two "
            "one-sided tests at 2.5 % each)."
        )
    return text


def notes_of(results: Results | None, found: Statistics | None, rows: Sequence[Row]) -> list[str]:
    """Return sentences on what limits a comparison; `found` and `results` are None if nothing can be compared.

    The first rows are those that are compared.
    """
    notes = _clusters(results) if results else []
    compared = [row for row in rows if row.compared]
    if results and found and results.clusters >= LEAST_CLUSTERS:
        notes += _seeds(rows, found)
    lengths = {trial.length for row in rows for trial in row.trials if trial.length}
    if len(lengths) > 1:
        notes.append(
            f"The trials train for different numbers of steps, {min(lengths):,} to {max(lengths):,}. Each trial counts "
            "with the end of its own run."
        )
    seeds = {frozenset(trial.seed for trial in row.compared) for row in compared}
    if any(a.isdisjoint(b) for a in seeds for b in seeds):
        notes.append(
            "Points that have no seed in common differ by their seeds, too: as far as this effect is known, the "
            "intervals of their differences account for it."
        )
    elif len(seeds) > 1:
        notes.append("Points that lack a seed are compared without that seed's effect on the other points.")
    if any(t.lineage for row in rows for t in row.trials):
        notes.append("pbt moved points in training: the table shows where each began, and its status where it ended.")
    if stopped := sum(row.stopped_seeds for row in compared):
        notes.append(
            f"{stopped} stopped trial(s) count with a predicted end: from where they stopped, their metric is taken to "
            "change as that of the trials that trained on."
        )
    early = [row for row in rows if row.early_step is not None]
    steps = sorted({row.early_step for row in early if row.early_step is not None})  # Each sweep has its own.
    at = f"step{'s' if len(steps) > 1 else ''} {' and '.join(map(str, steps))}"
    if early and not compared:
        notes.append(
            "No point has a verdict yet, because too few trials have finished. The values are those at the last step "
            f"at which all trials were validated, {at}."
        )
    elif early:
        notes.append(
            "The ends of some stopped trials cannot be predicted, and the other seeds alone would make their points "
            f"look too good. So these points get no verdict: {_listed([row.label for row in early])}. Their values are "
            f"those at the last step at which all trials were validated, {at}."
        )
    dropped = [trial for row in rows for trial in row.left_out if trial[1] not in ("running", "waiting")]
    if left_out := [f"{id} ({reason})" for id, reason in dropped]:
        notes.append(f"Not compared: {_listed(left_out)}.")
    notes += _diverged(compared)
    if lost := [row.label for row in compared if sum(t in dropped for t in row.left_out) > row.diverged_seeds]:
        notes.append(
            "If a lost trial diverged, only the lucky seeds of its point count, and the point looks too good. Points "
            f"with lost trials: {_listed(lost)}."
        )
    return notes


def importance_notes(found: Sequence[Importance], why: str, rows: Sequence[Row], others: Sequence[Row]) -> list[str]:
    """Return sentences on what limits the importance of the axes. `others` are the points that are not compared."""
    notes = [why] if why else []
    if found and others:
        notes.append(
            f"The importance rests on the {len(rows)} points that are compared. It says little about the settings of "
            f"the {len(others)} other point(s), such as settings that fail or are stopped early."
        )
    if found and _one_seed(rows):
        notes.append("With one seed, the importance counts luck with the seed as an effect of the settings.")
    return notes


def _diverged(compared: Sequence[Row]) -> list[str]:
    """Return the note on points that lost seeds by divergence. `compared` are the compared rows, best first."""
    lost = [row for row in compared if row.diverged_seeds]
    if not lost:
        return []
    one = len(lost) == 1
    counts = [f"{row.label} {'' if one else '('}lost {row.diverged_seeds} of {len(row.trials)} seeds" for row in lost]
    who, them = ("it", "it") if one else ("they", "them")
    if compared[0].diverged_seeds:
        rule = "Every point with a finished trial lost a seed so, and no point is called worse than another."
    else:
        rule = f"So {who} cannot be the best or be called better, and no point is called worse than {them}."
    if one:
        text = (
            f"{counts[0]} by divergence: the loss was not finite. Its value is that of the other seeds alone, and has"
        )
    else:
        text = (
            f"The loss of some seeds was not finite: {_listed([f'{count})' for count in counts])}. The values of these "
            "points are those of the other seeds alone, and have"
        )
    return [f"{text} no interval. {rule}"]


def _clusters(results: Results) -> list[str]:
    return _few(results) + _groupings(results)


def _groupings(results: Results) -> list[str]:
    if not results.finer:
        return []
    return [
        f"{results.finer} divides these {results.clusters:,} {results.noun} into smaller groups of examples, or knows "
        "no groups. The larger groups are resampled for all trials."
    ]


def _few(results: Results) -> list[str]:
    clusters, noun, examples = results.clusters, results.noun, results.examples
    kind, advice = results.examples_noun, "give data.val, or raise data.val_fraction"
    if kind == "items":
        advice = "let the task have more items"
    if examples < LEAST_CLUSTERS:
        return [f"{examples} {kind.removesuffix('s')}(s) are too few to compare points: {advice}."]
    if clusters < LEAST_CLUSTERS:
        few = f"their number of {noun} is only {clusters}"
        return [f"{examples:,} {kind} are too few to compare points, because {few}: {advice}."]
    if clusters < FEW_CLUSTERS:
        return [f"Only {clusters} {noun}: the intervals are rough. For better intervals, {advice}."]
    return []


def _seeds(rows: Sequence[Row], found: Statistics) -> list[str]:
    """Return the notes on the number of seeds and their spread. `rows` are in the order of `found.order_P`."""
    compared, notes = [row for row in rows if row.compared], list[str]()
    # More seeds do not make pbt's trials a comparison of settings, so they are not proposed.
    pbt = only_models(rows) == "pbt"
    if not pbt:
        notes += _few_seeds(rows)
    if found.vague_P.any() or found.vague_PP.any():
        seeds_P = np.array([len(compared[place].compared) for place in np.argsort(found.order_P)])
        notes.append(
            "Intervals that say nothing are left out: because of few seeds they would reach further than all trials "
            f"lie apart.{'' if pbt else _of_another_seed(seeds_P, found)}"
        )
    odd = [compared[place].label for place, p in enumerate(found.order_P) if found.odd_P[p]]
    if odd:
        notes.append(
            f"The seeds of {_listed(odd)} differ much more than those of the other points. Its intervals use its own "
            "spread, and those of the other points do not use this spread. A setting that varies this much may be "
            "unstable."
            if len(odd) == 1
            else f"The seeds of these points differ much more than those of the other points: {_listed(odd)}. Their "
            "intervals use their own spread, and those of the other points do not use these spreads. Settings that "
            "vary this much may be unstable."
        )
    return notes


def _of_another_seed(seeds_P: np.ndarray, found: Statistics) -> str:
    """Return what one more seed of each point would do to the intervals that say nothing, as a sentence."""
    free_P = found.seeds_free_P
    points = [(p, min(free_P[p], found.common_free or np.inf)) for p in np.flatnonzero(found.vague_P)]
    # Of a pair, the point that is known less decides.
    pairs = [min((i, j), key=lambda p: free_P[p]) for i, j in zip(*np.nonzero(np.triu(found.vague_PP)))]
    parts = [narrowing(int(seeds_P[p]), max(1.0, free)) for p, free in points + [(p, free_P[p]) for p in pairs]]
    return f" One more seed of each point would narrow them to about {max(parts):.0%} of their width."


def _few_seeds(rows: Sequence[Row]) -> list[str]:
    if _one_seed(rows):
        more = any(len(row.trials) > 1 for row in rows)
        advice = "no point has two finished seeds" if more else "use --seeds 2 or more to compare settings"
        return [
            "One seed: intervals account only for the examples. The verdicts compare these trained models, "
            f"not their settings; {advice}."
        ]
    if all(len(row.compared) <= 2 for row in rows if row.compared):
        return ["Two seeds say little about a seed's effect on all points: a third narrows the intervals."]
    return []


def _one_seed(rows: Sequence[Row]) -> bool:
    return all(len(row.compared) <= 1 for row in rows)


def _listed(names: Sequence[str]) -> str:
    left = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {left} more" if left > 0 else "")
