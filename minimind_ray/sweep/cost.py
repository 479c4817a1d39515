"""What a sweep costs. The plan and the comparison use the same definition: places x time by the clock x price.

A place is the resources of a trial, or of a group of trials that share a process. Each place costs the price an hour
from the sweep's start to its end, as rented machines do: also while Ray and trials start, while a trial writes, and
while a place has no trial left.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from minimind_ray.config.reading import read_json
from minimind_ray.data.claim import live_writer
from minimind_ray.sweep.text import duration_text
from minimind_ray.sweep.trials import Session, Sweep, Trial, read_trial, update_info


def price(seconds: float, places: int, per_hour: float) -> float:
    """Return the price of this time on this number of places."""
    return seconds / 3600 * places * per_hour


def terms_text(places: int, per_hour: float) -> str:
    """Return what a price is for."""
    of = "1 trial place" if places == 1 else f"each of {places} trial places"
    return f"at {per_hour:g} an hour for {of}, from the sweep's start to its end"


def sweep_cost(sweep: Sweep) -> float | None:
    """Return the price of all sessions of a sweep so far.

    None without a price, and for sweeps of older versions, which did not record their sessions.
    """
    per_hour, sessions = sweep.info.price_per_hour, sweep.info.sessions
    if per_hour is None or not sessions:
        return None
    return sum(price(_seconds(session, sweep), session.places, per_hour) for session in sessions)


def cost_per_second(sweep: Sweep) -> float | None:
    """Return a sweep's cost for each second that one of its trials trained, with its share of all other time.

    None if the cost is unknown, and while no trial has trained.
    """
    cost, seconds = sweep_cost(sweep), sum(trial.seconds for trial in sweep.trials)
    return None if cost is None or not seconds else cost / seconds


def cost_text(sweep: Sweep) -> str:
    """Return a sentence about a sweep's time and cost; empty if the cost is unknown."""
    cost, per_hour, sessions = sweep_cost(sweep), sweep.info.price_per_hour, sweep.info.sessions
    if cost is None or per_hour is None:
        return ""
    seconds, places = sum(_seconds(session, sweep) for session in sessions), max(s.places for s in sessions)
    return (
        f"Sweep {sweep.name} took {duration_text(seconds)} and cost {cost:.2f}, {terms_text(places, per_hour)}; a "
        "point's cost is its part of this by training time."
    )


def _seconds(session: Session, sweep: Sweep) -> float:
    end = session.ended
    if not end:
        end = datetime.now(UTC) if live_writer(sweep.path) else _last_change(sweep.trials, session.began)
    return max(0.0, (end - session.began).total_seconds())


def _last_change(trials: Iterable[Trial], began: datetime) -> datetime:
    """Return when a trial's state last changed: a process that was killed had lived at least until then."""
    return max([began, *(trial.updated for trial in trials if trial.updated)])


@contextmanager
def recorded_session(path: Path, began: datetime, places: int) -> Generator[None]:
    """Record in sweep.json that this process runs the sweep in `path`, from `began` until the block ends."""
    file = path / "sweep.json"
    sessions = [Session.model_validate(each) for each in read_json(file).get("sessions", [])]
    if sessions and not sessions[-1].ended:  # Its process was killed. Its trials will soon change again.
        trials = [read_trial(file.parent) for file in path.glob("trials/*/trial.json")]
        sessions[-1].ended = _last_change(trials, sessions[-1].began)
    sessions.append(Session(began=began, places=places))
    _write(path, sessions)
    try:
        yield
    finally:
        sessions[-1].ended = datetime.now(UTC)
        _write(path, sessions)


def _write(path: Path, sessions: Sequence[Session]) -> None:
    update_info(path, sessions=[each.model_dump(mode="json") for each in sessions])
