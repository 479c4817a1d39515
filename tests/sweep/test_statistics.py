"""The statistics against known truth. `make bench ARGS=coverage` simulates more kinds of sweeps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from minimind_ray.sweep.binary import mid_p, paired_bounds
from minimind_ray.sweep.more import needed
from minimind_ray.sweep.seeds import Seeds, fit_seeds, typical_of_others
from minimind_ray.sweep.statistics import Statistics, judge
from minimind_ray.train.intervals import clustered_share, wilson
from tests.bench.coverage import COLUMNS, KINDS, coverage, crossed

pytestmark = pytest.mark.unit


def simulate(rng: np.random.Generator, truth: Sequence[float], **options: Any) -> tuple[Statistics, dict[str, Any]]:
    """A crossed design of points, seeds and examples of unequal length, each with its own random effect."""
    sweep = crossed(rng, truth, **options)
    data: dict[str, Any] = {
        "numerator_TC": sweep.numerator_TE,
        "denominator_TC": sweep.denominator_TE,
        "point_T": sweep.point_T,
        "seed_T": sweep.seed_T,
        "larger_is_better": False,
    }
    return judge(**data, draws=400, random_seed=int(rng.integers(2**31))), data


def judged(value_TC: np.ndarray, point_T: Sequence[int], seed_T: Sequence[int], **options: Any) -> Statistics:
    """Examples that count once each."""
    options = {"larger_is_better": False, "draws": 1000, **options}
    return judge(value_TC, np.ones_like(value_TC), np.array(point_T), np.array(seed_T), **options)


def fitted(value_PS: Sequence[Sequence[float]]) -> Seeds:
    """NaN stands for a seed that a point lacks."""
    values = np.array(value_PS, float)
    point_T, seed_T = np.nonzero(np.isfinite(values))
    return fit_seeds(values[point_T, seed_T], point_T, seed_T, np.zeros(len(point_T)))


@pytest.mark.slow
def test_a_clear_difference_is_found_and_its_size_is_right() -> None:
    rng = np.random.default_rng(1)
    found, covered = [], []
    for _ in range(60):
        s, _ = simulate(rng, [2.0, 2.0, 2.0, 2.25], seeds=3)
        found.append(s.low_PP[3, s.order_P[0]] > 0 and not s.may_be_best_P[3])
        covered.append(s.low_PP[3, 0] <= 0.25 <= s.high_PP[3, 0])
    assert np.mean(found) >= 0.9
    assert np.mean(covered) >= 0.9


@pytest.mark.slow
# Some kinds take long, and show what others show.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "7 tasks" not in kind and "1,000 items" not in kind])
def test_the_intervals_keep_their_promise(kind: str) -> None:
    found = coverage(kind, sweeps=60, draws=300)
    after = dict(zip(COLUMNS, found["after"]))
    # These do not keep the promise wholly: docs/statistics.md says by how much.
    harder = any(words in kind for words in ("two odd", "of 4, two lost", "spreads", "12 seeds"))
    two_odd = "odd" in kind and "2 seeds" in kind
    assert after["error"] <= (0.15 if harder or two_odd else 0.10)
    if "1 seed" not in kind:
        assert after["single"] >= (0.85 if harder else 0.90)
        assert after["pairs"] >= (0.80 if harder else 0.85 if two_odd else 0.90)
        if "mean over" not in kind:  # The mean over tasks has neither of the two.
            assert after["best set"] >= (0.85 if harder else 0.90)
            assert after["winner"] >= (0.80 if harder else 0.88)


def test_documents_are_resampled_whole() -> None:
    found = coverage("687 pieces of 40 documents", sweeps=8, draws=150)
    assert found["before"][0] < 0.9 and found["after"][0] >= 0.9
    assert found["before"][1] < 0.9 <= found["after"][1]


def test_pairing_removes_what_examples_and_seeds_do_to_all() -> None:
    # Examples and seeds move all points alike by far more than the points differ.
    s, _ = simulate(np.random.default_rng(2), [2.0, 2.05], common=0.3, own=0.002, ease=2.0, noise=0.02)
    assert s.high_P[0] - s.low_P[0] > 0.5
    assert s.low_PP[1, 0] > 0
    assert s.difference_PP[1, 0] == pytest.approx(0.05, abs=0.02)


def test_ratio_of_sums_and_mean_over_seeds() -> None:
    s, data = simulate(np.random.default_rng(3), [1.0, 2.0])
    value_T = data["numerator_TC"].sum(1) / data["denominator_TC"].sum(1)
    assert s.estimate_P == pytest.approx([value_T[:2].mean(), value_T[2:].mean()])
    assert s.difference_PP[1, 0] == pytest.approx(value_T[2:].mean() - value_T[:2].mean())
    assert s.order_P.tolist() == [0, 1]


def test_examples_alone_give_the_textbook_interval() -> None:
    rng = np.random.default_rng(4)
    x_C = rng.normal(3, 1, 400)
    s = judged(x_C[None], [0], [0], draws=4000)
    half = 1.96 * x_C.std(ddof=1) / 20
    assert (s.low_P[0], s.high_P[0]) == pytest.approx((x_C.mean() - half, x_C.mean() + half), abs=0.1 * half)


def test_many_clusters_are_merged_without_changing_the_interval() -> None:
    x_C = np.random.default_rng(5).normal(3, 1, 20_000)
    s = judged(x_C[None], [0], [0], draws=4000)
    assert s.high_P[0] - s.low_P[0] == pytest.approx(2 * 1.96 * x_C.std() / math.sqrt(20_000), rel=0.1)


def test_seeds_alone_give_the_textbook_interval() -> None:
    # No example differs from another: Student's t on 2 degrees of freedom is all there is.
    seeds = np.array([1.0, 1.2, 1.7])
    s = judged(np.tile(seeds[:, None], 50), [0, 0, 0], [0, 1, 2], draws=100_000)
    half = 4.303 * seeds.std(ddof=1) / math.sqrt(3)
    assert (s.low_P[0], s.high_P[0]) == pytest.approx((1.3 - half, 1.3 + half), abs=0.05 * half)
    assert not s.vague_P.any()
    assert judged(np.tile(seeds[:2, None], 50), [0, 0], [0, 1]).vague_P.tolist() == [True]


def test_two_points_share_one_variance() -> None:
    # By hand: two points, seeds' common effect 0.2 either way, 0.1 left at each, 1 degree of freedom.
    seeds = fitted([[0.3, -0.3], [0.1, -0.1]])
    assert seeds.own_P == pytest.approx([0.04, 0.04])
    assert seeds.shared_P.all() and seeds.own_free_P.tolist() == [1, 1]
    assert (seeds.common, seeds.common_free) == (pytest.approx(0.08 - 0.04 / 2), 1)


def test_points_vary_over_seeds_by_different_amounts() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 40) + rng.normal(0, 1, (4, 40)) * np.array([[1.0], [1.0], [2.0], [6.0]])
    seeds = fitted(values.tolist())
    assert np.sqrt(seeds.own_P) == pytest.approx([1, 1, 2, 6], rel=0.3)
    assert seeds.odd_P.tolist() == [False, False, True, True]
    # Odd points do not lean on the others, and the last two that are usual cannot be told apart.
    assert seeds.own_free_P == pytest.approx([39] * 4) and seeds.own_P[0] == seeds.own_P[1]
    # With three seeds, a point's variance leans on the other points', but is never smaller than its own estimate.
    few = fitted(values[:, :3].tolist())
    assert few.own_free_P == pytest.approx([5] * 4) and few.own_P[3] > few.own_P[:2].max()
    # A point with a single seed has the typical variance of the others.
    values[0, 1:] = np.nan
    single = fitted(values[:, :5].tolist())
    assert 0 < single.own_P[0] < single.own_P[3] and np.isfinite(single.own_free_P).all()
    assert not fitted([[1.0], [2.0], [3.0]]).own_P.any()


def test_a_diverged_seed_changes_nothing_for_the_other_points() -> None:
    values = np.random.default_rng(1).normal(0, 1, 3) + np.random.default_rng(2).normal(0, 1, (5, 3))
    values[4, 0] += 1000.0
    seeds, others = fitted(values.tolist()), fitted(values[:4].tolist())
    assert seeds.odd_P.tolist() == [False] * 4 + [True]
    assert seeds.own_P[:4] == pytest.approx(others.own_P) and seeds.own_free_P[:4] == pytest.approx(others.own_free_P)
    assert (seeds.common, seeds.common_free) == (pytest.approx(others.common), others.common_free)
    assert seeds.own_P[4] == pytest.approx(1e6 / 3, rel=0.01) and seeds.own_free_P[4] == 2
    # Also if the others do not vary at all.
    with np.errstate(all="raise"):
        assert fitted([[0.0, 0.0, 0.0]] * 4 + [[0.0, 0.0, 1.0]]).odd_P.tolist() == [False] * 4 + [True]
    # Of three points, the other two cannot be told apart: both have the same variance.
    seeds, others = fitted(values[2:].tolist()), fitted(values[2:4].tolist())
    assert seeds.odd_P.tolist() == [False, False, True] and seeds.shared_P.tolist() == [True, True, False]
    assert seeds.own_P[:2] == pytest.approx(others.own_P) and seeds.own_free_P[:2] == pytest.approx(others.own_free_P)


def test_an_odd_point_does_not_make_other_points_seem_odd() -> None:
    rng, named = np.random.default_rng(4), []
    spread_P = np.array([6.0, *[1.0] * 7])
    for _ in range(100):
        values = rng.normal(0, 1, 5) + rng.normal(0, 1, (8, 5)) * spread_P[:, None]
        named.append(fitted(values.tolist()).odd_P)
    assert np.mean(named, 0)[0] >= 0.85 and np.any(np.array(named)[:, 1:], axis=1).mean() <= 0.05


def test_the_typical_variance_of_others_is_their_median() -> None:
    rng = np.random.default_rng(3)
    for points in (1, 2, 3, 6, 7):
        own_BP, free_P = rng.chisquare(2, (5, points)), np.where(np.arange(points) == 4, 0.0, 2.0)
        odd_P = np.arange(points) == 5
        found_BP = typical_of_others(own_BP, free_P, odd_P)
        for p in range(points):
            others = [q for q in range(points) if q != p and free_P[q] and not odd_P[q]]
            median_B = np.median(own_BP[:, others], axis=1) / (1 - 2 / 18) ** 3 if others else own_BP[:, p]
            assert found_BP[:, p] == pytest.approx(median_B)


def test_weights_are_plain_means_only_with_equal_seeds() -> None:
    assert fitted([[1.3, 0.7], [1.1, 0.9]]).weight_PT == pytest.approx(np.kron(np.eye(2), [0.5, 0.5]))
    # The lost trial's seed is worse by 1 for the other points: without it, the third point would seem the best.
    nan = math.nan
    value_PS = np.array([[1.0, 2.0, 3.0], [1.1, 2.1, 3.1], [1.2, 2.2, nan], [1.3, 2.3, 3.3]])
    value_PS += np.random.default_rng(0).normal(0, 1e-3, value_PS.shape)
    seeds = fitted(value_PS.tolist())
    estimate_P = seeds.weight_PT @ value_PS[np.isfinite(value_PS)]
    assert estimate_P == pytest.approx([2.0, 2.1, 2.2, 2.3], abs=0.01)


def test_seeds_that_points_do_not_have_in_common() -> None:
    nan = math.nan
    # Two pairs of points, each with seeds of its own.
    seeds = fitted([[1.3, 0.7, nan, nan], [1.1, 0.9, nan, nan], [nan, nan, 2.1, 1.9], [nan, nan, 2.3, 1.7]])
    assert seeds.common_free == 2 and seeds.own_P == pytest.approx([0.04] * 4)
    # Seeds that tie points into a chain, and no seed in common: nothing tells effects from chance.
    for values in (
        [[0, 1, nan, nan], [2, nan, 3, nan], [nan, 4, nan, 5]],
        [[1.1, 0.9, nan, nan], [nan, nan, 2.3, 1.7]],
    ):
        seeds = fitted(values)
        assert (seeds.common, seeds.common_free) == (0, 0) and (seeds.own_P > 0).all()


@pytest.mark.parametrize(
    ("points", "seeds"),
    [
        ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [0, 1, 2] * 2 + [10, 11, 12] * 2),
        ([0, 0, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 0, 1, 2, 10]),
        ([0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 3, 4]),
    ],
    ids=["two sweeps", "two points", "one of another seed", "one seed in common"],
)
@pytest.mark.slow
def test_equal_points_with_other_seeds_are_not_told_apart(points: list[int], seeds: list[int]) -> None:
    rng, apart = np.random.default_rng(7), []
    seed_T = np.array(seeds)
    for _ in range(100):
        common = rng.normal(0, 0.05, 20)[seed_T] + rng.normal(0, 0.01, len(seed_T))
        x_TC = common[:, None] + rng.normal(2, 0.4, 100) + rng.normal(0, 0.2, (len(seed_T), 100))
        s = judged(x_TC, points, seeds, draws=400, random_seed=int(rng.integers(2**31)))
        apart.append((s.low_PP[:, s.order_P[0]] > 0).any())
    assert np.mean(apart) <= 0.08


def test_predicted_ends_shift_the_estimate_and_widen_the_interval() -> None:
    x_TC = np.random.default_rng(8).normal(2, 0.1, (4, 100))
    plain = judged(x_TC, [0, 0, 1, 1], [0, 1, 0, 1])
    shifted = judged(x_TC, [0, 0, 1, 1], [0, 1, 0, 1], shift_T=np.array([0, 0, -0.5, -0.5]), extra_T=np.full(4, 0.01))
    assert shifted.estimate_P == pytest.approx(plain.estimate_P - [0, 0.5])
    assert (shifted.high_P - shifted.low_P > plain.high_P - plain.low_P).all()
    only_first = judged(x_TC, [0, 0, 1, 1], [0, 1, 0, 1], shift_T=np.array([0, 0, -9.0, -9.0]),
                        eligible_P=np.array([True, False]))  # fmt: skip
    assert only_first.order_P.tolist() == [0, 1]


def test_same_input_same_numbers() -> None:
    _, data = simulate(np.random.default_rng(5), [1.0, 1.1])
    a, b = judge(**data), judge(**data)
    assert a.low_PP.tobytes() == b.low_PP.tobytes()
    assert a.low_P.tobytes() == b.low_P.tobytes()


def test_trials_that_agree_to_the_last_digit() -> None:
    x_TC = np.tile(np.random.default_rng(6).normal(2, 1, 50), (4, 1))
    with np.errstate(all="raise", under="ignore"):
        s = judged(x_TC, [0, 0, 1, 1], [0, 1, 0, 1])
    assert s.low_PP.tolist() == s.high_PP.tolist() == [[0, 0], [0, 0]]
    assert s.may_be_best_P.all()
    # Nor does rounding make a point worse.
    x_TC[2:] *= 1 + 1e-12
    s = judged(x_TC, [0, 0, 1, 1], [0, 1, 0, 1])
    assert (s.low_PP <= 0).all() and (s.high_PP >= 0).all() and s.may_be_best_P.all()


def test_comparisons_with_the_best_need_less_than_all_pairs() -> None:
    rng = np.random.default_rng(9)
    base_C = rng.normal(2, 1, 200)
    x_TC = base_C + rng.normal(0, 0.2, (8, 200)) + np.array([0, *[0.08] * 7])[:, None]
    x_TC += (np.array([0, *[0.08] * 7]) - (x_TC - base_C).mean(1))[:, None]  # exactly so far apart
    s = judged(x_TC, range(8), [0] * 8, draws=4000)
    reach = (s.high_PP - s.low_PP)[0, 1:].mean() / 2
    value, low, high = s.vs_best_P3[3]
    assert (value, low) == (pytest.approx(0.08), 0.0)
    assert high - value < 0.95 * reach
    # The other way round gives the same.
    other = judged(-x_TC, range(8), [0] * 8, draws=4000, larger_is_better=True)
    assert other.may_be_best_P.tolist() == s.may_be_best_P.tolist()
    assert other.vs_best_P3[3] == pytest.approx([-value, -high, -low])


def test_the_winner_of_equal_points_is_corrected() -> None:
    rng, gains = np.random.default_rng(10), []
    for _ in range(20):
        x_TC = rng.normal(0, 1, (16, 100))
        s = judged(x_TC, range(16), [0] * 16)
        gains.append([s.estimate_P.min(), s.headline.value])
    plain, corrected = np.mean(gains, 0)
    assert plain < -0.15 and abs(corrected) < 0.05


def test_the_correction_never_makes_a_value_better() -> None:
    rng = np.random.default_rng(12)
    # One point is the best by far. The draws' median differs from 0 by chance, in both directions.
    for random_seed in range(6):
        x_TC = rng.normal(2, 0.5, (4, 60)) + np.array([0.0, 0.0, 3.0, 3.0])[:, None]
        for sign in (1, -1):
            s = judged(sign * x_TC, [0, 0, 1, 1], [0, 1, 0, 1], larger_is_better=sign < 0, random_seed=random_seed)
            assert sign * (s.headline.value - s.estimate_P[0]) >= 0


def test_a_diverged_seed_does_not_spoil_the_corrected_value() -> None:
    rng, point_T = np.random.default_rng(3), np.repeat(np.arange(16), 3)
    x_TC = rng.normal(2, 0.02, (48, 200)) + rng.normal(0, 0.02, (48, 1)) + np.linspace(0, 0.05, 16)[point_T][:, None]
    x_TC[20] += 8
    s = judged(x_TC, point_T.tolist(), [0, 1, 2] * 16)
    best = s.order_P[0]
    assert s.odd_P[6] and s.headline.low is not None and s.headline.high is not None
    assert s.headline.high - s.headline.low < 2 * (s.high_P[best] - s.low_P[best])


def test_shares() -> None:
    # Wilson 1927; 81 of 263 as in Newcombe 1998, table II; 50 of 50.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(1.0, 50) == pytest.approx((0.9287, 1.0), abs=1e-4)
    # 1 against 8 of 9 that differ: the binomial tail 10 / 512 minus half of 9 / 512, twice.
    assert mid_p(1, 8) == pytest.approx(2 * (10 - 4.5) / 512)
    assert mid_p(0, 0) == 1.0
    # With so many examples, the counts are too large for a float.
    assert mid_p(2000, 0) == 0.0 and mid_p(1030, 1030) == 1.0
    low, high = paired_bounds(1.0, 1.0, 0.0, 50, 0.95)
    assert (low, high) == pytest.approx((-0.0713, 0.0713), abs=1e-4)


def test_the_interval_of_a_share_counts_clusters() -> None:
    right_E, own_E = np.repeat([1.0, 0.0], [32, 8]), np.arange(40)
    assert clustered_share(right_E, own_E) == pytest.approx(wilson(0.8, 40))
    # Each example four times says no more than each example once.
    low, high = clustered_share(np.repeat(right_E, 4), np.repeat(own_E, 4))
    assert (low, high) == pytest.approx(wilson(0.8, 40), abs=2e-3)
    # All right: the design effect is unknown, so each cluster counts as one example.
    assert clustered_share(np.ones(40), own_E // 4) == pytest.approx(wilson(1.0, 10))
    assert clustered_share(right_E, np.zeros(40)) == pytest.approx(wilson(0.8, 1))


def test_the_interval_of_a_clustered_share_holds() -> None:
    rng, held, held_before = np.random.default_rng(0), 0, 0
    for _ in range(400):
        share_C = rng.beta(2, 1, 50)  # mean 2/3
        right_E = (rng.random((50, 6)) < share_C[:, None]).astype(float).ravel()
        low, high = clustered_share(right_E, np.repeat(np.arange(50), 6))
        held += low <= 2 / 3 <= high
        low, high = wilson(float(right_E.mean()), 300)
        held_before += low <= 2 / 3 <= high
    assert held >= 0.92 * 400 and held_before < 0.85 * 400


def test_right_and_wrong_answers_near_the_boundary() -> None:
    right_TC = np.ones((3, 50))
    right_TC[1, :3], right_TC[2, :20] = 0, 0
    s = judged(right_TC, [0, 1, 2], [0, 0, 0], larger_is_better=True, binary=True)
    assert s.low_P[0] == pytest.approx(0.9287, abs=1e-4) and s.high_P[0] == 1.0
    assert s.headline.low is not None and s.headline.low < 0.95
    # Three examples that differ, all in one direction, do not show a difference; twenty do.
    assert s.low_PP[0, 1] <= 0 and s.may_be_best_P[1]
    assert s.low_PP[0, 2] > 0 and not s.may_be_best_P[2]


@pytest.mark.parametrize("right", [[44, 44, 50, 50], [45, 45, 50, 50], [44, 45, 50, 50]])
def test_a_worse_share_cannot_be_the_best(right: list[int]) -> None:
    right_TC = (np.arange(50) < np.array(right)[:, None]).astype(float)
    for sign in (1, -1):  # the other way round: the share of wrong answers, less of which is better
        s = judged(right_TC if sign > 0 else 1 - right_TC, [0, 0, 1, 1], [0, 1, 0, 1], larger_is_better=sign > 0,
                   binary=True, draws=4000)  # fmt: skip
        worse = s.high_PP[0, 1] < 0 if sign > 0 else s.low_PP[0, 1] > 0
        assert not (worse and s.may_be_best_P[0])
        assert worse or right != [44, 44, 50, 50]


def test_shares_of_points_with_other_seeds_stay_shares() -> None:
    # Seed 1 is worse for point 1, so the model would give point 0, which lacks it, a share above 1.
    right_TC = (np.arange(50) < np.array([50, 50, 10, 49, 9])[:, None]).astype(float)
    s = judged(right_TC, [0, 1, 1, 2, 2], [1, 0, 1, 0, 1], larger_is_better=True, binary=True)
    assert s.order_P[0] == 0 and s.estimate_P[0] == 1.0
    assert (s.low_P <= s.estimate_P).all() and (s.estimate_P <= s.high_P).all() and s.high_P.max() <= 1
    assert (s.low_PP <= s.difference_PP).all() and (s.difference_PP <= s.high_PP).all()
    assert s.difference_PP == pytest.approx(s.estimate_P[:, None] - s.estimate_P)
    wrong_TC = np.zeros((2, 5))
    wrong_TC[0] = 1
    s = judged(wrong_TC, [0, 1], [0, 0], larger_is_better=True, binary=True)
    assert np.abs(s.vs_best_P3).max() <= 1 and np.abs(s.low_PP).max() <= 1


def test_only_eligible_points_can_be_the_best() -> None:
    x_TC = np.random.default_rng(8).normal(0, 0.01, (3, 100)) + np.array([1.0, 2.0, 2.1])[:, None]
    s = judged(x_TC, [0, 1, 2], [0, 0, 0], eligible_P=np.array([False, True, True]))
    assert s.order_P.tolist() == [1, 2, 0]
    assert s.may_be_best_P.tolist() == [False, True, False]
    assert np.isnan(s.vs_best_P3[0]).all() and s.vs_best_P3[1, 0] == pytest.approx(-0.1, abs=0.01)


def test_shares_that_nothing_varies_in() -> None:
    ones_TC = np.ones((4, 50))
    # Two seeds with the same share: nothing is vague about their interval.
    s = judged(ones_TC[:2], [0, 0], [0, 1], larger_is_better=True, binary=True)
    assert not s.vague_P.any() and s.low_P[0] == pytest.approx(0.9287, abs=1e-4)
    # 50 right answers against none.
    ones_TC[2:] = 0
    s = judged(ones_TC, [0, 0, 1, 1], [0, 1, 0, 1], larger_is_better=True, binary=True)
    assert not s.vague_P.any() and not s.vague_PP.any()
    assert s.low_PP[0, 1] == pytest.approx(0.8991, abs=1e-3) and s.high_PP[0, 1] == 1.0
    assert not s.may_be_best_P[1]


def test_rounding_is_small_beside_the_two_points_that_are_compared() -> None:
    x_TC = np.random.default_rng(6).normal(2, 1e-3, (3, 50)) + np.array([0.0, 0.01, 1e9])[:, None]
    s = judged(x_TC, [0, 1, 2], [0, 0, 0])
    assert s.low_PP[1, 0] > 0
    # Means of almost 0 differ by rounding alone.
    margin_C = np.random.default_rng(6).normal(0, 1, 50)
    x_TC = np.stack([margin_C - margin_C.mean(), (margin_C - margin_C.mean()) * (1 + 1e-12)])
    s = judged(x_TC, [0, 1], [0, 0])
    assert not s.difference_PP.any() and not s.low_PP.any() and not s.high_PP.any()


def test_an_interval_says_nothing_whatever_its_degrees_of_freedom() -> None:
    # A point of 3 seeds, of which one diverged, and losses that cannot be below 0.
    x_TC = np.random.default_rng(11).normal(0.4, 0.1, (9, 100))
    x_TC[4] += 8
    s = judged(x_TC, [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3)
    assert s.vague_P.tolist() == [False, True, False]
    assert s.vague_PP.tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    # The same distances of large values: the interval says where they lie.
    assert not judged(x_TC + 100, [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3).vague_P.any()


def test_an_interval_of_a_share_that_holds_all_shares_says_nothing() -> None:
    shares = np.array([0.1, 0.9, 0.8, 0.2, 0.5, 0.6, 0.9, 0.1])[:, None]
    right_TC = (np.arange(100) / 100 < shares).astype(float)
    s = judged(right_TC, [0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4, larger_is_better=True, binary=True)
    everything_PP = s.high_PP - s.low_PP >= 2 - 1e-9
    assert s.vague_PP[everything_PP].all() and everything_PP.any()
    assert s.vague_P[s.high_P - s.low_P >= 1 - 1e-9].all()
    for low, high, most in ((s.low_P, s.high_P, (0, 1)), (s.low_PP, s.high_PP, (-1, 1))):
        assert low.min() >= most[0] and high.max() <= most[1]


def test_differences_with_one_degree_of_freedom_may_be_vague() -> None:
    rng = np.random.default_rng(11)
    x_TC = rng.normal(2, 0.01, (4, 100)) + np.array([1.0, -1.0, -1.0, 1.0])[:, None]
    s = judged(x_TC, [0, 0, 1, 1], [0, 1, 0, 1])
    assert s.vague_PP[0, 1] and s.vague_PP[1, 0] and not s.vague_PP[0, 0]


def test_how_many_more() -> None:
    # Only examples: the interval has to become half as wide.
    found = needed(0.1, 0.2, examples_variance=1.0, seeds_variance=0.0, seeds=(3, 3), free=5)
    assert found.seeds is None and found.examples_factor == pytest.approx(4.0) and "examples alone" in found.why
    # Only seeds: more degrees of freedom help beside the larger number.
    found = needed(0.1, 0.2, examples_variance=0.0, seeds_variance=1.0, seeds=(2, 2), free=1)
    assert found.seeds == 3 and found.examples_factor is None and "seeds alone" in found.why
    # Both parts, each of which can be made small enough.
    found = needed(0.19, 0.2, examples_variance=1.0, seeds_variance=1.0, seeds=(5, 5), free=8)
    assert found.seeds and found.seeds > 5 and found.examples_factor and found.examples_factor > 1 and not found.why
    assert needed(0.1, 0.2, 1.0, 0.0, seeds=(1, 1), free=0).seeds is None
    found = needed(0.01, 0.2, 1.0, 1.0, seeds=(3, 3), free=5)
    assert (found.seeds, found.examples_factor, found.why) == (
        None, None, "it takes more seeds and more examples together",
    )  # fmt: skip
    assert needed(0.0, 0.2, 1.0, 1.0, seeds=(3, 3), free=5).why == "no difference was observed"


def test_how_many_more_seeds_of_points_that_have_different_numbers() -> None:
    # The half-width 0.2 comes from 1/10 + 1/2 seeds. 11 seeds each are more than enough, and fewer cannot be asked for.
    assert needed(0.12, 0.2, examples_variance=0.0, seeds_variance=1.0, seeds=(10, 2), free=9).seeds == 11
    # One of two trials failed, and may fail again.
    one = needed(0.15, 0.2, 0.0, 1.0, seeds=(2, 2), free=9).seeds
    assert one and needed(0.15, 0.2, 0.0, 1.0, seeds=(2, 2), free=9, lost=(1, 1)).seeds == max(one, 3) + 1
    assert needed(0.19, 0.2, 0.0, 1.0, seeds=(2, 1), free=9, lost=(0, 1)).seeds == 3
