"""The choice of the next token, by hand."""

from __future__ import annotations

import math
from statistics import mean

import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.model.sampling import Sampling, choose

pytestmark = pytest.mark.unit


def draw(probabilities: list[float], sampling: Sampling, count: int) -> list[int]:
    logits_AV = torch.tensor(probabilities).log().expand(count, -1)
    return choose(logits_AV, [sampling] * count, [(i + 0.5) / count for i in range(count)]).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "allowed"),
    [
        (1.0, 1.0, 0, {0, 1, 2, 3}),
        (1.0, 1.0, 2, {1, 3}),
        (1.0, 1.0, 9, {0, 1, 2, 3}),
        (1.0, 0.5, 0, {3}),  # 3 alone has probability 0.5
        (1.0, 0.51, 0, {1, 3}),
        (1.0, 0.6, 2, {3}),  # 3 alone has 2/3 of what top_k leaves
        (1.0, 0.7, 2, {1, 3}),
        (1.0, 0.0, 0, {3}),
        (0.01, 1.0, 0, {3}),
        (1e-40, 1.0, 0, {3}),
        (1e-320, 0.9, 2, {3}),
        (0, 1.0, 0, {3}),
    ],
)
def test_choice_by_hand(temperature: float, top_p: float, top_k: int, allowed: set[int]) -> None:
    assert set(draw([0.125, 0.25, 0.125, 0.5], Sampling(temperature, top_p, top_k), 400)) == allowed


@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_draws_follow_the_probabilities(top_p: float) -> None:
    counts = torch.tensor(draw([0.1, 0.2, 0.3, 0.4], Sampling(top_p=top_p), 2000)).bincount()
    torch.testing.assert_close(counts / 2000, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.001, rtol=0)


def test_a_token_without_probability_is_never_drawn() -> None:
    below_one = math.nextafter(1.0, 0.0)
    for uniform in (0.0, below_one):
        logits_AV = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
        for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.9)):
            assert choose(logits_AV, [sampling], [uniform]).tolist() == [1]


def test_a_row_is_chosen_by_its_own_settings_whatever_the_others_are() -> None:
    torch.manual_seed(0)
    logits_AV = torch.randn(6, 50)
    samplings = [
        Sampling(), Sampling(temperature=0), Sampling(top_k=5), Sampling(temperature=0.3), Sampling(top_p=0.5),
        Sampling(1.5, 0.8, 20),
    ]  # fmt: skip
    uniforms = [0.1, 0.2, 0.6, 0.7, 0.8, 0.9]
    alone = [choose(logits_AV[i : i + 1], samplings[i : i + 1], uniforms[i : i + 1]).item() for i in range(6)]
    assert choose(logits_AV, samplings, uniforms).tolist() == alone


def test_random_numbers_follow_from_the_seed_and_the_place() -> None:
    def numbers(*seed: int) -> list[float]:
        return [Sampling(seed=seed).uniform(i) for i in range(1000)]

    assert numbers(1, 2) == numbers(1, 2)
    assert len({*numbers(1), *numbers(1, 2), *numbers(12), *numbers(2, 1)}) == 4000
    assert mean(numbers(7)) == pytest.approx(0.5, abs=0.03) and all(0 <= x < 1 for x in numbers(7))
    assert Sampling(seed=(3,)).uniform(5) == 0.8011223222842768  # the same in every version


def test_settings_are_finite_and_within_bounds() -> None:
    with pytest.raises(UserError, match=r"top-p is 1.5: give a number from 0 to 1"):
        Sampling(top_p=1.5)
    with pytest.raises(UserError, match="max-new-tokens is 0: give a number of at least 1"):
        Sampling(max_new_tokens=0)
    with pytest.raises(UserError, match="repetition-penalty is nan: give a finite number"):
        Sampling(repetition_penalty=math.nan)
