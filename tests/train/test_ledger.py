"""The ledger says "exactly once" of what was, and names what was not."""

from __future__ import annotations

import numpy as np
import pytest

from minimind_ray.data.plan import StepPlan
from minimind_ray.train.ledger import Ledger, counts_text, parse_counts

pytestmark = pytest.mark.unit


def filled(plan: StepPlan, steps: range, workers: int) -> Ledger:
    ledger = Ledger(plan.packs_per_step, plan.packs_per_epoch)
    for step in steps:
        for rank in range(workers):
            ledger.add(plan.epoch(step), plan.ids(step, rank, workers).tolist())
    return ledger


PLAN = StepPlan((64, 64, 13), packs_per_step=8, epochs=2, seed=3)


@pytest.mark.parametrize("steps", [0, 1, 11, 18, 25, 36])
def test_changing_numbers_of_workers_leave_each_pack_once(steps: int) -> None:
    ledger = filled(PLAN, range(0, steps // 2), workers=4)
    again = Ledger(**ledger.gather())
    for step in range(steps // 2, steps):
        again.add(PLAN.epoch(step), PLAN.ids(step).tolist())
    state = again.gather()
    assert Ledger(**state).problem(steps) is None
    assert Ledger(**state).problem(steps + 1)


def test_what_is_wrong_is_named() -> None:
    ledger = filled(PLAN, range(20), workers=1)
    first, rest = PLAN.ids(0)[0], PLAN.ids(19).tolist()
    ledger.add(0, [int(first)])
    assert Ledger(**ledger.gather()).problem(20) == f"epoch 1: pack {first} was trained on 2 times"
    ledger = filled(PLAN, range(19), workers=1)
    ledger.add(1, rest[1:])
    assert Ledger(**ledger.gather()).problem(20) == "epoch 2: 15 packs were trained on, not 16"
    ledger.add(1, [141])
    assert Ledger(**ledger.gather()).problem(20) == "epoch 2: pack 141 was trained on, and there are 141"
    stream = Ledger(4, None)
    stream.add(None, range(8))
    assert Ledger(**stream.gather()).problem(2) is None
    stream.add(None, [9])
    assert Ledger(**stream.gather()).problem(2) == "epoch 1: pack 9 was trained on, and there are 8"


@pytest.mark.parametrize("seed", range(20))
def test_text_and_back(seed: int) -> None:
    counts = np.random.default_rng(seed).choice([0, 1, 1, 1, 2], size=50)
    counts[-1] = 1
    assert parse_counts(counts_text(counts)).tolist() == counts.tolist()
    assert counts_text(np.array([1, 1, 0, 2, 2, 0, 1])) == "0-1 3-4*2 6"
