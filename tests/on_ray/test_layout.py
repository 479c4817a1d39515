"""How the trials of a sweep share a cluster, and what is said while they wait."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ScaleConfig
from minimind_ray.on_ray.layout import layout, trials_that_fit
from minimind_ray.on_ray.session import Machines
from minimind_ray.on_ray.waiting import lacking, telling

pytestmark = pytest.mark.unit

ONE, HALF, THREE_CPUS, NESTED = {}, {"gpus_per_worker": 0.5}, {"cpus_per_worker": 3.0}, {"workers": 2}


@pytest.mark.parametrize(
    ("cpus", "gpus", "scale", "count", "fuse", "concurrent", "expected"),
    [
        (1, 0, ONE, 4, 1, None, (1, 0, 1)),
        (2, 0, ONE, 4, 1, None, (2, 0, 1)),
        (4, 0, ONE, 4, 1, 3, (3, 0, 1)),
        (1, 0, ONE, 4, 4, None, (4, 1, 4)),
        (2, 0, ONE, 4, 4, None, (4, 2, 2)),
        (2, 0, ONE, 12, 7, None, (12, 2, 6)),
        (2, 0, ONE, 12, 4, 3, (3, 2, 2)),
        (4, 0, ONE, 2, 4, None, (2, 2, 1)),
        (2, 1, {"gpus_per_worker": 1.0}, 8, 8, None, (8, 1, 8)),
        (2, 1, HALF, 8, 1, None, (2, 0, 1)),
        (4, 0, THREE_CPUS, 2, 1, None, (1, 0, 1)),
        (4, 0, NESTED, 4, 1, None, (1, 0, 1)),
        (5, 0, NESTED, 4, 1, None, (2, 0, 1)),
        (3, 0, NESTED, 4, 1, None, (1, 0, 1)),
        (1, 0, NESTED, 4, 1, None, None),
        (2, 0, NESTED, 4, 1, None, None),
        (2, 0, THREE_CPUS, 4, 4, None, None),
        (4, 0, HALF, 4, 1, None, None),
    ],
)
def test_what_is_held_is_there(
    cpus: int, gpus: int, scale: dict[str, Any], count: int, fuse: int, concurrent: int | None, expected: Any
) -> None:
    asked, found = ScaleConfig(**scale), Machines([{"CPU": cpus, "GPU": gpus}], 1)
    if expected is None:
        with pytest.raises(UserError, match=r"one trial needs .* cannot give"):
            trials_that_fit(found, asked)
        return
    spread = layout(trials_that_fit(found, asked), count, fuse=fuse, concurrent=concurrent)
    assert (spread.at_once, spread.groups, spread.size) == expected
    holders = (spread.groups or spread.at_once) * asked.most
    assert holders * asked.cpus_per_worker + (asked.most > 1) <= cpus and holders * asked.gpus_per_worker <= gpus
    assert spread.at_once <= max(1, spread.groups) * spread.size or not spread.groups


def test_workers_of_one_trial_lie_on_several_nodes() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 1.0}]
    assert trials_that_fit(Machines(nodes, 3), ScaleConfig(workers=2)) == 2
    assert trials_that_fit(Machines(nodes, 2), ScaleConfig(workers=3)) == 1
    assert nodes[0] == {"CPU": 2.0}
    with pytest.raises(UserError, match="0 node"):
        trials_that_fit(Machines([], 0), ScaleConfig())


def test_what_a_trial_waits_for_is_said() -> None:
    have = {"CPU": 2.0, "GPU": 1.0}
    assert lacking(ScaleConfig(), have, {"CPU": 1.0}, []) is None
    said = str(lacking(ScaleConfig(), have, {}, ["process 7 on a"]))
    assert "a trial needs 1 CPUs, and 0 of 2 CPUs are free; other programs on the cluster: process 7 on a." in said
    on_gpu = lacking(ScaleConfig(gpus_per_worker=1.0), have, {"CPU": 2.0}, [])
    assert "a trial needs 1 CPUs and 1 GPUs, and 2 of 2 CPUs and 0 of 1 GPUs are free" in str(on_gpu)
    assert "needs 3 CPUs" in str(lacking(ScaleConfig(workers=2), have, {"CPU": 2.0}, []))  # One for Ray Data.


def test_it_is_said_after_a_while_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    asked = threading.Semaphore(0)

    def why() -> str:
        asked.release()
        return "waiting for room"

    with telling(why, first=0.01, again=0.01):
        for _ in range(8):
            asked.acquire(timeout=10)
    assert capsys.readouterr().err.count("waiting for room\n") >= 2
    with telling(why, first=60):
        time.sleep(0.02)
    assert not capsys.readouterr().err
