"""What a sweep cost: places x time by the clock x price, over all processes that ran the sweep."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from minimind_ray.data.claim import claimed
from minimind_ray.sweep.compare import compare
from minimind_ray.sweep.cost import cost_text, recorded_session, sweep_cost, terms_text
from minimind_ray.sweep.export import sentences
from minimind_ray.sweep.trials import Sweep, read_sweep
from tests.sweep.synthetic import BEGAN, make_sweep

pytestmark = pytest.mark.unit


def small(directory: Path, **changes: Any) -> Sweep:
    """A sweep of two trials at 1.8 an hour, with `changes` in its sweep.json."""
    path = make_sweep(directory / "sweep", axes={"dpo.beta": "0.1,0.2"}, seeds=1, steps=10, price_per_hour=1.8)
    file = path / "sweep.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return read_sweep(path)


def session(began: int, ended: int | None, places: int) -> dict[str, Any]:
    end = None if ended is None else (BEGAN + timedelta(seconds=ended)).isoformat()
    return {"began": (BEGAN + timedelta(seconds=began)).isoformat(), "ended": end, "places": places}


def test_all_sessions_count_with_their_places(tmp_path: Path) -> None:
    sweep = small(tmp_path, sessions=[session(0, 1000, 2), session(5000, 5500, 4)])
    assert sweep_cost(sweep) == pytest.approx((2 * 1000 + 4 * 500) / 3600 * 1.8)
    assert cost_text(sweep) == (
        f"Sweep sweep took 25:00 and cost 2.00, {terms_text(4, 1.8)}; a point's cost is its part of this by training "
        "time."
    )
    comparison = compare([sweep])
    assert cost_text(sweep) in sentences(comparison)
    assert sum(row.cost or 0 for row in comparison.rows) == pytest.approx(2.0)


def test_a_sweep_without_price_or_sessions_has_no_cost(tmp_path: Path) -> None:
    sweep = small(tmp_path, sessions=[])
    assert sweep_cost(sweep) is None and cost_text(sweep) == ""
    assert [row.cost for row in compare([sweep]).rows] == [None, None]
    other = small(tmp_path / "other", price_per_hour=None)
    assert sweep_cost(other) is None and cost_text(other) == ""


def test_a_killed_process_counts_until_the_last_change(tmp_path: Path) -> None:
    path = small(tmp_path, sessions=[session(0, None, 2)]).path
    assert sweep_cost(read_sweep(path)) == 0
    file = path / "trials" / "beta=0.2,seed=0" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "updated": "2026-11-24T08:10:00+00:00"}))
    assert sweep_cost(read_sweep(path)) == pytest.approx(2 * 600 / 3600 * 1.8)
    # A resume ends the session for good, before the trials change again.
    with recorded_session(path, BEGAN + timedelta(hours=1), 2):
        file.write_text(json.dumps({**json.loads(file.read_text()), "updated": "2026-11-24T09:10:00+00:00"}))
    first, second = read_sweep(path).info.sessions
    assert first.ended == BEGAN + timedelta(seconds=600)
    assert second.began == BEGAN + timedelta(hours=1) and second.ended


def test_a_running_sweep_costs_until_now(tmp_path: Path) -> None:
    path = small(tmp_path, sessions=[]).path
    with claimed(path), recorded_session(path, datetime.now(UTC) - timedelta(hours=1), 2):
        assert sweep_cost(read_sweep(path)) == pytest.approx(2 * 1.8, rel=0.01)
    # An error of the sweep ends the session as well.
    with pytest.raises(ZeroDivisionError), recorded_session(path, datetime.now(UTC), 1):
        raise ZeroDivisionError
    assert all(session.ended for session in read_sweep(path).info.sessions)
