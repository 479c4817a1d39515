"""Each rule on a made curve that has the fault, and on one that nearly has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from minimind_ray.config.stages import STAGES
from minimind_ray.diagnose.facts import Curve, Facts, Sample
from minimind_ray.diagnose.rules import RULES, diagnose
from minimind_ray.diagnose.words import LANGUAGES, texts, words

pytestmark = pytest.mark.unit

N = 200
STEPS = np.arange(1, N + 1)
NOISE = np.random.default_rng(0).normal(0, 0.02, N)
HEALTHY = 2 + 6.7 * np.exp(-STEPS / 30) + NOISE
COSINE = 1e-3 * (0.55 + 0.45 * np.cos(np.pi * STEPS / N))
BASELINES = {
    "uniform": 8.76, "unigram": 6.1, "bytes_per_token": 3.5, "unknown": 0.0,
    "train": {"documents": 1000, "cut": 10, "left_out": 10, "kept": 990}, "val": {"documents": 100},
}  # fmt: skip


def facts(
    loss: Any = HEALTHY,
    *,
    stage: str = "pretrain",
    val: Sequence[float] | None = (4.0, 3.0, 2.5, 2.2, 2.1),
    info: dict[str, Any] | None = None,
    baselines: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    samples: Sequence[Sample] = (),
    **curves: Any,
) -> Facts:
    """A finished run without a fault, except for what the arguments say. Curves have as many values as the loss."""
    steps = np.arange(1, len(loss) + 1)
    given: dict[str, Any] = {"loss": loss, "lr": COSINE[: len(loss)], "grad_norm": np.full(len(loss), 0.8), **curves}
    found = {name: Curve(steps, np.asarray(values, float)) for name, values in given.items()}
    if val is not None:
        at = np.linspace(0, len(loss), len(val) + 1)[1:].astype(int)
        found["val/loss"] = Curve(at, np.array(val))
    for name in [name for name in found if name.startswith("val/") and name != "val/loss"]:
        found[name] = Curve(found[name].steps[-1:], found[name].values[-1:])
    return Facts(
        "runs/x", STAGES[stage],
        {"optim.lr": 1e-3, "optim.clip": 1.0, "schedule.warmup": 10, "dpo.beta": 0.1, "dpo.loss": "sigmoid",
         "init_from": None, "data.max_seq_len": 512, "eval.temperature": 0.8, **(settings or {})},
        {"state": "finished", "planned_steps": len(loss), "baselines": BASELINES | (baselines or {}), **(info or {})},
        found, tuple(samples), len(loss),
    )  # fmt: skip


def with_spike(*at: int, by: float = 2.0) -> dict[str, Any]:
    loss, norm = HEALTHY.copy(), np.full(N, 0.8)
    for step in at:
        loss[step : step + 2] += by
        norm[step] = 6.0
    return {"loss": loss, "grad_norm": norm}


def pairs(
    margin: float,
    *,
    chosen: float = 0.5,
    rejected: float = -0.5,
    kl: float = 0.0,
    n: int = 40,
    val: float | None = None,
) -> Facts:
    """A DPO run with these values at its end. `chosen` and `rejected` are rewards; beta is 0.1."""
    line = np.linspace(0, 1, n)
    curves = {
        "margin": margin * line, "kl": kl * line, "reward_chosen": chosen * line, "reward_rejected": rejected * line,
        "logp_chosen": -30 + 10 * chosen * line, "logp_rejected": -40 + 10 * rejected * line,
    }  # fmt: skip
    loss = np.log1p(np.exp(-curves["margin"]))
    return facts(loss, stage="dpo", val=None if val is None else (math.log(2), val), **curves)


BROWN = "a brown fox runs over the hill and sees "
OTHER = (
    "The capital of France is Paris. Pandas eat bamboo, and whales live in the sea. Tomorrow is Monday, so go home now."
)
JUMPS = HEALTHY * 0 + np.repeat([4.0, 3.2, 2.5, 2.0], 50) + NOISE
EPOCHS = np.repeat([0, 1, 2, 3], 50)
CASES: dict[str, tuple[Facts, Facts]] = {
    "loss_not_finite": (
        facts(
            info={"state": "failed", "error": "step 201: the loss is nan and the gradient norm nan; training stopped"}
        ),
        facts(info={"state": "failed", "error": "the disk is full"}),
    ),
    "above_uniform": (facts(np.full(N, 9.3) + NOISE, val=None), facts(np.full(N, 8.8) + NOISE, val=None)),
    "above_unigram": (facts(6.12 + 2 * np.exp(-STEPS / 20) + NOISE, val=None), facts(5.6 + 2 * np.exp(-STEPS / 20))),
    "rate_too_high": (
        facts(np.where(STEPS < 80, HEALTHY, 4 + NOISE)),
        facts(HEALTHY + np.where((STEPS > 60) & (STEPS < 90), 0.15, 0)),
    ),
    "rate_too_low": (
        facts(8.7 - 1.2 * np.cumsum(COSINE) / COSINE.sum() + NOISE, val=None),
        facts(8.7 - 2.8 * (1 - np.exp(-STEPS / 30)) + NOISE, val=None),
    ),
    "plateau": (
        facts(np.where(STEPS < 60, HEALTHY, HEALTHY[59] + NOISE / 10), val=(2.6, 2.5, 2.5, 2.5, 2.5)),
        facts(2 + 6.7 * np.exp(-STEPS / 60) + NOISE),
    ),
    "spikes": (facts(**with_spike(100, 140)), facts(**with_spike(100, by=0.3))),
    "warmup_too_long": (facts(settings={"schedule.warmup": 80}), facts(settings={"schedule.warmup": 45})),
    "clipped": (facts(settings={"optim.clip": 0.01}), facts(settings={"optim.clip": 0.5})),
    "overfitting": (facts(val=(3.0, 2.6, 2.7, 2.9, 3.1)), facts(val=(3.0, 2.6, 2.62, 2.61, 2.63))),
    "epoch_jump": (
        facts(JUMPS, epoch=EPOCHS, val=(4.0, 3.5, 3.5, 3.49, 3.5)),
        facts(JUMPS, epoch=EPOCHS, val=(4.0, 3.5, 3.1, 2.7, 2.4)),
    ),
    "dpo_nothing_learned": (pairs(0.0005), pairs(0.05)),
    "dpo_above_start": (pairs(25.0, kl=-80, val=2.3), pairs(0.5, val=0.72)),
    "dpo_margins_explode": (pairs(25.0, kl=-80), pairs(4.0, kl=-10)),
    "chosen_falls": (pairs(2.0, chosen=-3.0, rejected=-5.0), pairs(2.0, chosen=-0.5, rejected=-2.5)),
    "samples_repeat": (
        facts(samples=[Sample(None, BROWN * 6)] * 2),
        facts(samples=[Sample(None, OTHER), Sample(None, BROWN * 6), Sample(None, OTHER)]),
    ),
    "samples_end_at_once": (
        facts(samples=[Sample("Who?", "\n"), Sample("What?", "\nA fox."), Sample("Where?", "")]),
        facts(samples=[Sample("Who?", "\n"), Sample("What?", "\nA fox.")]),
    ),
    "tokenizer_misfit": (facts(baselines={"bytes_per_token": 1.1}), facts(baselines={"bytes_per_token": 2.3})),
    "truncated": (
        facts(baselines={"train": {"documents": 1000, "cut": 200, "left_out": 50, "kept": 950}}),
        facts(baselines={"train": {"documents": 1000, "cut": 20, "left_out": 20, "kept": 980}}),
    ),
    "no_validation": (facts(val=None), facts(HEALTHY[:30], val=None)),
    "few_validation": (facts(baselines={"val": {"documents": 8}}), facts(baselines={"val": {"documents": 40}})),
    "waits_for_data": (
        facts(**{"timing/seconds": np.full(N, 1.0), "timing/data_seconds": np.full(N, 0.4)}),
        facts(**{"timing/seconds": np.full(N, 1.0), "timing/data_seconds": np.where(STEPS % 20, 0.01, 3.0)}),
    ),
}


def test_every_rule_has_a_case_and_words_in_both_languages() -> None:
    names = [rule.__name__ for rule in RULES]
    assert sorted(names) == sorted(CASES)
    assert set(names) <= set(texts())
    for rule in texts():
        assert rule in names or rule.startswith("sweep_")
        for language in LANGUAGES:
            assert list(texts()[rule][language]) == ["short", "found", "why", "try"]


@pytest.mark.parametrize("name", CASES)
def test_a_rule_finds_its_fault_and_not_what_only_looks_like_it(name: str) -> None:
    rule = next(rule for rule in RULES if rule.__name__ == name)
    faulty, sound = CASES[name]
    finding = rule(faulty)
    assert finding and finding.rule == name
    assert name in [each.rule for each in diagnose(faulty)]
    for language in LANGUAGES:
        assert "{" not in "".join(words(finding, language))
    assert rule(sound) is None


def test_a_sound_run_has_no_finding() -> None:
    assert diagnose(facts()) == []
    assert diagnose(pairs(1.0)) == []


def test_a_loss_may_jump_in_the_first_step() -> None:
    jumped = 5.3 + 20 * np.exp(-STEPS / 5) + NOISE
    jumped[0] = 4.8
    [finding] = diagnose(facts(jumped, settings={"init_from": "runs/pretrain"}, val=(5.6, 5.4)))
    assert finding.rule == "rate_too_high" and finding.severity == "error" and finding.evidence["before"] == 4.8
    jumped[0] = 25.0
    assert diagnose(facts(jumped, settings={"init_from": "runs/pretrain"}, val=(5.6, 5.4))) != [finding]


def test_a_preference_loss_may_have_a_large_gradient() -> None:
    norm = np.full(N, 20.0)
    assert [finding.rule for finding in diagnose(facts(grad_norm=norm))] == ["clipped"]
    assert diagnose(facts(np.linspace(0.69, 0.5, N), stage="dpo", val=(0.65, 0.6), grad_norm=norm)) == []


def test_a_steep_curve_is_no_jump_of_an_epoch() -> None:
    assert diagnose(facts(HEALTHY, epoch=EPOCHS, val=None, info={"state": "stopped"})) == []


@pytest.mark.parametrize("length", [0, 1, 2, 5, 12, 49])
def test_a_short_run_says_nothing(length: int) -> None:
    assert diagnose(facts(HEALTHY[:length], val=None, info={"state": "running"})) == []


def test_an_old_run_without_facts_of_its_data_is_read_all_the_same() -> None:
    old = facts()
    assert diagnose(Facts(old.where, old.record, old.settings, {"state": "finished"}, old.curves)) == []
