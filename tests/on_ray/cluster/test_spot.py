"""Ray's own scheduler of machines, with the node types of cluster.yaml and our rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.constants import AUTOSCALER_UTILIZATION_SCORER_KEY
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

pytestmark = pytest.mark.unit

Launched = Callable[..., dict[str, int]]
CLUSTER = yaml.safe_load((Path(__file__).parents[3] / "cluster.yaml").read_text())


class NoNodes:
    """A provider that has started nothing yet."""

    def node_tags(self, node: str) -> dict[str, str]:
        raise AssertionError(node)


@pytest.fixture(params=["private", "public"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """Which machines a demand would start, where AWS has just refused those of some types."""
    monkeypatch.setenv("MINIMIND_PUBLIC_ONLY", str(int(request.param == "public")))
    (command,) = [c for c in CLUSTER["head_start_ray_commands"] if "--head" in c]
    (scorer,) = [word.split("=")[1] for word in command.split() if AUTOSCALER_UTILIZATION_SCORER_KEY in word]
    monkeypatch.setenv(AUTOSCALER_UTILIZATION_SCORER_KEY, scorer)
    logging.disable(logging.INFO)
    config = prepare_config(CLUSTER)

    def call(demand: list[dict[str, float]], *refused: str) -> dict[str, int]:
        scheduler = ResourceDemandScheduler(
            NoNodes(), config["available_node_types"], config["max_workers"], config["head_node_type"], 100
        )
        tracker = NodeProviderAvailabilityTracker()
        for node_type in refused:
            error = NodeLaunchException("InsufficientInstanceCapacity", "there are none", None)
            tracker.update_node_availability(node_type, int(time.time()), error)
        found, _ = scheduler.get_nodes_to_launch([], {}, demand, {}, [], {}, [], tracker.summary())
        assert found.pop("head") == 1  # None runs yet.
        return found

    yield call
    logging.disable(logging.NOTSET)


GPU, CPU = {"GPU": 1.0, "CPU": 4.0}, {"CPU": 1.0}


def test_spot_machines_come_first(launched: Launched) -> None:
    assert launched([GPU]) == {"gpu-1-spot": 1}
    assert launched([CPU]) == {"cpu-spot": 1}


def test_on_demand_ones_where_aws_has_no_spot_machine(launched: Launched) -> None:
    assert launched([GPU], "gpu-1-spot") == {"gpu-1-ondemand": 1}
    assert launched([GPU] * 2 + [CPU] * 20, "gpu-1-spot", "cpu-spot") == {"gpu-1-ondemand": 2, "cpu-ondemand": 1}


def test_a_large_request_gets_a_large_machine(launched: Launched) -> None:
    four = {"GPU": 4.0, "CPU": 8.0}
    assert launched([four]) == {"gpu-4-spot": 1}
    assert launched([four], "gpu-4-spot") == {"gpu-4-ondemand": 1}


def test_nothing_without_gpus_takes_a_gpu_machine_and_nothing_but_drivers_the_head(launched: Launched) -> None:
    assert set(launched([CPU] * 32)) == {"cpu-spot"}
    assert launched([{"driver": 0.001}]) == {}
