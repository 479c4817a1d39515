"""The dpo stage: direct preference optimisation and related losses. It trains all weights, or adapters.

The model learns to prefer chosen answers to rejected answers. The reference model's log-probabilities are a column of
the packs (see columns.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minimind_ray.config.schema import Config, ModelShape
from minimind_ray.config.stages import DPO, DpoConfig
from minimind_ray.objectives.preference import (
    REFERENCE,
    SMOOTHED,
    WITHOUT_REFERENCE,
    Preference,
    reference_log_probs,
)
from minimind_ray.stages.stage import Scored, Stage, Use
from minimind_ray.train.evaluate import Evaluation
from minimind_ray.train.intervals import clustered_share

REFERENCE_LOG_PROBS = Scored(REFERENCE, reference_log_probs, "reference log-probabilities")


def loss_of(config: Config) -> str:
    """Return the name of a run's preference loss."""
    return config.own(DpoConfig).loss


def objective(config: Config, shape: ModelShape) -> Preference:
    """Return the objective with the configured loss."""
    return Preference(config.own(DpoConfig), shape)


def columns(config: Config) -> Sequence[Scored]:
    """Return the reference's column, if the loss has a reference model."""
    return () if loss_of(config) in WITHOUT_REFERENCE else (REFERENCE_LOG_PROBS,)


def report(config: Config, evaluation: Evaluation, referenced: bool) -> dict[str, Any]:
    """Return the fraction of pairs ranked correctly with its 95 % interval, and the means of other metrics.

    Pairs that share a prompt are one cluster for the interval.
    """
    means, examples = evaluation.means, evaluation.examples
    interval = clustered_share(examples["accuracy"], examples["cluster"])
    reward = referenced or loss_of(config) in WITHOUT_REFERENCE
    name = "reward_accuracy" if reward else "log_probability_accuracy"
    facts: dict[str, Any] = {name: means["accuracy"], f"{name}_95_wilson": list(interval)}
    if reward:
        facts |= {"dpo_loss": loss_of(config), "beta": config.own(DpoConfig).beta}
        shown = ("loss", "margin", "reward_chosen", "reward_rejected", "kl", "logp_chosen", "logp_rejected")
    else:  # The other metrics need a reference.
        shown = ("logp_chosen", "logp_rejected")
    return facts | {name: means[name] for name in shown if name in means}


USES = (
    Use(
        "dpo.simpo_gamma",
        lambda c: loss_of(c) == "simpo",
        lambda c: f"dpo.loss {loss_of(c)} has no such margin; leave it out, or use simpo",
    ),
    Use(
        "dpo.label_smoothing",
        lambda c: loss_of(c) in SMOOTHED,
        lambda c: f"dpo.loss {loss_of(c)} has no such form; leave it out, or use {' or '.join(SMOOTHED)}",
    ),
)

STAGE = Stage(DPO, objective, columns, column_keys=("dpo.loss",), uses=USES, report=report)
