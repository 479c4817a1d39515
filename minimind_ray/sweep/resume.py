"""Continue a sweep: read its plan from its directory, and add seeds to its points."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import ValidationError

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config, validate
from minimind_ray.config.paths import output_path
from minimind_ray.config.reading import read_json
from minimind_ray.config.search import SearchConfig, search_config
from minimind_ray.data.storage import url_of
from minimind_ray.stages.run import Job, changed_inputs
from minimind_ray.sweep.axes import Axis, Grid, PlannedTrial, parse_axis, short_names, trial_id
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.export import MOST_PAIRS
from minimind_ray.sweep.plan import DONE, SweepPlan, check_seeds, create_trial
from minimind_ray.sweep.table import Comparison
from minimind_ray.sweep.text import duration_text, value_text
from minimind_ray.sweep.trials import MoreSeeds, SweepInfo, TrialInfo, open_sweep, read_sweep, update_info
from minimind_ray.train.run import RunDirectory

MAY_CHANGE = ("concurrent", "budget_hours", "fuse", "seeds")
"""The settings of the search that a resume may change."""


def resumed_plan(path: str | Path, asked: Mapping[str, Any]) -> SweepPlan:
    """Return the plan of the sweep in `path`, changed by the options of `tune` that were given, by names in Python.

    Raises:
        UserError: an option that cannot change or another stage was given; also as `reopen_sweep` and `with_seeds`.
    """
    if fixed := [name.strip("_") for name in asked if name not in ("stage", "points", *MAY_CHANGE)]:
        raise UserError(
            f"--resume continues the sweep with its own settings: leave --{fixed[0].replace('_', '-')} out, or start "
            "another sweep"
        )
    plan = reopen_sweep(path)
    if asked.get("stage", plan.base.stage) != plan.base.stage:
        raise UserError(f"{path} is a sweep of {plan.base.stage}, not of {asked['stage']}")
    search = search_config({**plan.search.model_dump(), **{name: asked[name] for name in MAY_CHANGE if name in asked}})
    plan = replace(plan, search=search.model_copy(update={"seeds": plan.search.seeds}))
    if "seeds" in asked:
        return with_seeds(plan, search.seeds, asked.get("points", ()))
    if "points" in asked:
        raise UserError("--points chooses the points to which --seeds adds seeds: give --seeds, too")
    return plan


def reopen_sweep(path: str | Path) -> SweepPlan:
    """Return the plan of a sweep that was started before: all trials that have a directory, in their order.

    After them come the seeds that points still lack, because a resume was told to add them and was interrupted.

    Raises:
        UserError: the directory holds no sweep, or a file is damaged.
    """
    path = open_sweep(output_path(url_of(path)))
    if not (path / "sweep.json").exists():
        raise UserError(f"{url_of(path)} holds no sweep to resume: leave --resume out to start one")
    content = read_json(path / "sweep.json")
    try:
        info, search = SweepInfo.model_validate(content), SearchConfig.model_validate(content["search"])
    except (ValidationError, KeyError) as error:
        raise UserError(f"{path / 'sweep.json'} is damaged: {str(error).splitlines()[0]}") from None
    found: list[tuple[int, PlannedTrial]] = []
    refused: list[dict[str, Any]] = []
    for file in (path / "trials").glob("*/trial.json"):
        facts = read_json(file)
        try:
            trial, number = TrialInfo.model_validate(facts), int(facts["number"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
        if not file.with_name("config.yaml").exists():
            if RunDirectory(file.parent).info().get("state") == "failed" and trial.point not in refused:
                refused.append(trial.point)
            continue  # An earlier process died before it wrote the config. The trial will be made again.
        # Use the trial's own config, because budgets and pbt change it. The sweep's directory may have moved.
        config = load_config(info.stage, [file.with_name("config.yaml")])
        found.append((number, PlannedTrial(trial.id, trial.point, trial.seed, config)))
    trials = tuple(trial for _, trial in sorted(found, key=lambda pair: pair[0]))
    axes = tuple(parse_axis(key, spec) for key, spec in info.axes.items())
    for point in [*(trial.point for trial in trials), *refused]:
        _require_on_axes(point, axes, path)
    more = tuple(info.more_seeds)
    plan = SweepPlan(path, validate(info.config), axes, search, (), tuple(refused), more_seeds=more)
    return _with_missing(replace(plan, trials=tuple(map(plan.in_place, trials))))


def _with_missing(plan: SweepPlan) -> SweepPlan:
    """Return the plan with the trials that its points lack, in the order of a sweep that begins with these seeds.

    Except for the seed, an added trial's config is that of the point's first trial, which a budget may have shortened.
    """
    first, there = plan.base.train.seed, {trial.id for trial in plan.trials}
    of_points = {repr(trial.point): trial for trial in reversed(plan.trials)}
    trials = list(reversed(of_points.values()))
    added = [
        _with_seed(trial, seed)
        for seed in range(first, first + plan.most_seeds)
        for trial in trials
        if seed < first + plan.seeds_at(trial.point) and trial_id(trial.point, seed) not in there
    ]
    return replace(plan, trials=(*plan.trials, *map(plan.in_place, added)))


def _with_seed(trial: PlannedTrial, seed: int) -> PlannedTrial:
    train = trial.config.train.model_copy(update={"seed": seed})
    config = trial.config.model_copy(update={"train": train})
    return PlannedTrial(trial_id(trial.point, seed), trial.point, seed, config)


def with_seeds(plan: SweepPlan, seeds: int, points: str | Sequence[str] = ()) -> SweepPlan:
    """Return the plan with `seeds` seeds for every point, or only for the chosen `points` (see `chosen_points`).

    With optuna, these are the points tried so far, and without `points` also those to come. A budget of tokens grows
    with the number of trials, so that each trial keeps its length.

    Raises:
        UserError: a point has more seeds already, there would be too many, or the sweep's scheduler is pbt; also as
            `chosen_points`.
    """
    check_seeds(seeds, plan.most_seeds)
    if plan.search.scheduler == "pbt":
        raise UserError(
            "--seeds cannot add seeds to a sweep with pbt, in which trials take over weights from each other: start "
            "another sweep"
        )
    chosen = chosen_points(plan, points) if points else []
    if (most := max(map(plan.seeds_at, chosen), default=plan.search.seeds)) > seeds:
        raise UserError(f"--seeds {seeds}: there are {most} seeds already; give a larger number to add seeds")
    chosen_more = [MoreSeeds(point=point, seeds=seeds) for point in chosen]
    more = [*(more for more in plan.more_seeds if more.point not in chosen), *chosen_more]
    search, tokens = plan.search, plan.search.budget_tokens
    if not points:
        budget = tokens and tokens * seeds // search.seeds
        search = search.model_copy(update={"seeds": seeds, "budget_tokens": budget})
    more = tuple(m for m in more if m.seeds > search.seeds)
    return _with_missing(replace(plan, search=search, more_seeds=more))


RANKS = ("best", "second", "third")


def chosen_points(plan: SweepPlan, texts: str | Sequence[str]) -> list[dict[str, Any]]:
    """Return the sweep's points that the text or at least one of `texts` names.

    A text holds ranks in the comparison so far, such as "best,second", or values on the axes as tables and trials'
    names show them, such as "beta=0.1,lr=1e-5", or both. A point has to have all these values. Numbers may be written
    in any way, and spaces do not matter.

    Raises:
        UserError: a text names no point.
    """
    points = list({repr(trial.point): trial.point for trial in plan.trials}.values())
    next_part = r",(?=\s*(?:[\w.]+\s*=|(?:best|second|third)\s*(?:,|$)))"
    parts = [[part.strip() for part in re.split(next_part, text)] for text in _as_texts(texts)]
    found = _ranked(plan, {RANKS.index(part) for of_text in parts for part in of_text if part in RANKS})
    for of_text in parts:
        if values := [part for part in of_text if part not in RANKS]:
            found += _with_values(plan, points, values)
    return [point for point in points if point in found]


def _as_texts(given: Any) -> list[str]:
    """Return one or several texts as a list. In Python, any value may have been given. Raises UserError."""
    texts = list(given) if isinstance(given, list | tuple) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"points {texts}: give texts, such as best,second or beta=0.1")
    return texts


def _ranked(plan: SweepPlan, ranks: Collection[int]) -> list[dict[str, Any]]:
    """Return the points that have these ranks (from 0) in the comparison so far. Raises UserError."""
    compared = [row for row in compare([read_sweep(plan.path)]).rows if row.compared] if ranks else []
    if ranks and max(ranks) >= len(compared):
        raise UserError(f"--points {RANKS[max(ranks)]}: only {len(compared)} points of the sweep have results so far")
    return [compared[rank].trials[0].point for rank in ranks]


def _with_values(plan: SweepPlan, points: Sequence[dict[str, Any]], values: Sequence[str]) -> list[dict[str, Any]]:
    keys = {name: key for key, short in short_names([axis.key for axis in plan.axes]).items() for name in (key, short)}
    for name, separator, value in (map(str.strip, text.partition("=")) for text in values):
        if not separator or name not in keys:
            raise UserError(
                f"--points {','.join(values)}: expected {', '.join(RANKS)}, or a value on an axis, such as beta=0.1; "
                f"the sweep's axes are {', '.join(short_names([axis.key for axis in plan.axes]).values())}"
            )
        points = [point for point in points if _is_value(value, point[keys[name]])]
    if not points:
        raise UserError(f"--points {','.join(values)}: the sweep has no such point; minimind-ray compare lists them")
    return list(points)


def _is_value(text: str, value: Any) -> bool:
    """Whether a text means an axis's value."""
    if text in (value_text(value), str(value)):
        return True
    with suppress(ValueError):
        return not isinstance(value, bool) and isinstance(value, int | float) and float(text) == value
    return False


