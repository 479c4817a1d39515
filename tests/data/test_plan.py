"""The plan: each pack of an epoch exactly once, whatever the number of workers."""

import numpy as np
import pytest

from minimind_ray.data.plan import StepPlan

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_every_pack_once_per_epoch_and_the_same_steps_for_any_workers(workers: int) -> None:
    plan = StepPlan((64, 64, 13), packs_per_step=8, epochs=2, seed=3)
    assert plan.steps == 2 * 18
    for epoch in range(2):
        steps = range(epoch * 18, (epoch + 1) * 18)
        assert all(plan.epoch(s) == epoch for s in steps)
        shares = [np.concatenate([plan.ids(s, r, workers) for r in range(workers)]) for s in steps]
        assert sorted(np.concatenate(shares)) == list(range(141))
        for s, share in zip(steps, shares):
            assert set(share) == set(plan.ids(s))


def test_order_follows_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = StepPlan((50,), packs_per_step=50, epochs=3, seed=seed)
        return plan.ids(epoch).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_max_steps_decides_alone() -> None:
    plan = StepPlan((10,), packs_per_step=4, epochs=1, seed=0, max_steps=7)
    assert plan.steps == 7
    assert plan.epoch(6) == 2
