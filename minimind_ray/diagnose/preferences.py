"""Rules about preference runs (DPO and related losses): what happens to the two answers of a pair."""

from __future__ import annotations

import math

import numpy as np

from minimind_ray.diagnose.facts import Facts
from minimind_ray.diagnose.finding import Finding, rounded
from minimind_ray.diagnose.robust import level

LEAST_STEPS = 10
"""Every step has many pairs, so a few steps show whether anything moves."""
MOVED = 0.1
"""The least useful change of the margin, in nats: chosen over rejected became 10 % more likely.

Smaller changes do not show in the answers.
"""
SATURATED = 10.0
"""The sigmoid loss of a pair with this reward margin is 5e-5: nothing is left to learn from the pair."""


def dpo_nothing_learned(facts: Facts) -> Finding | None:
    """Find a run with a reference model whose answers are as likely as before: the loss stays at ln 2."""
    margin, loss, beta = _ending(facts, "margin"), _ending(facts, "loss"), facts.number("dpo.beta")
    if margin is None or loss is None or not beta > 0 or facts.steps < LEAST_STEPS:
        return None
    # Losses without a reference have no margin of 0 at their start.
    if not (len(facts.curve("kl")) or len(facts.curve("val/kl"))) or abs(margin) / beta >= MOVED:
        return None
    evidence = {
        "loss": loss, "ln2": math.log(2), "margin": margin, "odds": math.exp(margin / beta) - 1, "rate": facts.lr,
        "beta": beta, "steps": facts.steps,
    }  # fmt: skip
    return Finding("dpo_nothing_learned", "error", evidence, (), "optim.lr", rounded(10 * facts.lr))


def dpo_above_start(facts: Facts) -> Finding | None:
    """Find a run with DPO's own loss that ends clearly above ln 2, where it began: it prefers wrong answers."""
    validations, start = facts.curve("val/loss"), math.log(2)
    # A validation has the same pairs each time. A tenth above the start, as in `rate_too_high`.
    if not len(validations) or facts.settings.get("dpo.loss") != "sigmoid" or facts.steps < LEAST_STEPS:
        return None
    if not facts.per_token and 1.1 * start < validations.values[-1] < math.inf:
        evidence = {"loss": float(validations.values[-1]), "ln2": start, "rate": facts.lr, "steps": facts.steps}
        return Finding("dpo_above_start", "error", evidence, (), "optim.lr", rounded(facts.lr / 10))
    return None


def dpo_margins_explode(facts: Facts) -> Finding | None:
    """Find a reward margin so large that the pairs teach nothing more, while the margin still grows."""
    curve, margin, kl = facts.curve("margin"), _ending(facts, "margin"), _ending(facts, "kl")
    if margin is None or kl is None or margin < SATURATED or len(curve) < LEAST_STEPS:
        return None
    reached = int(curve.steps[np.argmax(curve.values >= SATURATED)]) if curve.values.max() >= SATURATED else facts.steps
    evidence = {
        "margin": margin, "step": reached, "kl": kl, "rate": facts.lr,
        "beta": facts.number("dpo.beta"), "steps": facts.steps,
    }  # fmt: skip
    return Finding("dpo_margins_explode", "warning", evidence, (reached,), "optim.lr", rounded(facts.lr / 3))


def chosen_falls(facts: Facts) -> Finding | None:
    """Find chosen answers that became less likely together with the rejected ones."""
    chosen, rejected, before = (_change(facts, name) for name in ("logp_chosen", "logp_rejected", None))
    if chosen is None or rejected is None or before is None or facts.steps < LEAST_STEPS:
        return None
    # A third of the rejected answers' fall, and 10 nats or a quarter of the answer's own log-probability: then sampling
    # hardly gives the chosen answer any more.
    if rejected >= 0 or chosen > rejected / 3 or -chosen < max(10.0, 0.25 * abs(before)):
        return None
    evidence = {"chosen": chosen, "rejected": rejected, "before": before, "times": math.exp(min(-chosen, 700.0))}
    return Finding("chosen_falls", "warning", evidence, (), "dpo.beta")


def _ending(facts: Facts, name: str) -> float | None:
    """Return the last validation's value, or the level of the last tenth of the training."""
    if len(validations := facts.curve(f"val/{name}")):
        return float(validations.values[-1])
    curve = facts.curve(name)
    return level(curve.values[-max(3, len(curve) // 10) :]).value if len(curve) else None


def _change(facts: Facts, name: str | None) -> float | None:
    """Return by how many nats a log-probability has changed since the start; for None, the chosen answers' at start.

    The reward is beta times the change, on the same pairs, so it needs no measurement at the start.
    """
    logp, reward = _ending(facts, name or "logp_chosen"), _ending(facts, f"reward_{(name or 'logp_chosen')[5:]}")
    beta, loss = facts.number("dpo.beta"), facts.settings.get("dpo.loss")
    if logp is None or reward is None or not beta > 0 or loss not in ("sigmoid", "hinge"):
        return None
    return logp - reward / beta if name is None else reward / beta