def seeds_commands(comparison: Comparison, path: str, *, ranked: bool = True) -> list[str]:
    """Return sentences with the commands that would decide pairs of points by more seeds, and what they take.

    They are about the same pairs as `more_texts`, except those that no number of seeds would decide. `path` is the
    directory or URL of the comparison's only sweep. The points are named by their rank, as far as there are words for
    it, unless `ranked` is False because the sweep itself is judged by another metric.
    """
    rows = [row for row in comparison.rows if row.compared]
    if any(trial.lineage for row in rows for trial in row.trials):
        return []  # With pbt, seeds cannot be added.
    labels, found = [row.label for row in rows], list[str]()
    for more in comparison.more[:MOST_PAIRS]:
        if more.seeds is None or any(labels.count(label) != 1 for label in more.pair):
            continue
        chosen = sorted(labels.index(label) for label in more.pair)
        texts = [_point_text(rows[rank].trials[0].point, rank if ranked else None) for rank in chosen]
        points = [",".join(texts)] if ranked else texts
        time = "" if more.seconds is None else f", {duration_text(more.seconds)} more training"
        price = "" if more.cost is None else f" for {more.cost:.2f}"
        found.append(
            f"{more.seeds} seeds of {' and '.join(more.pair)}{time}{price}: "
            f"minimind-ray tune --resume {quote(path)} --seeds {more.seeds}"
            + "".join(f" --points {quote(text)}" for text in points)
        )
    return found


