"""What a run takes of the cluster all at once, and how waiting for it ends. Without Ray."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.data import DataContext
from ray.util.placement_group import PlacementGroup

from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray import reservation
from minimind_ray.on_ray.reservation import NoRoomError, Reservation, StoppedError, reserved

pytestmark = pytest.mark.unit

SCALE = ScaleConfig(workers=2, cpus_per_worker=3.0, gpus_per_worker=1.0)
BUNDLES = [{"CPU": 3.0, "GPU": 1.0}] * 2 + [{"CPU": 1.0}]


class Group:
    """A placement group that is there once it has been looked at `waits` times."""

    def __init__(self, bundles: list[dict[str, float]], waits: float) -> None:
        self.bundles, self.waits = bundles, waits

    def state(self) -> dict[str, str]:
        self.waits -= 1
        return {"state": "CREATED" if self.waits < 0 else "PENDING"}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How often a group is to be looked at, and which were made and removed."""
    seen: dict[str, Any] = {"waits": 0, "made": [], "removed": []}

    def make(bundles: list[dict[str, float]], name: str) -> Group:
        seen["made"].append(Group(bundles, seen["waits"]))
        return seen["made"][-1]

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(reservation, "placement_group", make)
    monkeypatch.setattr(reservation, "placement_group_table", Group.state)
    monkeypatch.setattr(reservation, "group_name", lambda: "name")
    monkeypatch.setattr(reservation, "private_parts", lambda: True)
    monkeypatch.setattr(reservation, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(reservation, "remove_placement_group", seen["removed"].append)
    return seen


def test_workers_and_ray_datas_cpu_come_together(groups: dict[str, Any]) -> None:
    groups["waits"] = 3
    with reserved(SCALE, 2, 1, lambda: False, 60.0) as found:
        assert found.group.bundles == BUNDLES and not groups["removed"]
        assert found.data_config()._user_execution_options.resource_limits.cpu == 1  # pyright: ignore
    assert groups["removed"] == groups["made"]


def test_by_public_means_ray_train_takes_the_workers_part(
    groups: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservation, "private_parts", lambda: False)
    with reserved(SCALE, 2, 1, lambda: False, 60.0) as found:
        everything, data = groups["made"]
        assert everything.bundles == BUNDLES and groups["removed"] == [everything]
        assert found.group is data and data.bundles == [{"CPU": 1.0}]
    assert groups["removed"] == groups["made"]


@pytest.mark.parametrize(("stopped", "seconds", "error"), [(True, 60.0, StoppedError), (False, 0.0, NoRoomError)])
def test_waiting_for_room_ends(groups: dict[str, Any], stopped: bool, seconds: float, error: type[Exception]) -> None:
    groups["waits"] = float("inf")
    with pytest.raises(error), reserved(SCALE, 2, 1, lambda: stopped, seconds):
        raise AssertionError
    assert groups["removed"] == groups["made"]


def test_only_the_runs_own_tasks_are_in_its_group() -> None:
    before, group = DataContext.get_current().scheduling_strategy, PlacementGroup.empty()
    made = Reservation(group, 1).dataset(DataContext.get_current)
    assert made.scheduling_strategy.placement_group is group  # pyright: ignore
    assert made.scheduling_strategy_large_args.placement_group is group  # pyright: ignore
    assert DataContext.get_current().scheduling_strategy == before
