"""All rules, and `diagnose`, which applies them to a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from minimind_ray.diagnose import data, learning, preferences, samples
from minimind_ray.diagnose.facts import Facts
from minimind_ray.diagnose.finding import SEVERITIES, Finding, Rule

RULES: tuple[Rule, ...] = (
    learning.loss_not_finite, learning.above_uniform, learning.above_unigram, learning.rate_too_high,
    learning.rate_too_low, learning.spikes, learning.overfitting, learning.epoch_jump, learning.clipped,
    learning.warmup_too_long, learning.plateau,
    preferences.dpo_nothing_learned, preferences.dpo_above_start, preferences.dpo_margins_explode,
    preferences.chosen_falls,
    samples.samples_repeat, samples.samples_end_at_once,
    data.tokenizer_misfit, data.truncated, data.no_validation, data.few_validation, data.waits_for_data,
)  # fmt: skip
EXPLAINED = {
    "plateau": {"rate_too_high", "above_uniform", "above_unigram", "overfitting", "clipped"},
    "spikes": {"rate_too_high"},
    "rate_too_low": {"rate_too_high"},
    "dpo_margins_explode": {"dpo_above_start"},
    "samples_repeat": {"above_uniform", "above_unigram"},
}
"""Findings that say nothing new beside one of these others."""


def diagnose(facts: Facts) -> list[Finding]:
    """Return what the rules find in a run, the most severe first."""
    broken = learning.loss_not_finite(facts)
    facts = _before(facts, broken.steps[0]) if broken else facts
    with np.errstate(all="ignore"):  # Values of damaged files may be too large to add up.
        found = [finding for rule in RULES if (finding := broken if rule is learning.loss_not_finite else rule(facts))]
    names = {finding.rule for finding in found}
    kept = [finding for finding in found if not EXPLAINED.get(finding.rule, set()) & names]
    return sorted(kept, key=lambda finding: SEVERITIES.index(finding.severity))


def _before(facts: Facts, step: int) -> Facts:
    """Return the facts of the steps before `step`, whose numbers are finite."""
    curves = {name: curve.between(-1, step - 1) for name, curve in facts.curves.items()}
    return replace(facts, curves={name: curve for name, curve in curves.items() if np.isfinite(curve.values).all()})
