"""Evaluate a trained model on files, as a validation does. For pairs, also compute the fraction ranked correctly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.data.pack import Pack
from minimind_ray.data.prepare import prepare
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.store import PackStore
from minimind_ray.objectives.preference import Preference
from minimind_ray.stages.base import base_at
from minimind_ray.stages.columns import FrozenColumn, compute_here, dtype_here, ensure_column
from minimind_ray.stages.stage import stage_of
from minimind_ray.stages.start import whole_model
from minimind_ray.stages.use import open_trained
from minimind_ray.train.evaluate import Evaluation, evaluate, packs_within


def measure(
    config: Config, model: str, adapter: str | None, reference: str | None, say: Callable[[str], None]
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a model on `data.val`. Return each example's result, and the means by name in the order to show them.

    `reference` is the reference model for the rewards of preference data.

    Raises:
        UserError: the model does not exist, no row is left to measure on, or a reference is given although the stage or
            the loss has none.
    """

    if reference is not None and config.record.rows != "pair":
        raise UserError(f"--reference is for preference data, but --stage is {config.stage}: leave it out")
    trained = open_trained(model, adapter=adapter, precision=config.train.precision)
    config = resolve_paths(config)
    prepared = prepare(config.stage, config.data, "val", trained.tokenizer)
    say(prepared.summary())
    if not prepared.manifest.n_packs:
        raise UserError(f"{config.data.val}: no row is left to measure on; see {prepared.rejects}")
    objective = stage_of(config).objective(config, trained.model.shape)
    count = packs_within(PackStore(prepared.path), config.eval.max_tokens)
    if count < prepared.manifest.n_packs:
        say(f"measured on the first {count:,} packs, as eval.max_tokens {config.eval.max_tokens:,} says")
    evaluation = evaluate(
        trained.model, objective, islice(_packs(config, prepared.path, reference), count),
        token_bytes_V=torch.from_numpy(trained.tokenizer.token_bytes()).to(trained.device),
        device=trained.device, dtype=trained.dtype,
    )  # fmt: skip
    means, examples = evaluation.means, evaluation.examples
    facts: dict[str, Any] = {"model": model, "examples": len(examples["example"])}
    if not isinstance(objective, Preference):
        return evaluation, {**facts, "tokens": int(examples["count"].sum()), **means}

    reward = reference is not None or not objective.needs_reference
    name = "reward_accuracy" if reward else "log_probability_accuracy"
    facts |= {name: means["accuracy"], f"{name}_95_wilson": wilson_interval(means["accuracy"], facts["examples"])}
    if reward:
        facts |= {"dpo_loss": objective.config.loss, "beta": objective.config.beta}
        shown = ("loss", "margin", "reward_chosen", "reward_rejected", "kl", "logp_chosen", "logp_rejected")
    else:  # The other metrics need a reference.
        shown = ("logp_chosen", "logp_rejected")
    return evaluation, facts | {name: means[name] for name in shown if name in means}


def wilson_interval(part: float, count: int, z: float = 1.959964) -> list[float]:
    """Return Wilson's score interval for a fraction of `count` independent examples, 95 % by default (Wilson 1927)."""
    centre, spread = part + z * z / (2 * count), z * math.sqrt(part * (1 - part) / count + (z / (2 * count)) ** 2)
    return [max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))]


def _packs(config: Config, path: str, reference: str | None) -> Iterable[Pack]:
    """Return the prepared packs with the objective's columns, computed by the model `reference`; 0 if it is None."""

    columns = stage_of(config).columns(config)
    if reference is None:
        zeros = [(s.column, "lengths" if s.column.axis == "document" else "tokens") for s in columns]
        return (
            replace(pack, columns={c: np.zeros(len(getattr(pack, like)), c.dtype) for c, like in zeros})
            for pack in PackStore(path)
        )
    if not columns:
        settings = " and ".join(f"{key} {attrgetter(key)(config)}" for key in stage_of(config).column_keys)
        raise UserError(f"{settings} has no reference model: leave --reference out")
    base = base_at(whole_model(reference, "--reference"))
    files = [FrozenColumn(scored, path, base, dtype_here(config.train.precision)) for scored in columns]
    for frozen in files:
        ensure_column(frozen, compute_here)
    return PackStore(path, {frozen.scored.column: frozen.path for frozen in files})