def _point_text(point: Mapping[str, Any], rank: int | None) -> str:
    """Return the text that `chosen_points` reads: the rank if it is given, or the values on the axes."""
    if rank is not None and rank < len(RANKS):
        return RANKS[rank]
    names = short_names(list(point))
    return ",".join(f"{names[k]}={value_text(v)}" for k, v in point.items())


def _require_on_axes(point: Mapping[str, Any], axes: Sequence[Axis], path: Path) -> None:
    """Raise UserError if the point of a trial is not on the axes of sweep.json."""
    for axis in axes:
        if axis.key not in point or isinstance(axis, Grid) and point[axis.key] not in axis.values:
            raise UserError(
                f"{url_of(path)}: a trial's {axis.key} is {point.get(axis.key)!r}, which is not on the axis in "
                f"sweep.json, {axis.to_json()}; start a new sweep"
            )


def continue_sweep(plan: SweepPlan, jobs: Sequence[Job], shared: dict[str, int]) -> int:
    """Update the directory of a sweep that is resumed. Make directories for added trials, and return their number.

    Raises:
        UserError: the data or the base of a trial has changed since it began.
    """
    there = [RunDirectory(job.config.out).file("config.yaml").exists() for job in jobs]
    for job, known in zip(jobs, there):
        if known:
            check_same_inputs(job)
    # Write sweep.json first: from it, another resume knows the trials that this process could not make.
    record_resume(plan, shared)
    number = sum(1 for _ in (plan.path / "trials").glob("*/trial.json"))
    for trial, job, known in zip(plan.trials, jobs, there):
        if not known:
            create_trial(trial, job, number)
            number += 1
    return there.count(False)


def check_same_inputs(job: Job) -> None:
    """Check that a resumed trial has the same data and base as when it began.

    Raises:
        UserError: the data or the base has changed.
    """
    run = RunDirectory(job.config.out)
    if changed := changed_inputs(job, run):
        raise UserError(
            f"{run.where}: {' and '.join(changed)} changed since the sweep began, or another version of minimind-ray "
            "prepares it differently; restore the old content, or start a new sweep"
        )


def record_resume(plan: SweepPlan, shared: dict[str, int]) -> None:
    """Update sweep.json when a sweep is resumed: its search settings and seeds, and the shared work done again."""
    before = read_json(plan.path / "sweep.json").get("shared", {})
    update_info(
        plan.path,
        seeds=plan.search.seeds,
        more_seeds=[more.model_dump(mode="json") for more in plan.more_seeds],
        search=plan.search.model_dump(mode="json"),
        shared={name: count + before.get(name, 0) * (name in DONE) for name, count in shared.items()},
    )
